from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import soundfile

from service.contract.errors import RequestError
from service.contract.tokens.decode import DEFAULT_LIMITS, array
from worker.sources.sample import Kind, Value, signature
from worker.sources.validate import check


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def verdict(kind: Kind, data: object) -> str:
    with pytest.raises(RequestError) as caught:
        check(Value(kind, data), DEFAULT_LIMITS)
    return caught.value.message


def test_images_and_sounds_are_kept_as_they_came_and_measured(png: bytes):
    image = check(Value("image", png), DEFAULT_LIMITS)
    assert (image.medium, image.payload, image.figures) == ("image", png, {"width_px": 8, "height_px": 6})
    data = wav(np.zeros(4000, np.float32))
    sound = check(Value("audio", data), DEFAULT_LIMITS)
    assert (sound.medium, sound.payload, sound.figures) == ("audio", data, {"seconds": 0.5, "sample_rate_hz": 8000})


def test_damaged_media_are_refused(png: bytes):
    assert "truncated or damaged" in verdict("image", png[:45])
    assert "none of them" in verdict("image", b"GIF89a")
    assert "NaN" in verdict("audio", wav(np.array([0.0, np.nan], np.float32)))
    assert "none of them" in verdict("audio", png)


def test_text_is_utf8_and_not_empty():
    assert check(Value("text", "\ufeffé".encode()), DEFAULT_LIMITS).payload == "é".encode()
    assert verdict("text", b"") == "empty"
    assert verdict("text", " \n\t") == "empty"
    assert verdict("text", b"caf\xe9") == "not UTF-8 at byte 3"
    assert "NUL" in verdict("text", b"a\0b")
    assert "surrogate" in verdict("text", "\ud800")
    assert "1048577 bytes" in verdict("text", "x" * (1 << 20 | 1))


@pytest.mark.parametrize(
    ("kind", "data", "medium", "dtype", "shape"),
    [
        ("npy", npy(np.array([1, 2, 3], np.int64)), "discrete", np.int32, (3,)),
        ("npy", npy(np.array([1, 2], np.uint8)), "discrete", np.int32, (2,)),
        ("npy", npy(np.zeros((4, 2), np.float64)), "continuous", np.float32, (4, 2)),
        ("npy", npy(np.asfortranarray(np.zeros((4, 2), np.float16))), "continuous", np.float32, (4, 2)),
        ("npy", npy(np.zeros((4, 2), ">f4")), "continuous", np.float32, (4, 2)),
        ("json", b"[1, 2]", "discrete", np.int32, (2,)),
        ("json", b"[[1, 2], [3, 4]]", "continuous", np.float32, (2, 2)),
        ("list", [[0.5], [1]], "continuous", np.float32, (2, 1)),
        ("list", np.array([5], np.int16), "discrete", np.int32, (1,)),
    ],
)
def test_arrays_become_npy_of_one_type(kind: Kind, data: object, medium: str, dtype: type, shape: tuple[int, ...]):
    found = check(Value(kind, data), DEFAULT_LIMITS)
    values = array(found.payload)
    assert (found.medium, values.dtype, values.shape) == (medium, np.dtype(dtype), shape)
    assert found.figures["tokens"] == shape[0]


class Evil:
    def __reduce__(self):
        return print, ("owned",)


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        ("npy", npy(np.zeros((0,), np.int32)), "empty"),
        ("npy", npy(np.zeros((3,), np.float32)), "real (n, dim)"),
        ("npy", npy(np.zeros((2, 2, 2), np.float32)), "shape (2, 2, 2)"),
        ("npy", npy(np.array(1.0)), "shape ()"),
        ("npy", npy(np.array([1.0, np.inf])[None]), "NaN, infinite"),
        ("npy", npy(np.array([[1e300]])), "beyond float32"),
        ("npy", npy(np.array([-1, 2])), "there is -1 to 2"),
        ("npy", npy(np.array([2**40])), "ids lie in 0"),
        ("npy", npy(np.array([True])), "not bool"),
        ("npy", npy(np.array(["a"])), "integers or floats"),
        ("npy", npy(np.zeros((4, 2)))[:-8], "its shape needs"),
        ("npy", pickle.dumps(Evil()), "this is not"),
        ("json", b"{}", "no list of numbers"),
        ("json", b"[1, 2", "not JSON"),
        ("json", b"[[1], [1, 2]]", "differ in length"),
        ("json", b'["a"]', "numbers"),
        ("json", b"[[NaN]]", "NaN"),
        ("json", b"[[1e999]]", "infinite"),
        ("list", [None, 1], "numbers"),
        ("list", [10**30, 1], "numbers"),
    ],
)
def test_arrays_of_anything_but_tokens_are_refused(kind: Kind, data: object, reason: str):
    assert reason in verdict(kind, data)


def test_an_object_array_is_never_unpickled(capsys: pytest.CaptureFixture[str]):
    stream = io.BytesIO()
    np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)
    assert "not object" in verdict("npy", stream.getvalue())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "image"),
        (b"OggS", "audio"),
        (b"ID3\x03", "audio"),
        (b"\x93NUMPY", "npy"),
        (b"hello", "text"),
    ],
)
def test_bytes_without_a_name_are_told_by_their_signature(data: bytes, kind: Kind):
    assert signature(data) == kind
