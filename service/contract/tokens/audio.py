"""Sound to log-mel patches: one token is `frames` successive frames of `mels` band levels.

Power spectrum of Hann frames; triangular bands of height 1, evenly spaced on Slaney's mel scale (linear below 1 kHz,
logarithmic above; Slaney 1998, Auditory Toolbox) from 0 Hz to half the rate; then decibels below the window's
loudest level L, cut at 80 and scaled:

    token = 1 + log10(max(power, L / 10^8) / L) / 4,   L = max(loudest, 10^-8)        in [-1, 1]

So a recording made louder or softer gives the same tokens, each window stands on its own, and what never rises over
-80 dB of full scale stays silence (-1) instead of being blown up into noise. The window's mean is removed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
import soxr
from jaxtyping import Bool, Float32, Float64, Int64

from service.contract.errors import Invalid
from service.contract.modality import AudioTokens
from service.contract.tokens import audio_processing
from service.contract.tokens.mel import hz_to_mel, mel_to_hz

RANGE: Final = 1e-8  # 80 dB: what counts as silence, below the loudest level and below full scale
SILENCE: Final = -1.0
BINS_AT_ONCE: Final = 1 << 20  # of the spectra in memory
TOLERANCE: Final = 1e-3  # tokens that went through decimal digits


@dataclass(frozen=True, slots=True)
class Analysis:
    """The fixed arrays of a configuration; lengths in samples."""

    hop: int
    frame: int
    fft: int
    hann: Float32[np.ndarray, " sample"]
    bands: Bands


Cut = Callable[[Float32[np.ndarray, " sample"], AudioTokens], list[Float32[np.ndarray, " sample"]]]


def tokens(
    blocks: Iterable[Float32[np.ndarray, " sample"]], sample_rate: int, config: AudioTokens, cut: Cut | None = None
) -> list[Float32[np.ndarray, "token value"]]:
    """Resample, cut the windows, and turn each into one sequence; a clip shorter than a window gives a shorter one.

    A training run may cut the windows in its own way.
    """
    wave = _resampled(blocks, sample_rate, config.sample_rate)
    if config.processing is not None:
        cuts = [wave] if cut is None else cut(wave, config)
        return [audio_processing.tokens(each, config, config.processing) for each in cuts]
    return [window_tokens(window, config) for window in (windows if cut is None else cut)(wave, config)]


def _resampled(
    blocks: Iterable[Float32[np.ndarray, " sample"]], rate: int, target: int
) -> Float32[np.ndarray, " sample"]:
    # Block by block: an hour at 96 kHz never lies in memory as a whole.
    if rate == target:
        pieces = list(blocks)
    else:
        stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
        pieces = [stream.resample_chunk(block, last=False) for block in blocks]
        pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(pieces)


def windows(wave: Float32[np.ndarray, " sample"], config: AudioTokens) -> list[Float32[np.ndarray, " sample"]]:
    """Cut the centre window, or `windows` of them spread evenly from the first sample to the last."""
    length = round(config.sample_rate * config.window_s)
    return [wave[start : start + length] for start in window_starts(len(wave), config)]


def window_starts(num_samples: int, config: AudioTokens) -> list[int]:
    """Return the first sample of each window."""
    spare = num_samples - round(config.sample_rate * config.window_s)
    if spare <= 0:
        return [0]
    if config.windows == 1:
        return [spare // 2]
    return sorted({round(spare * at / (config.windows - 1)) for at in range(config.windows)})


def window_tokens(window: Float32[np.ndarray, " sample"], config: AudioTokens) -> Float32[np.ndarray, "token value"]:
    """Turn one window into tokens; the last one is filled up with silence."""
    levels = log_mel(window, config)
    num_frames = len(levels)
    num_tokens = -(-num_frames // config.frames)
    padded = np.full((num_tokens * config.frames, config.mels), SILENCE, np.float32)
    padded[:num_frames] = levels
    return padded.reshape(num_tokens, config.dim)


def log_mel(window: Float32[np.ndarray, " sample"], config: AudioTokens) -> Float32[np.ndarray, "frame mel"]:
    """Compute the band levels of a window, from -1 (80 dB below its loudest) to 1.

    Frame i is centred on the middle of the i-th hop, and what it needs beyond the window is silent.
    """
    analysis = _analysis(config.sample_rate, config.frame_ms, config.hop_ms, config.mels)
    num_frames = max(1, -(-len(window) // analysis.hop))
    margin = analysis.frame + analysis.hop
    padded = np.zeros(margin + num_frames * analysis.hop + margin, np.float32)
    body = padded[margin : margin + len(window)]
    if len(window):
        np.subtract(window, window.mean(dtype=np.float64), out=body, casting="same_kind")
        # Float files may hold unscaled integers, whose squares would leave float32.
        body /= max(1.0, float(np.abs(body).max()))
    first = margin + analysis.hop // 2 - analysis.frame // 2
    frames = np.lib.stride_tricks.sliding_window_view(padded, analysis.frame)[first :: analysis.hop][:num_frames]
    power = np.empty((num_frames, config.mels), np.float32)
    at_once = max(1, BINS_AT_ONCE // analysis.fft)
    for start in range(0, num_frames, at_once):
        spectrum = np.fft.rfft(frames[start : start + at_once] * analysis.hann, analysis.fft)[:, :-1]
        power[start : start + at_once] = analysis.bands(spectrum.real**2 + spectrum.imag**2)
    loudest = max(float(power.max()), RANGE)
    # Divided first, since the product of the two small numbers lies where float32 gets coarse; cut last, since the
    # logarithm of 10^-8 is not quite -8.
    levels = 1 + np.log10(np.maximum(power / loudest, RANGE)) / 4
    return np.maximum(levels, SILENCE).astype(np.float32)


@lru_cache(maxsize=64)
def _analysis(sample_rate: int, frame_ms: float, hop_ms: float, mels: int) -> Analysis:
    hop = max(1, round(sample_rate * hop_ms / 1000))
    frame = max(2, round(sample_rate * frame_ms / 1000))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(frame) + 0.5) / frame)
    hann *= 2 / hann.sum()  # so that a full-scale sine in the middle of a band has power 1
    corners_hz = mel_to_hz(np.linspace(0, hz_to_mel(sample_rate / 2), mels + 2))
    fft = 1 << (frame - 1).bit_length()
    # Zero-padded until the narrowest band holds a bin: an empty one would say silence for ever.
    while not (bands := _bands(np.arange(fft // 2) * sample_rate / fft, corners_hz)).covered:
        fft *= 2
    return Analysis(hop, frame, fft, hann.astype(np.float32), bands)


@dataclass(frozen=True, slots=True)
class Bands:
    """Triangles over the bins of a spectrum.

    Each bin lies between two corners, climbing towards the band that peaks at the upper one and falling off the band
    that peaks at the lower one: two sums per gap give all bands, without a matrix of zeros, and without the threads of
    a matrix library, whose number could change the last bit.
    """

    climb: Float32[np.ndarray, " bin"]
    starts: Int64[np.ndarray, " gap"]
    empty: Bool[np.ndarray, " gap"]
    covered: bool

    def __call__(self, power: Float32[np.ndarray, "frame bin"]) -> Float32[np.ndarray, "frame mel"]:
        """Sum each frame's power under each triangle."""
        climbing = power * self.climb
        up = np.add.reduceat(climbing, self.starts, axis=1)
        down = np.add.reduceat(power - climbing, self.starts, axis=1)
        up[:, self.empty] = down[:, self.empty] = 0  # reduceat gives a gap without bins the bin after it
        return up[:, :-1] + down[:, 1:]


def _bands(bins_hz: Float64[np.ndarray, " bin"], corners_hz: Float64[np.ndarray, " corner"]) -> Bands:
    num_bins = len(bins_hz)
    edges = np.searchsorted(bins_hz, corners_hz)
    gap = np.searchsorted(corners_hz, bins_hz, side="right") - 1
    climb = (bins_hz - corners_hz[gap]) / (corners_hz[gap + 1] - corners_hz[gap])
    bands = Bands(climb.astype(np.float32), np.minimum(edges[:-1], num_bins - 1), np.diff(edges) == 0, covered=True)
    return replace(bands, covered=bool(bands(np.ones((1, num_bins), np.float32)).all()))


def ready(values: np.ndarray, config: AudioTokens) -> Float32[np.ndarray, "token value"]:
    """Check log-mel patches that were made before: (token, value), each from -1 to 1.

    Raises Invalid naming what differs.
    """
    if config.processing is not None:
        return audio_processing.ready(values, config)
    if values.ndim != 2 or values.shape[1] != config.dim:
        raise Invalid(f"audio tokens have shape (n, {config.dim}), not {values.shape}")
    if not 1 <= len(values) <= config.max_length:
        raise Invalid(
            f"there are {len(values)} audio tokens and a window has 1 to {config.max_length}", code="too_long"
        )
    if not (np.abs(values) <= 1 + TOLERANCE).all():
        raise Invalid("audio tokens are levels from -1 to 1, as /v1/tokenize gives them")
    return values.astype(np.float32, copy=False)
