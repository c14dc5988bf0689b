"""Pictures of sounds for the page: a spectrogram as a small PNG."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 160, 64  # pixels
RANGE_DB: Final = 60.0
TOP_HZ: Final = 5500
# From paper to ink; every level between is interpolated.
INKS: Final = np.array([[250, 249, 246], [190, 214, 220], [72, 132, 156], [26, 58, 92], [14, 22, 48]], np.float64)


def spectrogram(sound: bytes) -> bytes:
    """Draw the spectrogram of an encoded sound, time to the right and frequency upwards, as PNG."""
    wave, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
    wave = wave.mean(axis=1)
    frame = max(64, rate // 50)
    starts = np.linspace(0, max(0, len(wave) - frame), WIDTH).astype(int)
    padded = np.pad(wave, (0, max(0, frame - len(wave))))
    frames = np.stack([padded[start : start + frame] for start in starts]) * np.hanning(frame)
    power = np.abs(np.fft.rfft(frames, n=1024)) ** 2  # (time, frequency)
    highest = max(2, round(512 * min(TOP_HZ, rate / 2) / (rate / 2)))
    level = 10 * np.log10(power[:, :highest] + 1e-10)
    ink = np.clip((level - level.max()) / RANGE_DB + 1, 0, 1)
    image = Image.fromarray(_colour(ink.T[::-1])).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def _colour(ink: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Turn levels in [0, 1], shape (row, column), into RGB."""
    stops = np.linspace(0, 1, len(INKS))
    channels = [np.interp(ink, stops, INKS[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
