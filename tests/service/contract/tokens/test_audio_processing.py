"""Sounds of any rate and length become the levels that transformers makes of them, at the sizes of real models."""

from __future__ import annotations

import numpy as np
import pytest
import soxr
import transformers as hf

from service.contract.modality import AudioTokens
from service.contract.processing import AudioProcessing
from service.contract.tokens.tokenise import WaveRaw, build

SOUNDS = [
    (48_000, 0.001), (44_100, 1.37), (16_000, 3.3), (8000, 9.99), (96_000, 10.0), (22_050, 12.34), (11_025, 31.7),
    (48_000, 10.001), (192_000, 0.7),
]  # fmt: skip


def config(*, fused: bool, fill: str = "repeatpad") -> AudioTokens:
    processing = AudioProcessing.model_validate(
        {
            "fft": 1024,
            "hop": 480,
            "min_hz": 0,
            "max_hz": 14_000,
            "scale": "htk" if fused else "slaney",
            "fill": fill,
            "fused": fused,
        }
    )
    return AudioTokens(
        sample_rate=48_000, window_s=10, mels=64, frame_ms=64 / 3, hop_ms=10, frames=1, processing=processing
    )


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_waves_become_the_checkpoints_own_features(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library draws the parts of a long sound at random: here it is made to draw the middle, as we do.
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    monkeypatch.setattr(np.random, "randint", lambda low, high: (high - 1) // 2)
    extractor = hf.ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc")
    tokeniser = build(config(fused=fused), {})
    rng = np.random.default_rng(0)
    for rate, seconds in SOUNDS:
        time = np.arange(round(rate * seconds)) / rate
        tone = 0.3 * np.sin(2 * np.pi * 700 * time * (1 + time / 3)) * np.exp(-time)
        wave = (tone + 0.01 * rng.standard_normal(len(time))).astype(np.float32)
        at_rate = wave if rate == 48_000 else soxr.resample(wave, rate, 48_000)
        wanted = extractor(at_rate, sampling_rate=48_000, return_tensors="np")["input_features"][0]
        (tokens,) = tokeniser(WaveRaw(wave, rate))
        found = tokens.reshape(1001, -1, 64).transpose(1, 0, 2)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 1e-3, (rate, seconds)


@pytest.mark.parametrize("fill", ["repeat", "repeatpad", "pad"])
def test_a_sound_of_which_nothing_is_left_at_the_models_rate_is_silence(fill: str) -> None:
    tokeniser = build(config(fused=False, fill=fill), {})
    (tokens,) = tokeniser(WaveRaw(np.ones(1, np.float32), 192_000))
    assert tokens.shape == (1001, 64)
    assert np.all(tokens == -100)
