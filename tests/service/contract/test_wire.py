from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from service.contract.errors import (
    Conflict,
    Invalid,
    IsthmusError,
    Malformed,
    NotFound,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from service.contract.wire import ComposeCall, call_adapter, pack, pack_error, unpack, unpack_error

MODEL = {"artifact": "models/a/1", "digest": "0" * 64}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64])
def test_arrays_come_back_as_they_were(dtype: Any) -> None:
    arrays = {"a": np.arange(12).astype(dtype).reshape(3, 4), "b": np.zeros((0, 5), dtype), "c": np.array([1], dtype)}
    document, found = unpack(pack({"op": "é", "list": [1, None]}, arrays))
    assert document == {"op": "é", "list": [1, None]}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_arrays_that_do_not_lie_in_order_are_laid_so() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    _, found = unpack(pack({}, {"a": array.T, "b": array[:, ::2]}))
    np.testing.assert_array_equal(found["a"], array.T)
    np.testing.assert_array_equal(found["b"], array[:, ::2])


def test_no_prefix_of_a_call_is_one() -> None:
    body = pack({"op": "embed"}, {"a": np.ones(3, np.float32)})
    for end in range(len(body)):
        with pytest.raises(Malformed):
            unpack(body[:end])


@pytest.mark.parametrize(
    "header",
    [
        b"null",
        b"[]",
        b'{"__metadata__":null}',
        b'{"__metadata__":{"call":1}}',
        b'{"__metadata__":{"call":"["}}',
        b'{"__metadata__":{"call":"' + b"[" * 100_000 + b'"}}',
        b"[" * 100_000,
        b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]},"__metadata__":{"call":"{}"}}',
        b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"__metadata__":{"call":"{}"}}\x00\x00',
        b"\xff\xfe",
    ],
)
def test_bytes_that_are_no_call_are_malformed(header: bytes) -> None:
    with pytest.raises(Malformed):
        unpack(struct.pack("<Q", len(header)) + header)


def test_weights_are_no_call() -> None:
    with pytest.raises(Malformed):
        unpack(save({"weight": np.ones(3, np.float32)}))


def test_a_header_larger_than_the_limit_is_not_read() -> None:
    with pytest.raises(Malformed, match="too large"):
        unpack(struct.pack("<Q", 1 << 40))


@pytest.mark.parametrize(
    "error",
    [
        Malformed("m"),
        Unauthenticated("u"),
        NotFound("n"),
        Conflict("c"),
        TooLarge("t"),
        Invalid("i", param="input", code="bad", item=3),
        TooMany("t"),
        Unavailable("u", code="full"),
    ],
)
def test_errors_cross_as_what_they_are(error: IsthmusError) -> None:
    status, body = pack_error(error)
    found = unpack_error(status, body)
    assert type(found) is type(error)
    assert (found.message, found.param, found.code, found.item) == (error.message, error.param, error.code, error.item)


@pytest.mark.parametrize(
    "body", [b"", b"Internal Server Error", b"[]", b'{"error":1}', b'{"error":{"type":"Odd"}}', b'{"error":{}}']
)
def test_an_answer_that_is_no_envelope_is_an_error_of_no_special_kind(body: bytes) -> None:
    found = unpack_error(500, body)
    assert type(found) is IsthmusError
    assert "500" in found.message


def test_legs_cross_under_their_public_names() -> None:
    legs = [{"model": MODEL, "from": "audio", "to": "text"}]
    document = {"op": "compose", "legs": legs, "method": "direct", "bank": True, "top_k": 1}
    call = call_adapter.validate_python(document)
    assert isinstance(call, ComposeCall)
    assert call.legs[0].from_ == "audio"
    assert call.model_dump(mode="json", by_alias=True)["legs"] == legs
