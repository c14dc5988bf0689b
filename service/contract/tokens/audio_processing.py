"""Sound as an imported tower expects it: log-mel levels in decibels of full scale, a whole window of frames.

Power spectrum of periodic Hann frames, centred every `hop` samples on the window mirrored at its ends; triangular
bands, on the mel scale that the checkpoint was trained with (O'Shaughnessy's, called htk, with bands of height 1; or
Slaney's, with bands of equal area); 10 log10, cut at -100.

Where the checkpoint's own processor draws at random, the middle is taken here: of a sound longer than the window, or
of each third of one that is `fused`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64

from service.contract.errors import Invalid
from service.contract.modality import AudioTokens
from service.contract.processing import AudioProcessing
from service.contract.tokens.mel import hz_to_mel, mel_to_hz

FLOOR: Final = 1e-10
BINS_AT_ONCE: Final = 1 << 20


def tokens(
    wave: Float32[np.ndarray, " sample"], config: AudioTokens, processing: AudioProcessing
) -> Float32[np.ndarray, "token value"]:
    """Turn a sound into tokens; if it is longer than a window, and not to be fused, its middle.

    A token holds the levels of one frame: those of all four pictures, one after the other, if they are fused.
    """
    length = config.num_samples
    if len(wave) > length and not processing.fused:
        start = (len(wave) - length) // 2
        wave = wave[start : start + length]
    levels = log_mel(filled(wave, length, processing), config, processing)
    if not processing.fused:
        return levels
    num_frames = config.max_length
    if len(levels) == num_frames:  # also of a sound that is longer by less than a frame
        return np.tile(levels, (1, 4))
    spare = len(levels) - num_frames
    thirds = np.array_split(np.arange(spare + 1), 3)
    starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
    return np.concatenate([shrunk(levels, num_frames), *(levels[at : at + num_frames] for at in starts)], axis=1)


def filled(
    wave: Float32[np.ndarray, " sample"], length: int, processing: AudioProcessing
) -> Float32[np.ndarray, " sample"]:
    """Return a sound of at least `length` samples: repeated, or followed by silence."""
    missing = length - len(wave)
    if missing <= 0:
        return wave
    if not len(wave):  # what is left of a single sample at a lower rate
        return np.zeros(length, np.float32)
    times = length // len(wave)
    match processing.fill:
        case "repeat":
            return np.tile(wave, times + 1)[:length]
        case "repeatpad":
            wave = np.tile(wave, times)
        case "pad":
            pass
    return np.pad(wave, (0, length - len(wave)))


def log_mel(
    wave: Float32[np.ndarray, " sample"], config: AudioTokens, processing: AudioProcessing
) -> Float32[np.ndarray, "frame mel"]:
    """Compute the levels of every frame, in decibels of full scale."""
    fft = processing.fft
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft) / fft)
    limits = {"min_hz": processing.min_hz, "max_hz": processing.max_hz}
    bands = filters(config.sample_rate, fft, config.mels, processing.scale, **limits)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, fft // 2, mode="reflect"), fft)[:: processing.hop]
    levels = np.empty((len(frames), config.mels), np.float32)
    at_once = max(1, BINS_AT_ONCE // fft)
    for start in range(0, len(frames), at_once):
        # Rounded to single precision in between, as the checkpoint's own processor does it: near the floor it shows.
        spectrum = np.fft.rfft(frames[start : start + at_once] * hann).astype(np.complex64)
        power = np.abs(spectrum).astype(np.float64) ** 2
        levels[start : start + at_once] = 10 * np.log10(np.maximum(power @ bands, FLOOR))
    return levels


def shrunk(levels: Float32[np.ndarray, "frame mel"], num_frames: int) -> Float32[np.ndarray, "place mel"]:
    """Return the picture with fewer frames, interpolated between the two nearest to each new frame's centre.

    Step and places are rounded to single precision, as in the checkpoint's own processor: where levels jump by 100 dB
    it shows.
    """
    step = np.float32(len(levels) / num_frames)
    places = ((np.arange(num_frames) + 0.5) * float(step) - 0.5).astype(np.float32)
    at = np.clip(places, 0, len(levels) - 1)
    below = np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, len(levels) - 1)
    share = (at - below.astype(np.float32))[:, None]
    return levels[below] * (1 - share) + levels[above] * share


@lru_cache(maxsize=16)
def filters(
    sample_rate: int, fft: int, mels: int, scale: str, *, min_hz: float, max_hz: float
) -> Float64[np.ndarray, "bin mel"]:
    """Return the triangular bands over the bins of a spectrum."""
    if scale == "htk":
        low, high = (2595 * float(np.log10(1 + hz / 700)) for hz in (min_hz, max_hz))
        corners: Float64[np.ndarray, " corner"] = 700 * (10 ** (np.linspace(low, high, mels + 2) / 2595) - 1)
    else:
        corners = mel_to_hz(np.linspace(hz_to_mel(min_hz), hz_to_mel(max_hz), mels + 2))
    bins = np.linspace(0, sample_rate // 2, fft // 2 + 1)[:, None]
    widths = np.diff(corners)
    up, down = (bins - corners[:-2]) / widths[:-1], (corners[2:] - bins) / widths[1:]
    bands = np.maximum(0.0, np.minimum(up, down))
    return bands * (2 / (corners[2:] - corners[:-2])) if scale == "slaney" else bands


def ready(values: np.ndarray, config: AudioTokens) -> Float32[np.ndarray, "token value"]:
    """Check tokens that were made before: a whole window of them, every value finite.

    Raises Invalid naming what differs.
    """
    if values.shape != (config.max_length, config.dim):
        raise Invalid(f"audio tokens have shape {(config.max_length, config.dim)}, not {values.shape}")
    if not np.isfinite(values).all():
        raise Invalid("audio tokens hold a value that is NaN or infinite", code="not_finite")
    return values.astype(np.float32, copy=False)
