"""Slaney's mel scale (Slaney 1998, Auditory Toolbox): linear below 1 kHz, logarithmic above."""

from __future__ import annotations

from typing import Final

import numpy as np
from jaxtyping import Float64

LINEAR_HZ: Final = 200 / 3  # hertz per mel up to 1 kHz, which is 15 mel
LOG_STEP: Final = np.log(6.4) / 27  # natural log of the frequency per mel above


def hz_to_mel(hz: float) -> float:
    """Convert a frequency to Slaney's mel scale."""
    return hz / LINEAR_HZ if hz < 1000 else 15 + float(np.log(hz / 1000)) / LOG_STEP


def mel_to_hz(mel: Float64[np.ndarray, " mel"]) -> Float64[np.ndarray, " mel"]:
    """Convert Slaney's mels to frequencies."""
    return np.where(mel < 15, mel * LINEAR_HZ, 1000 * np.exp((mel - 15) * LOG_STEP))
