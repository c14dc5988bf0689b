from __future__ import annotations

import io
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.errors import Invalid
from service.contract.modality import AudioTokens
from service.contract.tokens import audio
from service.contract.tokens.audio import SILENCE, log_mel
from service.contract.tokens.mel import hz_to_mel, mel_to_hz
from service.contract.tokens.tokenise import EncodedRaw, PixelsRaw, ReadyRaw, TextRaw, WaveRaw, build


def tone(hz: float, seconds: float, rate: int, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def chirp(seconds: float, rate: int) -> np.ndarray:
    at = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (300 * at + 400 * at**2))).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def loudest_band(raw: WaveRaw | EncodedRaw, config: AudioTokens) -> int:
    (sequence,) = build(config, {})(raw)
    return int(sequence.reshape(-1, config.mels).mean(axis=0).argmax())


@pytest.mark.parametrize("hz", [200.0, 1000.0, 3000.0])
@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
def test_a_tone_is_loudest_in_the_band_that_it_lies_in_at_every_rate(hz: float, rate: int) -> None:
    config = AudioTokens()
    centres = mel_to_hz(np.linspace(0, hz_to_mel(8000), config.mels + 2))[1:-1]
    expected = int(np.abs(centres - hz).argmin())
    assert abs(loudest_band(WaveRaw(tone(hz, 1, rate), rate), config) - expected) <= (1 if hz == 200 else 0)


def test_the_scale_is_slaneys() -> None:
    assert hz_to_mel(1000) == pytest.approx(15)
    assert hz_to_mel(6400) == pytest.approx(42)
    assert mel_to_hz(np.array([0.0, 15.0, 42.0])) == pytest.approx([0, 1000, 6400])


def music(rate: int) -> np.ndarray:
    """The same second of sound at any rate: forty tones that swell and fade."""
    at = np.arange(rate)[:, None] / rate
    rng = np.random.default_rng(0)
    hz, phase, swell = rng.uniform(100, 7000, 40), rng.uniform(0, 6, 40), rng.uniform(0.5, 3, 40)
    tones = np.sin(2 * np.pi * hz * at + phase) * np.sin(2 * np.pi * swell * at) ** 2
    return (tones.mean(axis=1)).astype(np.float32)


@pytest.mark.parametrize("rate", [22_050, 24_000, 44_100, 48_000])
def test_resampling_hardly_changes_the_tokens(rate: int) -> None:
    tokeniser = build(AudioTokens(), {})
    (at_16k,), (resampled,) = (tokeniser(WaveRaw(music(hz), hz)) for hz in (16_000, rate))
    assert np.abs(at_16k - resampled).mean() < 0.01


@pytest.mark.parametrize("length", [16_000, 15_999, 40_000, 200_000])
def test_a_file_and_its_samples_give_the_same_tokens_to_the_last_bit(length: int) -> None:
    rng = np.random.default_rng(1)
    samples = np.round(rng.uniform(-0.9, 0.9, length) * 32_767) / 32_768
    samples = samples.astype(np.float32)
    for config, rate in ((AudioTokens(), 16_000), (AudioTokens(windows=3), 22_050)):
        tokeniser = build(config, {})
        made = [
            tokeniser(raw)
            for raw in (
                EncodedRaw(encoded(samples, rate, "WAV", "PCM_16")),
                EncodedRaw(encoded(samples, rate, "FLAC", "PCM_16")),
                EncodedRaw(encoded(samples, rate, "WAV", "FLOAT")),
                WaveRaw(samples, rate),
            )
        ]
        for other in made[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize(
    ("kind", "subtype", "rate"),
    [("OGG", "VORBIS", 22_050), ("OGG", "OPUS", 24_000), ("MP3", "MPEG_LAYER_III", 22_050), ("WAV", "ULAW", 8000)],
)
def test_lossy_files_are_read(kind: str, subtype: str, rate: int) -> None:
    data = encoded(tone(1000, 1, rate), rate, kind, subtype)
    config = AudioTokens()
    assert loudest_band(EncodedRaw(data), config) == loudest_band(WaveRaw(tone(1000, 1, 16_000), 16_000), config)


def test_channels_are_averaged() -> None:
    left, right = tone(440, 0.5, 16_000), tone(1760, 0.5, 16_000)
    tokeniser = build(AudioTokens(), {})
    (stereo,) = tokeniser(EncodedRaw(encoded(np.stack([left, right], axis=1), 16_000, "WAV", "FLOAT")))
    (mono,) = tokeniser(WaveRaw((left + right) / 2, 16_000))
    assert np.abs(stereo - mono).max() < 1e-4
    (cancelled,) = tokeniser(EncodedRaw(encoded(np.stack([left, -left], axis=1), 16_000, "WAV", "FLOAT")))
    assert (cancelled == SILENCE).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(gain=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_a_louder_recording_gives_the_same_tokens(gain: float, seed: int) -> None:
    samples = (np.random.default_rng(seed).standard_normal(4000) * 0.05).astype(np.float32)
    config = AudioTokens()
    assert np.abs(log_mel(samples, config) - log_mel(samples * np.float32(gain), config)).max() < 1e-4


def test_the_loudest_level_is_one_and_eighty_decibels_below_is_minus_one() -> None:
    levels = log_mel(tone(1000, 1, 16_000) + tone(3000, 1, 16_000, level=0.5e-2), AudioTokens())
    assert levels.max() == pytest.approx(1, abs=1e-6)
    assert levels.min() == SILENCE
    centres = mel_to_hz(np.linspace(0, hz_to_mel(8000), 66))[1:-1]
    band = int(np.abs(centres - 3000).argmin())
    assert levels[50, band - 1 : band + 2].max() == pytest.approx(0, abs=0.1)  # 40 dB below


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_samples=st.integers(1, 30_000),
    windows=st.integers(1, 4),
    frames=st.integers(1, 9),
    hop_ms=st.sampled_from([5.0, 10.0, 40.0]),
    mels=st.sampled_from([8, 64, 256]),
)
def test_sequences_fit_the_configuration_and_are_finite(
    num_samples: int, windows: int, frames: int, hop_ms: float, mels: int
) -> None:
    config = AudioTokens(sample_rate=8000, windows=windows, frames=frames, hop_ms=hop_ms, mels=mels)
    wave = (np.random.default_rng(num_samples).standard_normal(num_samples) * 0.1).astype(np.float32)
    sequences = build(config, {})(WaveRaw(wave, 8000))
    assert len(sequences) == (1 if num_samples <= 8000 else min(windows, num_samples - 8000 + 1))
    for sequence in sequences:
        assert sequence.dtype == np.float32
        assert sequence.shape[1] == config.dim
        assert 1 <= len(sequence) <= config.max_length
        assert len(sequence) == config.max_length or num_samples < 8000
        assert (np.abs(sequence) <= 1).all()


def test_no_band_is_dead_however_narrow() -> None:
    noise = (np.random.default_rng(0).standard_normal(96_000) * 0.1).astype(np.float32)
    for rate, mels, frame_ms in ((16_000, 256, 25.0), (96_000, 256, 25.0), (4000, 64, 2.0), (16_000, 8, 2.0)):
        config = AudioTokens(sample_rate=rate, mels=mels, frame_ms=frame_ms)
        assert (log_mel(noise[:rate], config).max(axis=0) > 0).all()


def test_one_window_is_the_centre_of_the_clip() -> None:
    clip = np.zeros(48_000, np.float32)
    clip[16_000:32_000] = chirp(1, 16_000)
    tokeniser = build(AudioTokens(), {})
    (centre,) = tokeniser(WaveRaw(clip, 16_000))
    (alone,) = tokeniser(WaveRaw(clip[16_000:32_000], 16_000))
    assert np.array_equal(centre, alone)


def test_several_windows_are_spread_from_the_first_sample_to_the_last() -> None:
    clip = chirp(3, 16_000)
    sequences = build(AudioTokens(windows=3), {})(WaveRaw(clip, 16_000))
    alone = build(AudioTokens(), {})
    for sequence, start in zip(sequences, (0, 16_000, 32_000), strict=True):
        assert np.array_equal(sequence, alone(WaveRaw(clip[start : start + 16_000], 16_000))[0])


def test_a_short_clip_gives_a_shorter_sequence_filled_up_with_silence_in_its_last_token() -> None:
    config = AudioTokens()
    (sequence,) = build(config, {})(WaveRaw(chirp(0.055, 16_000), 16_000))  # 6 frames: a token and a half
    assert sequence.shape == (2, config.dim)
    assert (sequence[1].reshape(4, 64)[2:] == SILENCE).all()
    assert (sequence[1].reshape(4, 64)[:2] > SILENCE).any(axis=1).all()


@pytest.mark.parametrize("wave", [np.zeros(16_000), np.full(16_000, 0.25), np.zeros(1), np.ones(1), np.full(500, 1e-6)])
def test_silence_and_a_constant_are_silence(wave: np.ndarray) -> None:
    for sequence in build(AudioTokens(), {})(WaveRaw(wave.astype(np.float32), 16_000)):
        assert (sequence == SILENCE).all()


def test_unscaled_integers_in_a_float_file_give_the_tokens_of_the_scaled_ones() -> None:
    tokeniser = build(AudioTokens(), {})
    samples = chirp(1, 16_000)
    (scaled,) = tokeniser(EncodedRaw(encoded(samples, 16_000, "WAV", "FLOAT")))
    (unscaled,) = tokeniser(EncodedRaw(encoded(samples * 32_768, 16_000, "WAV", "FLOAT")))
    assert np.abs(scaled - unscaled).max() < 1e-4


def test_a_clip_of_a_second_costs_little() -> None:
    tokeniser = build(AudioTokens(), {})
    raw = WaveRaw(chirp(1, 16_000), 16_000)
    tokeniser(raw)
    spent: list[float] = []
    for _ in range(30):
        began = time.thread_time()
        tokeniser(raw)
        spent.append(time.thread_time() - began)
    assert min(spent) < 0.002


def test_tokens_made_before_come_through_as_they_are() -> None:
    tokeniser = build(AudioTokens(), {})
    (made,) = tokeniser(WaveRaw(chirp(0.4, 16_000), 16_000))
    (again,) = tokeniser(ReadyRaw(made))
    assert np.array_equal(made, again)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((26, 256), np.float32),
        np.zeros((0, 256), np.float32),
        np.zeros((5, 255), np.float32),
        np.zeros(256, np.int32),
        np.full((5, 256), -80.0, np.float32),
        np.full((5, 256), np.nan, np.float32),
    ],
    ids=["too many", "none", "too narrow", "flat", "decibels", "nan"],
)
def test_tokens_made_before_are_checked(values: np.ndarray) -> None:
    with pytest.raises(Invalid):
        build(AudioTokens(), {})(ReadyRaw(values))


@pytest.mark.parametrize(
    "raw",
    [
        TextRaw("x"),
        PixelsRaw(np.zeros((4, 4), np.uint8)),
        WaveRaw(np.zeros(0, np.float32), 8000),
        WaveRaw(np.zeros((4, 2), np.float32), 8000),
        WaveRaw(np.full(9, np.nan, np.float32), 8000),
        WaveRaw(np.full(9, np.inf, np.float32), 8000),
        WaveRaw(np.zeros(9, np.float32), 10),
    ],
)
def test_what_is_no_sound_is_refused(raw: TextRaw | PixelsRaw | WaveRaw) -> None:
    with pytest.raises(Invalid):
        build(AudioTokens(), {})(raw)


def test_frames_are_analysed_a_few_at_a_time_and_come_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long frames close together: all spectra of ten seconds would take 300 MB."""
    config = AudioTokens(sample_rate=48_000, window_s=10, frame_ms=100, hop_ms=2, frames=4, mels=32)
    wave = chirp(10, 48_000)
    tracemalloc.start()
    try:
        levels = log_mel(wave, config)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 << 20
    monkeypatch.setattr(audio, "BINS_AT_ONCE", 1 << 30)
    np.testing.assert_array_equal(levels, log_mel(wave, config))


def test_a_window_is_no_longer_than_any_other_sequence() -> None:
    with pytest.raises(ValidationError, match="60000 tokens is longer than 8192"):
        AudioTokens(window_s=600, frames=1)
    assert AudioTokens(window_s=600, frames=8).max_length == 7500
