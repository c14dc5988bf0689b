"""How media are prepared for a tower that was trained elsewhere, as far as that differs from our own way.

Every field is read from the files of a checkpoint when it is imported. Where a tokeniser has `processing`, what that
says holds instead of the tokeniser's own fields of the same purpose.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from service.contract.word import Real, Word

_Side = Annotated[StrictInt, Field(ge=1, le=4096)]


class ImageProcessing(Word):
    """Resize, cut out the centre, and keep as many whole patches as fit, from the top left corner."""

    shortest_edge: Annotated[_Side | None, Field(description="the short side becomes this, the shape stays")] = None
    squash: Annotated[_Side | None, Field(description="both sides become this, whatever the shape was")] = None
    crop: Annotated[_Side | None, Field(description="side of the centre square; what is missing is black")] = None
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"

    @model_validator(mode="after")
    def _ends_in_a_square(self) -> ImageProcessing:
        if (self.shortest_edge is None) == (self.squash is None):
            msg = "one of shortest_edge and squash says how pictures are resized"
            raise ValueError(msg)
        if self.squash is None and self.crop is None:
            msg = "a picture that keeps its shape needs a crop"
            raise ValueError(msg)
        return self

    @property
    def side(self) -> int:
        """Height and width of what comes out, in pixels."""
        side = self.crop or self.squash
        assert side is not None
        return side


class TextProcessing(Word):
    """The checkpoint's own vocabulary and special ids: `method`, `vocab` and `lowercase` beside it say nothing."""

    lowercase: StrictBool = False
    canonical: Annotated[
        StrictBool, Field(description="ASCII punctuation goes, every run of white space becomes one space")
    ] = False
    pad: Annotated[
        Literal["left", "right"] | None, Field(description="fill up to max_length on this side; null: do not")
    ] = None
    pad_id: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] = 0


class AudioProcessing(Word):
    """Log-mel levels in decibels of full scale, one frame a token; a short sound is filled up to the whole window."""

    fft: Annotated[StrictInt, Field(ge=16, le=65_536, description="samples in a frame")]
    hop: Annotated[StrictInt, Field(ge=1, le=65_536, description="samples between frames")]
    min_hz: Annotated[Real, Field(ge=0, le=96_000)]
    max_hz: Annotated[Real, Field(gt=0, le=96_000)]
    scale: Annotated[Literal["htk", "slaney"], Field(description="slaney: bands of equal area too")]
    fill: Annotated[
        Literal["repeat", "repeatpad", "pad"],
        Field(description="repeat: over and over; repeatpad: as often as it fits, then silence; pad: silence"),
    ] = "repeatpad"
    fused: Annotated[
        StrictBool,
        Field(description="four pictures: the whole sound, shrunk, and a window out of each third of what is long"),
    ] = False
