"""How the raw media of a modality become tokens: the closed union `TokeniserConfig`.

A modality itself is a free name. What is closed is the list of media that we can read. A token is a discrete id or a
continuous vector, and a tokeniser turns one item into one or more sequences of them.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from service.contract.processing import AudioProcessing, ImageProcessing, TextProcessing
from service.contract.word import Real, Word

Medium = Literal["image", "text", "audio", "discrete", "continuous"]
Seconds = Annotated[Real, Field(gt=0, le=600)]
MAX_AUDIO_LENGTH: Final = 8192  # tokens in a window, as in a sequence of any other medium


class ImageTokens(Word):
    """Cut an image into square patches of uint8 pixels: one token is `patch * patch * channels` values."""

    kind: Literal["image"] = "image"
    size: Annotated[
        StrictInt, Field(ge=4, le=1024, description="height and width after resize and centre crop, pixels")
    ] = 224
    patch: Annotated[StrictInt, Field(ge=1, le=256, description="side of a patch, pixels")] = 32
    channels: Annotated[StrictInt, Field(description="1 for grey, 3 for RGB")] = 3
    resize: Annotated[
        Literal["crop", "squash", "pad"],
        Field(description="crop: short side to size, centre crop; squash: ignore the aspect; pad: long side to size"),
    ] = "crop"
    processing: Annotated[
        ImageProcessing | None, Field(description="of a tower that was imported; null: ours, by resize")
    ] = None

    @model_validator(mode="after")
    def _patches_fit(self) -> ImageTokens:
        if self.size % self.patch:
            msg = f"size {self.size} is not a multiple of patch {self.patch}"
            raise ValueError(msg)
        if self.channels not in {1, 3}:
            msg = "channels is 1 or 3"
            raise ValueError(msg)
        if self.processing is not None and self.size != self.processing.side // self.patch * self.patch:
            msg = f"size {self.size} is not what whole patches of {self.patch} cover of {self.processing.side} pixels"
            raise ValueError(msg)
        return self

    @property
    def dim(self) -> int:
        """Values in a token."""
        return self.patch * self.patch * self.channels

    @property
    def max_length(self) -> int:
        """Tokens in a sequence."""
        return (self.size // self.patch) ** 2


class TextTokens(Word):
    """Turn text into ids: byte-level BPE trained on the captions, or plain bytes."""

    kind: Literal["text"] = "text"
    method: Annotated[
        Literal["auto", "bpe", "bytes"],
        Field(description="auto: bytes when the captions are too few to learn merges from"),
    ] = "auto"
    vocab: Annotated[StrictInt, Field(ge=260, le=262_144, description="entries, the four special ones included")] = 8192
    max_length: Annotated[StrictInt, Field(ge=3, le=8192, description="ids in a sequence, start and end included")] = 64
    lowercase: StrictBool = True
    processing: Annotated[
        TextProcessing | None, Field(description="of a tower that was imported; null: ours, learned from captions")
    ] = None


class AudioTokens(Word):
    """Turn sound into log-mel patches: one token is `frames * mels` values in float32."""

    kind: Literal["audio"] = "audio"
    sample_rate: Annotated[StrictInt, Field(ge=4000, le=96_000, description="Hz, after resampling")] = 16_000
    window_s: Annotated[Seconds, Field(description="seconds of sound in one sequence")] = 1.0
    mels: Annotated[StrictInt, Field(ge=8, le=256, description="mel bands")] = 64
    frame_ms: Annotated[Real, Field(gt=1, le=200, description="length of a frame, milliseconds")] = 25.0
    hop_ms: Annotated[Real, Field(gt=1, le=100, description="distance between frames, milliseconds")] = 10.0
    frames: Annotated[StrictInt, Field(ge=1, le=64, description="frames in one token")] = 4
    windows: Annotated[
        StrictInt,
        Field(
            ge=1,
            le=32,
            description="1: the centre of the clip; n: n windows spread over it, mean of their unit vectors",
        ),
    ] = 1

    processing: Annotated[AudioProcessing | None, Field(description="of a tower that was imported; null: ours")] = None

    @model_validator(mode="after")
    def _window_is_a_sequence(self) -> AudioTokens:
        if self.max_length > MAX_AUDIO_LENGTH:
            msg = f"a window of {self.max_length} tokens is longer than {MAX_AUDIO_LENGTH}: raise frames or hop_ms"
            raise ValueError(msg)
        if self.processing is not None and self.frames != 1:
            msg = "frames is 1 with processing: one frame is one token"
            raise ValueError(msg)
        return self

    @property
    def num_samples(self) -> int:
        """Samples in a window."""
        return round(self.sample_rate * self.window_s)

    @property
    def dim(self) -> int:
        """Values in a token."""
        return self.frames * self.mels * (4 if self.processing is not None and self.processing.fused else 1)

    @property
    def max_length(self) -> int:
        """Tokens in a sequence (the last may be padded)."""
        if self.processing is not None:
            return 1 + self.num_samples // self.processing.hop
        hop = max(1, round(self.sample_rate * self.hop_ms / 1000))
        num_frames = max(1, -(-round(self.sample_rate * self.window_s) // hop))
        return -(-num_frames // self.frames)


class DiscreteTokens(Word):
    """Take ids that the caller made: VQ or codec codes, tree leaves, any alphabet."""

    kind: Literal["discrete"] = "discrete"
    vocab: Annotated[StrictInt, Field(ge=2, le=1_048_576, description="ids lie in [0, vocab)")]
    max_length: Annotated[StrictInt, Field(ge=1, le=8192)]


class ContinuousTokens(Word):
    """Take vectors that the caller made: sensor readings, states, features."""

    kind: Literal["continuous"] = "continuous"
    dim: Annotated[StrictInt, Field(ge=1, le=65_536, description="values in a token")]
    max_length: Annotated[StrictInt, Field(ge=1, le=8192)]


TokeniserConfig = Annotated[
    ImageTokens | TextTokens | AudioTokens | DiscreteTokens | ContinuousTokens, Field(discriminator="kind")
]


def medium_of(config: TokeniserConfig) -> Medium:
    """Name the medium that a tokeniser reads."""
    return config.kind
