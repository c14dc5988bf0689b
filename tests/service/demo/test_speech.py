from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import soundfile

from service.demo import speech
from service.demo.espeak import Line, SpeechUnavailable, speak

try:
    speak([Line("one", "en", 160, 50)])
except SpeechUnavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)


def test_every_voice_sounds_different() -> None:
    speech.check_voices((*speech.VOICES, *speech.UNHEARD))


def test_a_voice_that_is_another_one_under_a_second_name_is_noticed() -> None:
    with pytest.raises(SpeechUnavailable, match="en and gmw/en sound the same"):
        speech.check_voices(("en", "gmw/en"))


@pytest.mark.parametrize("voice", ["en+nobody", "xx-nowhere"])
def test_a_missing_voice_is_an_error_and_not_the_voice_before(voice: str) -> None:
    with pytest.raises(SpeechUnavailable, match="no voice"):
        speak([Line("one", "en", 160, 50), Line("one", voice, 160, 50)])


def test_the_same_lines_give_the_same_samples_in_another_process() -> None:
    lines = [Line("seven", "en+f2", 150, 60), Line("two", "en-us", 180, 40)]
    (first, rate), (second, _) = speak(lines), speak(lines)
    assert rate == 22_050
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_spoken_digits_are_balanced_clips_of_a_second_and_the_questions_come_in_unheard_voices() -> None:
    collection = speech.collect(0)
    assert "espeak-ng" in collection.source
    assert set(Counter(each.label for each in collection.train).values()) == {len(speech.VOICES) * 12}
    assert len(collection.holdout) == 400
    heard = {each.origin for each in collection.train}
    unheard = {each.origin for each in collection.holdout}
    assert heard == set(speech.VOICES)
    assert unheard == set(speech.UNHEARD)
    assert not heard & unheard
    for specimen in collection.train[::100]:
        wave, rate = soundfile.read(io.BytesIO(specimen.payload), dtype="float32")
        assert (rate, wave.shape) == (16_000, (16_000,))
        assert 0.2 < np.abs(wave).max() < 1.0
        assert specimen.label in specimen.caption
    assert len({each.caption for each in collection.train}) == 60


def test_where_nothing_can_speak_sounds_are_made_and_the_source_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "VOICES", ("en", "xx-nowhere"))
    collection = speech.collect(0)
    assert collection.source.startswith("synthetic tone patterns")
    assert "xx-nowhere" in collection.source
    assert len(collection.holdout) == 400
    assert {each.label for each in collection.train} == {each.label for each in collection.holdout}
