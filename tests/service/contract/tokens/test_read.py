from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from service.contract.errors import Invalid, RequestError, UnsupportedMedia
from service.contract.items import AnyPlainItem, PlainItem
from service.contract.modality import (
    AudioTokens,
    ContinuousTokens,
    DiscreteTokens,
    ImageTokens,
    TextTokens,
    TokeniserConfig,
)
from service.contract.tokens import text
from service.contract.tokens.decode import Limits
from service.contract.tokens.read import Vector, read_item
from service.contract.tokens.tokenise import (
    EncodedRaw,
    PixelsRaw,
    Raw,
    ReadyRaw,
    TextRaw,
    WaveRaw,
    build,
)

MODALITIES: dict[str, TokeniserConfig] = {
    "image": ImageTokens(size=8, patch=4),
    "text": TextTokens(),
    "audio": AudioTokens(sample_rate=8000),
    "codes": DiscreteTokens(vocab=100, max_length=8),
    "imu": ContinuousTokens(dim=2, max_length=8),
}
TWO_IMAGES: dict[str, TokeniserConfig] = {"photo": ImageTokens(), "depth": ImageTokens(channels=1)}
items: TypeAdapter[AnyPlainItem] = TypeAdapter(PlainItem)


def read(
    item: object,
    hint: str | None = None,
    modalities: dict[str, TokeniserConfig] = MODALITIES,
    limits: Limits | None = None,
) -> tuple[str, Raw | Vector]:
    parsed = items.validate_python(item)
    return read_item(parsed, modalities=modalities, limits=limits or Limits(), modality_hint=hint)


def tensor(array: np.ndarray, modality: str, **more: object) -> dict[str, object]:
    data = base64.b64encode(array.tobytes()).decode()
    described = {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}
    return {"modality": modality, "tensor": described, **more}


def png() -> str:
    stream = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def wav() -> str:
    stream = io.BytesIO()
    soundfile.write(stream, np.sin(np.arange(800)).astype(np.float32) * 0.3, 8000, format="WAV")
    return base64.b64encode(stream.getvalue()).decode()


PNG, WAV = png(), wav()


@pytest.mark.parametrize(
    "item",
    [
        "a seven",
        "data: the new oil",
        "https://example.com/seven.png",
        PNG,
        {"text": "a seven"},
        {"text": f"data:image/png;base64,{PNG}"},
        {"text": "data:image/png;base64,###"},
    ],
)
def test_a_string_is_text_unless_all_of_it_is_a_data_uri(item: str | dict[str, str]) -> None:
    assert read(item) == ("text", TextRaw(item if isinstance(item, str) else item["text"]))


@pytest.mark.parametrize(
    ("item", "modality", "data"),
    [
        (f"data:image/png;base64,{PNG}", "image", PNG),
        (f"data:image/jpeg;base64,{PNG}", "image", PNG),
        (f"data:audio/x-wav;base64,{WAV}", "audio", WAV),
        ({"image": PNG}, "image", PNG),
        ({"image": f"data:image/png;base64,{PNG}"}, "image", PNG),
        ({"audio": WAV}, "audio", WAV),
        ({"audio": f"data:audio/wav;base64,{WAV}", "modality": "audio"}, "audio", WAV),
    ],
)
def test_media_are_taken_from_base64_and_from_data_uris(item: object, modality: str, data: str) -> None:
    assert read(item) == (modality, EncodedRaw(base64.b64decode(data)))


def test_text_in_a_data_uri_is_text() -> None:
    assert read("data:text/plain,a%20seven") == ("text", TextRaw("a seven"))
    with pytest.raises(Invalid, match="UTF-8"):
        read("data:text/plain;base64,//8=")


@pytest.mark.parametrize("media_type", ["video/mp4", "application/pdf", "text/html", "application/octet-stream"])
def test_other_media_types_are_unsupported(media_type: str) -> None:
    with pytest.raises(UnsupportedMedia, match=media_type):
        read(f"data:{media_type};base64,aGk=")


def test_the_hint_says_what_bare_strings_are() -> None:
    raw = EncodedRaw(base64.b64decode(PNG))
    assert read(PNG, "image") == ("image", raw)
    assert read(f"data:image/png;base64,{PNG}", "image") == ("image", raw)
    assert read(f"data:image/png;base64,{PNG}", "text") == ("text", TextRaw(f"data:image/png;base64,{PNG}"))
    assert read(PNG, "depth", TWO_IMAGES) == ("depth", raw)
    assert read({"image": PNG}, "depth", TWO_IMAGES) == ("depth", raw)
    assert read({"image": PNG, "modality": "photo"}, "depth", TWO_IMAGES) == ("photo", raw)
    assert read({"text": "a seven"}, "image") == ("text", TextRaw("a seven"))


@pytest.mark.parametrize(
    ("item", "hint", "message"),
    [
        ("a seven", "image", "not base64"),
        ("a seven", "imu", "not a string"),
        ("a seven", "codes", "not a string"),
        ("a seven", "smell", r"no modality 'smell'; it has audio \(audio\), codes \(discrete\)"),
        (f"data:audio/wav;base64,{WAV}", "image", r"audio/wav, not image"),
        ("https://example.com/seven.png", "image", "fetching is not enabled"),
    ],
)
def test_a_hint_that_does_not_fit_is_an_error(item: str, hint: str, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        read(item, hint)


def test_ids_are_text_unless_the_hint_says_otherwise() -> None:
    modality, raw = read([1, 70, 2])
    assert modality == "text"
    assert isinstance(raw, ReadyRaw)
    assert (raw.array.dtype, raw.array.tolist()) == (np.int32, [1, 70, 2])
    assert read([1, 70, 2], "codes")[0] == "codes"
    assert read([1, 70, 2], "image")[0] == "text"


def test_a_medium_that_two_modalities_take_must_be_named() -> None:
    with pytest.raises(Invalid, match="'photo', 'depth' all take image"):
        read({"image": PNG}, None, TWO_IMAGES)
    with pytest.raises(Invalid, match=r"takes no text; it has depth \(image\), photo \(image\)"):
        read("a seven", None, TWO_IMAGES)
    assert read({"image": PNG, "modality": "photo"}, None, TWO_IMAGES)[0] == "photo"


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"image": "###"}, "image"),
        ({"image": ""}, "image"),
        ({"image": {"url": "https://example.com/x.png"}}, "image"),
        ({"image": "http://127.0.0.1/x.png"}, "image"),
        ({"image": f"data:audio/wav;base64,{WAV}"}, "image"),
        ({"audio": f"data:image/png;base64,{PNG}"}, "audio"),
        ({"audio": PNG[:-1]}, "audio"),
        ({"image": PNG, "modality": "text"}, "modality"),
        ({"text": "x", "modality": "smell"}, "modality"),
        ({"modality": "smell", "tokens": [1]}, "modality"),
        ({"modality": "smell", "embedding": [1.0]}, "modality"),
        ({"modality": "imu", "tokens": [[1, 2], [3]]}, "tokens"),
        ({"modality": "imu", "tokens": [[1e39, 2]]}, "tokens"),
        ({"modality": "imu", "tokens": [[10**400, 2]]}, "tokens"),
        ({"modality": "text", "embedding": [1e39, 0]}, "embedding"),
        ({"modality": "text", "embedding": [10**400]}, "embedding"),
        ({"modality": "image", "tensor": {"dtype": "uint8", "shape": [2, 2], "data": "AAAA"}}, "tensor.data"),
        ({"modality": "image", "tensor": {"dtype": "uint8", "shape": [2, 2], "data": "A"}}, "tensor.data"),
        (tensor(np.zeros((2, 2), np.int32), "image"), "tensor.dtype"),
        (tensor(np.full((2, 2), 1.5, np.float32), "image"), "tensor.data"),
        (tensor(np.full((2, 2), np.nan, np.float32), "image"), "tensor.data"),
        (tensor(np.zeros(4, np.uint8), "image"), "tensor.shape"),
        (tensor(np.zeros(4, np.float32), "audio"), "sample_rate"),
        (tensor(np.zeros((4, 2), np.float32), "audio", sample_rate=8000), "tensor.shape"),
        (tensor(np.zeros(4, np.uint8), "audio", sample_rate=8000), "tensor.dtype"),
        (tensor(np.zeros(4, np.float32), "codes"), "tensor.dtype"),
        (tensor(np.full(4, 2**40), "codes"), "tensor.data"),
        (tensor(np.zeros((2, 2), np.int32), "codes"), "tensor.shape"),
    ],
)
def test_an_error_names_its_place(item: object, param: str) -> None:
    with pytest.raises(Invalid) as caught:
        read(item)
    assert caught.value.param == param
    assert caught.value.at("input[3]").param == f"input[3].{param}"
    assert len(caught.value.message) < 300


def test_an_image_tensor_is_pixels() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    for array in (colours, colours[..., 0].copy(), colours[..., :1].copy()):
        modality, raw = read(tensor(array, "image"))
        assert modality == "image"
        assert isinstance(raw, PixelsRaw)
        assert np.array_equal(raw.array, array)
    for dtype in (np.float32, np.float16):
        _, raw = read(tensor((colours / 255).astype(dtype), "image"))
        assert isinstance(raw, PixelsRaw)
        assert np.array_equal(raw.array, colours)


def test_tensors_obey_the_limits() -> None:
    with pytest.raises(Invalid, match=r"30 pixels and the limit is 29"):
        read(tensor(np.zeros((5, 6), np.uint8), "image"), limits=Limits(max_pixels=29))
    with pytest.raises(Invalid, match=r"2\.0 s and the limit is 1 s"):
        read(tensor(np.zeros(16_000, np.int16), "audio", sample_rate=8000), limits=Limits(max_audio_s=1))


def test_a_sound_tensor_is_samples() -> None:
    integers = np.array([-32_768, 0, 16_384], np.int16)
    for array in (integers, (integers / 32_768).astype(np.float32), (integers / 32_768).astype(np.float16)):
        modality, raw = read(tensor(array, "audio", sample_rate=22_050))
        assert modality == "audio"
        assert isinstance(raw, WaveRaw)
        assert (raw.sample_rate, raw.array.dtype, raw.array.tolist()) == (22_050, np.float32, [-1.0, 0.0, 0.5])


def test_other_tensors_are_tokens() -> None:
    for modality, array in (
        ("codes", np.array([1, 2, 3], np.int64)),
        ("text", np.array([1, 70, 2], np.int32)),
        ("imu", np.array([[1, 2], [3, 4]], np.float16)),
        ("imu", np.array([[1, 2], [3, 4]], np.int16)),
    ):
        named, raw = read(tensor(array, modality))
        assert named == modality
        assert isinstance(raw, ReadyRaw)
        assert raw.array.tolist() == array.tolist()
        assert raw.array.dtype == (np.float32 if modality == "imu" else np.int32)


def test_a_vector_made_earlier_comes_back_as_float32() -> None:
    modality, vector = read({"modality": "text", "embedding": [1, 2.5, -3]})
    assert modality == "text"
    assert isinstance(vector, np.ndarray)
    assert (vector.dtype, vector.tolist()) == (np.float32, [1.0, 2.5, -3.0])


@pytest.mark.parametrize(
    ("item", "modality"),
    [({"image": PNG}, "image"), ({"audio": WAV}, "audio"), ("a seven", "text")],
)
def test_tokens_sent_back_are_the_tokens_that_were_made(item: object, modality: str) -> None:
    files = text.train([], TextTokens()) if modality == "text" else {}
    tokeniser = build(MODALITIES[modality], files)
    _, raw = read(item)
    assert not isinstance(raw, np.ndarray)
    for sequence in tokeniser(raw):
        named, again = read({"modality": modality, "tokens": sequence.tolist()})
        assert named == modality
        assert not isinstance(again, np.ndarray)
        (back,) = tokeniser(again)
        assert back.dtype == sequence.dtype
        assert np.array_equal(back, sequence)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    item=st.one_of(
        st.text(max_size=40),
        st.text(max_size=20).map(lambda tail: "data:image/png;base64," + tail),
        st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
        st.fixed_dictionaries({"image": st.text(max_size=20)}),
        st.fixed_dictionaries(
            {
                "modality": st.sampled_from([*MODALITIES, "other"]),
                "tokens": st.lists(
                    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3),
                    min_size=1,
                    max_size=3,
                ),
            }
        ),
    ),
    hint=st.sampled_from([None, *MODALITIES, "other"]),
)
def test_any_item_is_read_or_refused(item: object, hint: str | None) -> None:
    try:
        modality, _ = read(item, hint)
    except RequestError:
        return
    assert modality in MODALITIES
