"""Items of a request to raw media: which modality an item belongs to, and what lies in it.

A modality that is named wins. Otherwise the medium decides, if exactly one of the model's modalities has that medium.
Nothing is guessed from the content: a string is text unless all of it is a data: URI or the request says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, assert_never

import numpy as np
from jaxtyping import Float32

from service.contract.errors import Invalid, IsthmusError, UnsupportedMedia
from service.contract.items import (
    AnyPlainItem,
    AudioItem,
    EmbeddingItem,
    ImageItem,
    MediaUrl,
    Number,
    Tensor,
    TensorItem,
    TextItem,
    TokensItem,
)
from service.contract.modality import Medium, TokeniserConfig
from service.contract.tokens.decode import Limits, check_pixels, check_seconds
from service.contract.tokens.tokenise import EncodedRaw, PixelsRaw, Raw, ReadyRaw, TextRaw, WaveRaw
from service.contract.tokens.uri import DataUri, data_uri, strict_base64

Modalities = Mapping[str, TokeniserConfig]
Vector = Float32[np.ndarray, " value"]
"""A vector made earlier: finite, of any length."""
INT32: Final = np.iinfo(np.int32)


def read_item(
    item: AnyPlainItem, *, modalities: Modalities, limits: Limits, modality_hint: str | None = None
) -> tuple[str, Raw | Vector]:
    """Find an item's modality among those of a model, and read what it holds.

    `modality_hint` says what bare strings are: for a modality of images or sounds they are data: URIs or base64, for
    text they are text, whatever they look like. It also settles which modality an item means that names none, where its
    medium fits. Encoded media are not decoded here. Raises Invalid or UnsupportedMedia, with the place in the item as
    `param`.
    """
    if modality_hint is not None:
        _config(modality_hint, modalities, "modality")
    match item:
        case str():
            return _string(item, modalities, modality_hint)
        case list():
            return _ids(item, modalities, modality_hint)
        case TextItem():
            return _resolve("text", modalities, item.modality, modality_hint), TextRaw(item.text)
        case ImageItem():
            return _resolve("image", modalities, item.modality, modality_hint), _media(item.image, "image")
        case AudioItem():
            return _resolve("audio", modalities, item.modality, modality_hint), _media(item.audio, "audio")
        case TokensItem():
            _config(item.modality, modalities, "modality")
            return item.modality, ReadyRaw(_tokens(item.tokens))
        case TensorItem():
            return item.modality, _tensor(item, _config(item.modality, modalities, "modality"), limits)
        case EmbeddingItem():
            _config(item.modality, modalities, "modality")
            return item.modality, _float32(item.embedding, "embedding")
        case _:
            assert_never(item)


def _string(item: str, modalities: Modalities, hint: str | None) -> tuple[str, Raw]:
    if hint is not None:
        match modalities[hint].kind:
            case "text":
                return hint, TextRaw(item)
            case "image" | "audio" as medium:
                return hint, _encoded(item, medium)
            case "discrete" | "continuous" as medium:
                raise Invalid(f"{hint!r} takes {medium} tokens, not a string")
    uri = data_uri(item)
    if uri is None:
        return _resolve("text", modalities, None, None), TextRaw(item)
    medium = _medium_of(uri)
    modality = _resolve(medium, modalities, None, None)
    if medium != "text":
        return modality, EncodedRaw(uri.data)
    try:
        return modality, TextRaw(uri.data.decode())
    except UnicodeDecodeError as error:
        raise Invalid("the text in the data: URI is not UTF-8") from error


def _medium_of(uri: DataUri) -> Medium:
    match uri.media_type.partition("/"):
        case ("image", _, _):
            return "image"
        case ("audio", _, _):
            return "audio"
        case ("text", _, "plain"):
            return "text"
        case _:
            raise UnsupportedMedia(f"a data: URI holds image/*, audio/* or text/plain, not {uri.media_type}")


def _media(value: str | MediaUrl, medium: Medium) -> Raw:
    try:
        if isinstance(value, MediaUrl):
            raise Invalid("fetching is not enabled: send the data itself", code="fetching_disabled")
        return _encoded(value, medium)
    except IsthmusError as error:
        error.at(medium)
        raise


def _encoded(string: str, medium: Medium) -> EncodedRaw:
    if string[:8].lower().startswith(("http://", "https://")):
        raise Invalid("fetching is not enabled: send the data itself", code="fetching_disabled")
    uri = data_uri(string)
    if uri is None:
        return EncodedRaw(strict_base64(string))
    # Only the medium is held against the URI: clients write image/jpeg on every image, and the signature decides.
    if not uri.media_type.startswith(f"{medium}/"):
        raise Invalid(f"the data: URI holds {uri.media_type}, not {medium}/*")
    return EncodedRaw(uri.data)


def _ids(item: list[int], modalities: Modalities, hint: str | None) -> tuple[str, Raw]:
    if hint is not None and modalities[hint].kind in {"text", "discrete"}:
        return hint, ReadyRaw(_tokens(item))
    return _resolve("text", modalities, None, None), ReadyRaw(_tokens(item))


def _resolve(medium: Medium, modalities: Modalities, named: str | None, hint: str | None) -> str:
    if named is not None:
        config = _config(named, modalities, "modality")
        if config.kind != medium:
            raise Invalid(f"{named!r} takes {config.kind}, not {medium}", param="modality")
        return named
    if hint is not None and modalities[hint].kind == medium:
        return hint
    match [name for name, config in modalities.items() if config.kind == medium]:
        case [only]:
            return only
        case []:
            raise Invalid(f"the model takes no {medium}; it has {_names(modalities)}")
        case several:
            raise Invalid(f"say which modality is meant: {', '.join(map(repr, several))} all take {medium}")


def _config(name: str, modalities: Modalities, param: str) -> TokeniserConfig:
    if name not in modalities:
        raise Invalid(f"the model has no modality {name!r}; it has {_names(modalities)}", param=param)
    return modalities[name]


def _names(modalities: Modalities) -> str:
    return ", ".join(f"{name} ({config.kind})" for name, config in sorted(modalities.items())) or "none"


def _tokens(values: list[int] | list[list[Number]]) -> np.ndarray:
    rows = [value for value in values if isinstance(value, list)]
    if not rows:
        if not all(isinstance(value, int) and 0 <= value <= INT32.max for value in values):
            raise Invalid(f"an id lies in 0 to {INT32.max}", param="tokens")
        return np.asarray(values, np.int32)
    if len(rows) < len(values) or len({len(row) for row in rows}) > 1:
        raise Invalid("the vectors are not all of one length", param="tokens")
    return _float32(rows, "tokens")


def _float32(values: list[Number] | list[list[Number]], param: str) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values, np.float64).astype(np.float32)
    except OverflowError as error:
        raise Invalid("a number is beyond float32", param=param, code="not_finite") from error
    if not np.isfinite(array).all():
        raise Invalid("a number is NaN, infinite or beyond float32", param=param, code="not_finite")
    return array


def _tensor(item: TensorItem, config: TokeniserConfig, limits: Limits) -> Raw:
    shape = tuple(item.tensor.shape)
    match config.kind:
        case "image":
            if len(shape) not in {2, 3}:
                raise Invalid(f"an image has shape (h, w) or (h, w, channel), not {shape}", param="tensor.shape")
            check_pixels(shape[1], shape[0], limits)
            return PixelsRaw(_pixels(_array(item.tensor)))
        case "audio":
            if item.sample_rate is None:
                raise Invalid("a sound needs its sample_rate", param="sample_rate")
            if len(shape) != 1:
                raise Invalid(f"a sound has shape (samples,), not {shape}", param="tensor.shape")
            check_seconds(shape[0], item.sample_rate, limits)
            return WaveRaw(_samples(_array(item.tensor)), item.sample_rate)
        case "text" | "discrete":
            if len(shape) != 1:
                raise Invalid(f"ids have shape (tokens,), not {shape}", param="tensor.shape")
            return ReadyRaw(_int32(_array(item.tensor)))
        case "continuous":
            with np.errstate(over="ignore"):
                return ReadyRaw(_array(item.tensor).astype(np.float32))


def _array(tensor: Tensor) -> np.ndarray:
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    try:
        data = strict_base64(tensor.data)
    except Invalid as error:
        error.at("tensor.data")
        raise
    expected = math.prod(tensor.shape) * dtype.itemsize
    if len(data) != expected:
        raise Invalid(
            f"{len(data)} bytes of data, and {tensor.dtype} of shape {tuple(tensor.shape)} needs {expected}",
            param="tensor.data",
        )
    return np.frombuffer(data, dtype).reshape(tensor.shape)


def _pixels(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind != "f":
        raise Invalid(f"pixels are uint8, or floats from 0 to 1, not {values.dtype}", param="tensor.dtype")
    if not ((values >= 0) & (values <= 1)).all():
        raise Invalid("pixels in floating point lie in 0 to 1", param="tensor.data")
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def _samples(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.int16:
        return values.astype(np.float32) / 32_768
    if values.dtype.kind != "f":
        raise Invalid(f"samples are int16 or floats, not {values.dtype}", param="tensor.dtype")
    return values.astype(np.float32)


def _int32(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise Invalid(f"ids are whole numbers, not {values.dtype}", param="tensor.dtype")
    if values.min() < 0 or values.max() > INT32.max:
        raise Invalid(f"an id lies in 0 to {INT32.max}", param="tensor.data")
    return values.astype(np.int32)
