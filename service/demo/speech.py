"""Spoken digits, made on the spot: a dozen synthetic voices to learn from, others to be asked in."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from service.demo.digits import WORDS, caption
from service.demo.espeak import Line, SpeechUnavailable, speak
from service.demo.specimens import Collection, Specimen

SAMPLE_RATE: Final = 16_000
WINDOW_S: Final = 1.0
CAPTIONS: Final = (
    "someone says {word}",
    "the spoken word {word}",
    "{word}",
    "a voice saying {word}",
    "the number {word} read aloud",
    "a recording of the word {word}",
)
VOICES: Final = (
    "en",
    "en+f3",
    "en+m6",
    "en-us+f1",
    "en-us+m7",
    "en-us-nyc+m5",
    "en-gb-scotland+m1",
    "en-gb-scotland+f2",
    "en-gb-x-rp+f4",
    "en-gb-x-gbclan+m3",
    "en-gb-x-gbcwmd+f5",
    "en-029+m2",
    "en-us+Andy",
    "en+Annie",
)
UNHEARD: Final = ("en-us", "en-gb-x-rp+m3", "en+f2", "en-029+f1")
_TAKES: Final = 12  # of a word by a voice, each at its own rate, pitch, noise and onset
_TAKES_UNHEARD: Final = 10
_SAME: Final = 0.25  # mean distance of log power spectra: the same voice again is 0.1, another one 0.4 or more


def collect(seed: int) -> Collection:
    """Return spoken digits; the held-out ones are said by voices that the others do not contain.

    Falls back to synthetic sounds where espeak-ng cannot speak; `source` says so.
    """
    rng = np.random.default_rng((seed, 2))
    try:
        train = _record(VOICES, _TAKES, "heard", rng)
        holdout = _record(UNHEARD, _TAKES_UNHEARD, "unheard", rng)
    except SpeechUnavailable as error:
        source = f"synthetic tone patterns, since speech is not available here: {error}"
        return Collection("audio", source, _ring(len(VOICES) * _TAKES, "heard", rng), _ring(40, "unheard", rng))
    source = f"spoken digits by espeak-ng ({len(VOICES)} voices to learn from, {len(UNHEARD)} others to ask in)"
    return Collection("audio", source, train, holdout)


def check_voices(voices: Sequence[str]) -> None:
    """Have every voice say one word and compare them.

    Raises SpeechUnavailable naming two voices that sound the same.
    """
    sounds, rate = speak([Line("seven", voice, rate=160, pitch=50) for voice in voices])
    spectra = {voice: _spectrum(sound, rate) for voice, sound in zip(voices, sounds, strict=True)}
    for first, second in itertools.combinations(voices, 2):
        if float(np.abs(spectra[first] - spectra[second]).mean()) < _SAME:
            msg = f"the voices {first} and {second} sound the same"
            raise SpeechUnavailable(msg)


def _spectrum(sound: NDArray[np.float32], rate: int) -> NDArray[np.float64]:
    """Return the long-term log spectrum, shape (32,), bands of 125 Hz up to 4 kHz, loudness removed."""
    power = np.abs(np.fft.rfft(sound, n=rate)) ** 2  # one bin is 1 Hz
    log = np.log(power[:4000].reshape(32, 125).mean(axis=1) + 1e-9)
    return log - log.mean()


def _record(voices: tuple[str, ...], takes: int, prefix: str, rng: np.random.Generator) -> tuple[Specimen, ...]:
    check_voices((*VOICES, *UNHEARD))
    plan = [(voice, digit) for voice in voices for digit in range(10) for _ in range(takes)]
    lines = [
        Line(WORDS[digit], voice, rate=int(rng.integers(125, 215)), pitch=int(rng.integers(25, 76)))
        for voice, digit in plan
    ]
    sounds, rate = speak(lines)
    specimens: list[Specimen] = []
    for at, ((voice, digit), sound) in enumerate(zip(plan, sounds, strict=True)):
        clean = soxr.resample(sound, rate, SAMPLE_RATE).astype(np.float32)
        specimens.append(_specimen(f"{prefix}{at:04d}", _stage(clean, rng), digit, voice, rng))
    return tuple(specimens)


def _specimen(key: str, clip: NDArray[np.float32], digit: int, origin: str, rng: np.random.Generator) -> Specimen:
    out = io.BytesIO()
    soundfile.write(out, clip, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return Specimen(key, out.getvalue(), caption(CAPTIONS, digit, rng), WORDS[digit], origin)


def _stage(sound: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Put a sound, shape (sample,), at a random onset of a one-second clip with room noise and a random loudness."""
    num_samples = round(SAMPLE_RATE * WINDOW_S)
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    word = sound[loud[0] : loud[-1] + 1][:num_samples]
    clip = np.zeros(num_samples, np.float32)
    onset = int(rng.integers(0, num_samples - len(word) + 1))
    clip[onset : onset + len(word)] = word / (float(np.sqrt(np.mean(word**2))) + 1e-9)
    noise_db = rng.uniform(-40.0, -15.0)  # against the word
    white = rng.standard_normal(num_samples)
    brown = np.cumsum(white) * 0.02
    noise = white + rng.uniform(0.0, 1.0) * (brown - brown.mean())
    clip += (10 ** (noise_db / 20) * noise / (noise.std() + 1e-9)).astype(np.float32)
    peak = 10 ** (rng.uniform(-12.0, -1.0) / 20)
    return (clip * (peak / (float(np.abs(clip).max()) + 1e-9))).astype(np.float32)


def _ring(takes: int, prefix: str, rng: np.random.Generator) -> tuple[Specimen, ...]:
    """Make tone patterns: a digit is two glides with their own start and direction, in a random timbre."""
    specimens: list[Specimen] = []
    for at, (digit, _) in enumerate(itertools.product(range(10), range(takes))):
        duration_s = rng.uniform(0.4, 0.7)
        t = np.linspace(0.0, 1.0, round(SAMPLE_RATE * duration_s))
        base = 300 * 2 ** (digit % 5 / 2.5) * rng.uniform(0.95, 1.05)
        bend = 1.6 if digit < 5 else 1 / 1.6
        frequency = base * np.where(t < 0.5, bend ** (2 * t), bend ** (2 - 2 * t) * 1.25)
        phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
        overtones = rng.uniform(0.1, 0.6, size=3)
        sound = np.sin(phase) + sum(share * np.sin((n + 2) * phase) for n, share in enumerate(overtones))
        clip = _stage((sound * np.hanning(len(t))).astype(np.float32), rng)
        specimens.append(_specimen(f"{prefix}{at:04d}", clip, digit, "tone pattern", rng))
    return tuple(specimens)
