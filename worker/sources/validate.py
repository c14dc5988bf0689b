"""Validation: every value is really decoded, and becomes the payload that a data set keeps, with what was measured."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never, cast

import numpy as np

from service.contract.errors import Invalid
from service.contract.tokens import decode

if TYPE_CHECKING:
    from service.contract.modality import Medium
    from worker.sources.sample import Value

MAX_TEXT_BYTES: Final = 1 << 20
MAX_TOKENS: Final = 1 << 20
MAX_ID: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Checked:
    """A payload in the form of its medium, and its figures, each named with its unit."""

    medium: Medium
    payload: bytes
    figures: dict[str, float]


def check(value: Value, limits: decode.Limits) -> Checked:
    """Decode a value in full.

    Raises Invalid or UnsupportedMedia with the reason if it is not what it should be.
    """
    match value.kind:
        case "image":
            data = cast("bytes", value.data)
            width, height = decode.picture(data, limits).size
            return Checked("image", data, {"width_px": width, "height_px": height})
        case "audio":
            data = cast("bytes", value.data)
            return Checked("audio", data, _sound_figures(data, limits))
        case "text":
            text = text_of(value.data)
            return Checked("text", text.encode(), {"characters": len(text)})
        case "npy":
            return _tokens(decode.array(cast("bytes", value.data)))
        case "json":
            return _tokens(_array(_parsed(cast("bytes", value.data))))
        case "list":
            return _tokens(_array(value.data))
        case _:
            assert_never(value.kind)


def text_of(data: object) -> str:
    """Read text.

    Raises Invalid unless it is UTF-8, not empty, without NUL, and of at most a megabyte.
    """
    if isinstance(data, bytes):
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Invalid(f"not UTF-8 at byte {error.start}") from error
    else:
        text = cast("str", data)
    if not text.strip():
        raise Invalid("empty")
    if "\0" in text:
        raise Invalid("there is a NUL character in it")
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise Invalid("not UTF-8: there is half of a surrogate pair in it") from error
    if num_bytes > MAX_TEXT_BYTES:
        raise Invalid(f"{num_bytes} bytes of text and the limit is {MAX_TEXT_BYTES}")
    return text


def _sound_figures(data: bytes, limits: decode.Limits) -> dict[str, float]:
    sound = decode.sound(data, limits)
    num_samples = sum(len(block) for block in sound.blocks)
    return {"seconds": num_samples / sound.sample_rate, "sample_rate_hz": sound.sample_rate}


def _parsed(data: bytes) -> object:
    try:
        return cast("object", json.loads(data))
    except (ValueError, RecursionError) as error:
        raise Invalid("not JSON") from error


def _array(data: object) -> np.ndarray:
    """Turn lists into an array; JSON's whole numbers are floats where any of them is."""
    if isinstance(data, np.ndarray):
        return cast("np.ndarray", data)
    if not isinstance(data, list) or not data:
        raise Invalid("no list of numbers")
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError) as error:
        raise Invalid("the rows differ in length") from error
    if array.dtype.kind not in "iuf":
        raise Invalid("not all of it is numbers")
    return array


def _tokens(array: np.ndarray) -> Checked:
    """Make discrete tokens of whole numbers (n,), continuous ones of an array (n, dim)."""
    if array.dtype.kind not in "iuf":
        raise Invalid(f"an array of {array.dtype}, not of numbers")
    if array.size == 0:
        raise Invalid("empty")
    if array.ndim and len(array) > MAX_TOKENS:
        raise Invalid(f"{len(array)} tokens and the limit is {MAX_TOKENS}")
    if array.ndim == 1 and array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > MAX_ID:
            raise Invalid(f"ids lie in 0 to {MAX_ID}; there is {low} to {high}")
        return Checked("discrete", _npy(array.astype(np.int32)), {"tokens": len(array), "max_id": high})
    if array.ndim != 2:
        raise Invalid(f"an array of {array.dtype} with shape {array.shape}: tokens are whole (n,) or real (n, dim)")
    with np.errstate(over="ignore"):
        vectors = array.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise Invalid("a value is NaN, infinite or beyond float32")
    return Checked("continuous", _npy(vectors), {"tokens": len(vectors), "dim": vectors.shape[1]})


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()
