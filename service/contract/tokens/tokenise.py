"""Raw media to tokens: the one way in, for the API and for the worker."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, assert_never, final

import numpy as np
from jaxtyping import Float32, UInt8

from service.contract.errors import Invalid
from service.contract.modality import (
    AudioTokens,
    ContinuousTokens,
    DiscreteTokens,
    ImageTokens,
    Medium,
    TextTokens,
    TokeniserConfig,
)
from service.contract.tokens import audio, decode, image, sequence, text
from service.contract.tokens.decode import DEFAULT_LIMITS, Limits


@dataclass(frozen=True, slots=True)
class TextRaw:
    """Text."""

    text: str


@dataclass(frozen=True, slots=True)
class EncodedRaw:
    """A file's bytes: an image or a sound in a format that we read, or an npy array of tokens."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PixelsRaw:
    """A decoded image, upright: grey, RGB or RGBA."""

    array: UInt8[np.ndarray, "height width *channel"]


@dataclass(frozen=True, slots=True)
class WaveRaw:
    """A decoded sound: one channel, samples in [-1, 1]."""

    array: Float32[np.ndarray, " sample"]
    sample_rate: int


@dataclass(frozen=True, slots=True)
class ReadyRaw:
    """Tokens made before: ids (token,) of whole numbers, or vectors (token, value)."""

    array: np.ndarray


Raw = TextRaw | EncodedRaw | PixelsRaw | WaveRaw | ReadyRaw


@dataclass(frozen=True, slots=True)
class Change:
    """How a training run alters an item between its decoding and its tokens; where it says None nothing is altered."""

    fit: image.Fit | None = None
    zoom: float = 1.0
    """At most this many times larger than by default does `fit` show a part of a picture."""
    cut: audio.Cut | None = None


UNCHANGED: Final = Change()
Sequences = list[np.ndarray]
"""Usually one sequence, several for windowed sound: ids int32 (token,), or uint8 or float32 (token, value)."""


@final
class Tokeniser:
    """Turn items of one modality into tokens. Safe to share between threads and to send to another process."""

    def __init__(self, config: TokeniserConfig, limits: Limits, vocabulary: text.Vocabulary | None) -> None:
        self.config = config
        self.limits = limits
        self.vocabulary = vocabulary

    def __call__(self, raw: Raw, *, truncate: bool = False, change: Change = UNCHANGED) -> Sequences:
        """Tokenise one item; `truncate` cuts text and ready sequences that are too long instead of refusing them.

        `change` acts on encoded media, which are decoded here.

        Raises Invalid, or UnsupportedMedia for files of a kind that we do not read.
        """
        config = self.config
        match config:
            case ImageTokens():
                return [self._image(raw, config, change)]
            case TextTokens():
                return [self._text(raw, config, truncate=truncate)]
            case AudioTokens():
                return self._audio(raw, config, change)
            case DiscreteTokens():
                return [sequence.discrete(_values(raw, "ids"), config, truncate=truncate)]
            case ContinuousTokens():
                return [sequence.continuous(_values(raw, "vectors"), config, truncate=truncate)]
            case _:
                assert_never(config)

    @property
    def vocab_size(self) -> int | None:
        """Number of ids, or None where tokens are vectors."""
        if self.vocabulary is not None:
            return self.vocabulary.size
        return self.config.vocab if isinstance(self.config, DiscreteTokens) else None

    def _image(self, raw: Raw, config: ImageTokens, change: Change) -> np.ndarray:
        match raw:
            case EncodedRaw(data):
                draft = image.draft_side(config, change.zoom)
                return image.patches(decode.picture(data, self.limits, draft=draft), config, change.fit)
            case PixelsRaw(array):
                picture = image.from_pixels(array)
                decode.check_pixels(*picture.size, self.limits)
                return image.patches(picture, config)
            case ReadyRaw(array):
                return image.ready(array, config)
            case TextRaw() | WaveRaw():
                raise Invalid("this modality takes an image")
            case _:
                assert_never(raw)

    def _text(self, raw: Raw, config: TextTokens, *, truncate: bool) -> np.ndarray:
        assert self.vocabulary is not None  # build() loads one for text
        match raw:
            case TextRaw(string):
                return text.encode(string, self.vocabulary, config, truncate=truncate)
            case ReadyRaw(array):
                return text.ready(array, self.vocabulary, config, truncate=truncate)
            case EncodedRaw() | PixelsRaw() | WaveRaw():
                raise Invalid("this modality takes text")
            case _:
                assert_never(raw)

    def _audio(self, raw: Raw, config: AudioTokens, change: Change) -> Sequences:
        match raw:
            case EncodedRaw(data):
                sound = decode.sound(data, self.limits)
                return audio.tokens(sound.blocks, sound.sample_rate, config, change.cut)
            case WaveRaw(array, sample_rate):
                return audio.tokens(_wave_blocks(array, sample_rate, self.limits), sample_rate, config)
            case ReadyRaw(array):
                return [audio.ready(array, config)]
            case TextRaw() | PixelsRaw():
                raise Invalid("this modality takes a sound")
            case _:
                assert_never(raw)


def build(config: TokeniserConfig, files: Mapping[str, bytes], limits: Limits = DEFAULT_LIMITS) -> Tokeniser:
    """Build the tokeniser of a modality; `files` is what `text.train` returned for text, else empty.

    Raises Invalid if the files are not a tokeniser's.
    """
    return Tokeniser(config, limits, text.load(files) if isinstance(config, TextTokens) else None)


def payload_to_raw(medium: Medium, payload: bytes) -> Raw:
    """Wrap a sample of a data set: encoded bytes, UTF-8 text, or an npy array of tokens.

    Raises Invalid if text is not UTF-8 or an array cannot be read.
    """
    match medium:
        case "image" | "audio":
            return EncodedRaw(payload)
        case "text":
            try:
                return TextRaw(payload.decode())
            except UnicodeDecodeError as error:
                raise Invalid("the text is not UTF-8") from error
        case "discrete" | "continuous":
            return ReadyRaw(decode.array(payload))
        case _:
            assert_never(medium)


def num_tokens(sequences: Iterable[np.ndarray]) -> int:
    """Count the tokens of an item."""
    return sum(map(len, sequences))


def _values(raw: Raw, what: str) -> np.ndarray:
    match raw:
        case ReadyRaw(array):
            return array
        case EncodedRaw(data):
            return decode.array(data)
        case TextRaw() | PixelsRaw() | WaveRaw():
            raise Invalid(f"this modality takes tokens: {what}")
        case _:
            assert_never(raw)


def _wave_blocks(
    wave: Float32[np.ndarray, " sample"], sample_rate: int, limits: Limits
) -> Iterable[Float32[np.ndarray, " sample"]]:
    if wave.ndim != 1 or not len(wave):
        raise Invalid(f"a sound has shape (samples,) and at least one of them, not {wave.shape}")
    decode.check_rate(sample_rate)
    decode.check_seconds(len(wave), sample_rate, limits)
    decode.check_samples(wave)
    # In the blocks of the decoder, so that a file and its samples give the same tokens to the last bit.
    starts = range(0, len(wave), decode.BLOCK)
    return [wave[start:end] for start, end in itertools.zip_longest(starts, starts[1:])]
