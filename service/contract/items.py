"""The items that a request carries: text, image, audio, ready tokens, a tensor, a vector made earlier, a sum of such.

One callable discriminator decides what an item is, so a bad item gives one error at its own place.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, StrictFloat, StrictInt, StrictStr, Tag, model_validator

from service.contract.word import ModalityName, Real, Word

Base64 = Annotated[StrictStr, Field(description="base64, or a data: URI")]
TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Number = StrictFloat | StrictInt
Vector = Annotated[list[Number], Field(fail_fast=True, min_length=1)]


class MediaUrl(Word):
    """A place to fetch a medium from; refused unless fetching is enabled."""

    url: Annotated[StrictStr, Field(max_length=2048)]


class TextItem(Word):
    """Text, never looked at for anything else."""

    text: StrictStr
    modality: Annotated[ModalityName | None, Field(description="null: the model's only text modality")] = None


class ImageItem(Word):
    """An encoded image: PNG, JPEG or WebP."""

    image: Base64 | MediaUrl
    modality: ModalityName | None = None


class AudioItem(Word):
    """An encoded sound: WAV, FLAC, OGG or MP3."""

    audio: Base64 | MediaUrl
    modality: ModalityName | None = None


class TokensItem(Word):
    """Tokens made by the caller: a list of ids, or a list of vectors."""

    modality: ModalityName
    tokens: Annotated[
        Annotated[list[TokenId], Field(fail_fast=True)] | Annotated[list[Vector], Field(fail_fast=True)],
        Field(min_length=1),
    ]


class Tensor(Word):
    """An array: little-endian, row-major, base64."""

    dtype: Literal["uint8", "int16", "int32", "int64", "float16", "float32"]
    shape: Annotated[list[Annotated[StrictInt, Field(ge=1, le=2**31)]], Field(min_length=1, max_length=4)]
    data: StrictStr


class TensorItem(Word):
    """A decoded medium: an image as (height, width) or (height, width, channel), a sound as (sample,), or vectors."""

    modality: ModalityName
    tensor: Tensor
    sample_rate: Annotated[StrictInt | None, Field(ge=1000, le=768_000, description="Hz, for sound")] = None


class EmbeddingItem(Word):
    """A vector made earlier by the same model."""

    modality: ModalityName
    embedding: Annotated[list[Number], Field(fail_fast=True, min_length=1, max_length=16_384)]


def _plain_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    if isinstance(value, list):
        return "ids"
    if isinstance(value, dict):
        for tag in ("text", "image", "audio", "tokens", "tensor", "embedding"):
            if tag in value:
                return tag
        return None
    by_class: dict[type, str] = {
        TextItem: "text",
        ImageItem: "image",
        AudioItem: "audio",
        TokensItem: "tokens",
        TensorItem: "tensor",
        EmbeddingItem: "embedding",
    }
    return by_class.get(type(cast("object", value)))


_Plain = (
    Annotated[StrictStr, Tag("string")]
    | Annotated[list[TokenId], Field(fail_fast=True), Tag("ids")]
    | Annotated[TextItem, Tag("text")]
    | Annotated[ImageItem, Tag("image")]
    | Annotated[AudioItem, Tag("audio")]
    | Annotated[TokensItem, Tag("tokens")]
    | Annotated[TensorItem, Tag("tensor")]
    | Annotated[EmbeddingItem, Tag("embedding")]
)
PlainItem = Annotated[
    _Plain,
    Discriminator(
        _plain_tag,
        custom_error_type="item",
        custom_error_message=(
            "a part of a sum is no sum itself: it is a string, a list of token ids, or an object with one of: "
            "text, image, audio, tokens, tensor, embedding"
        ),
    ),
]
"""One item that has a vector of its own."""


class SumPart(Word):
    """A part of a sum."""

    item: PlainItem
    weight: Annotated[Real, Field(description="may be negative")] = 1.0


class SumItem(Word):
    """A weighted sum of the vectors of other items, of any modalities of one space; unit length again for the cosine.

    A sum takes part as one modality, whose pair gives the scale. That is `modality`; where it is null, what the request
    says its items are, or where the leg that it stands at begins or ends; else the modality that all its parts have.
    """

    sum: Annotated[list[SumPart], Field(fail_fast=True, min_length=1, max_length=64)]
    modality: ModalityName | None = None

    @model_validator(mode="after")
    def _weighs_something(self) -> SumItem:
        if not any(part.weight for part in self.sum):
            msg = "all weights are zero: nothing is left of the sum"
            raise ValueError(msg)
        return self


def _tag(value: Any) -> str | None:
    if isinstance(value, SumItem) or (isinstance(value, dict) and "sum" in value):
        return "sum"
    return _plain_tag(value)


Item = Annotated[
    _Plain | Annotated[SumItem, Tag("sum")],
    Discriminator(
        _tag,
        custom_error_type="item",
        custom_error_message=(
            "an item is a string, a list of token ids, or an object with one of: "
            "text, image, audio, tokens, tensor, embedding, sum"
        ),
    ),
]
"""One item of a request: a string is text unless all of it is a data: URI, a bare list of integers is text ids."""


def _one_or_many(value: Any) -> str:
    if isinstance(value, list) and not (value and all(isinstance(entry, int) for entry in cast("list[object]", value))):
        return "many"
    return "one"


Items = Annotated[
    Annotated[Item, Tag("one")] | Annotated[list[Item], Field(fail_fast=True, min_length=1), Tag("many")],
    Discriminator(_one_or_many),
]
"""One item or a list of them."""

AnyPlainItem = str | list[int] | TextItem | ImageItem | AudioItem | TokensItem | TensorItem | EmbeddingItem
AnyItem = AnyPlainItem | SumItem


def as_list(items: AnyItem | list[AnyItem]) -> list[AnyItem]:
    """Return a request's items as a list, whichever way they were given."""
    if isinstance(items, list) and not (items and all(isinstance(entry, int) for entry in items)):
        return items  # pyright: ignore[reportReturnType]  # a list whose entries are not all ints is a list of items
    return [items]  # pyright: ignore[reportReturnType]
