from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.contract.errors import Invalid
from service.contract.modality import ImageTokens
from service.contract.tokens.image import patches
from service.contract.tokens.tokenise import EncodedRaw, PixelsRaw, ReadyRaw, TextRaw, WaveRaw, build


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def tokens_of(data: bytes, **config: object) -> np.ndarray:
    (sequence,) = build(ImageTokens.model_validate({"size": 16, "patch": 4, **config}), {})(EncodedRaw(data))
    return sequence


def unpatch(tokens: np.ndarray, config: ImageTokens) -> np.ndarray:
    """Put patches back together into the picture that they were cut from."""
    side, patch = config.size // config.patch, config.patch
    grid = tokens.reshape(side, side, patch, patch, config.channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(config.size, config.size, config.channels)


def test_four_by_four_grey_pixels_become_four_patches_row_by_row() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    config = ImageTokens(size=4, patch=2, channels=1)
    (sequence,) = build(config, {})(EncodedRaw(encoded(Image.fromarray(pixels), "PNG")))
    assert sequence.dtype == np.uint8
    assert sequence.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_colour_patch_is_row_column_channel() -> None:
    pixels = noise(4, 4)
    (sequence,) = build(ImageTokens(size=4, patch=2), {})(PixelsRaw(pixels))
    assert sequence.shape == (4, 12)
    assert sequence[1].tolist() == pixels[0:2, 2:4].reshape(-1).tolist()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    side=st.integers(1, 4), patch=st.integers(4, 8), channels=st.sampled_from([1, 3]), seed=st.integers(0, 2**32 - 1)
)
def test_patches_put_back_together_are_the_picture(side: int, patch: int, channels: int, seed: int) -> None:
    config = ImageTokens(size=side * patch, patch=patch, channels=channels)
    pixels = np.random.default_rng(seed).integers(0, 256, (config.size, config.size, channels), np.uint8)
    (sequence,) = build(config, {})(PixelsRaw(pixels))
    assert sequence.shape == (config.max_length, config.dim)
    assert np.array_equal(unpatch(sequence, config), pixels)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    resize=st.sampled_from(["crop", "squash", "pad"]),
    channels=st.sampled_from([1, 3]),
)
def test_every_shape_of_image_gives_the_same_shape_of_tokens(
    height: int, width: int, resize: str, channels: int
) -> None:
    config = ImageTokens.model_validate({"size": 16, "patch": 4, "resize": resize, "channels": channels})
    (sequence,) = build(config, {})(PixelsRaw(noise(height, width)))
    assert (sequence.shape, sequence.dtype) == ((16, 16 * channels), np.uint8)


def test_crop_takes_the_centre_squash_takes_all_and_pad_adds_black() -> None:
    pixels = np.full((8, 16, 3), 100, np.uint8)
    pixels[:, :4] = (255, 0, 0)
    pixels[:, 12:] = (0, 0, 255)
    seen: dict[str, np.ndarray] = {}
    for resize in ("crop", "squash", "pad"):
        config = ImageTokens.model_validate({"size": 8, "patch": 4, "resize": resize})
        (sequence,) = build(config, {})(PixelsRaw(pixels))
        seen[resize] = unpatch(sequence, config)
    assert (seen["crop"] == 100).all()
    assert seen["squash"][4, 0].tolist() == [255, 0, 0]
    assert seen["squash"][4, 7].tolist() == [0, 0, 255]
    assert not seen["pad"][:2].any()
    assert not seen["pad"][6:].any()
    assert seen["pad"][2:6].any(axis=2).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_photo_turned_by_its_exif_gives_the_same_tokens_as_one_held_upright(kind: str, orientation: int) -> None:
    upright = Image.fromarray(noise(24, 17))
    # What a camera stores so that the viewer, turning it by the tag, sees it upright.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(inverse[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    turned = encoded(stored, kind, exif=exif, **options)
    assert np.array_equal(tokens_of(turned), tokens_of(encoded(upright, kind, **options)))


def test_the_same_picture_as_png_and_lossless_webp_gives_the_same_tokens() -> None:
    image = Image.fromarray(noise(33, 40))
    webp = encoded(image, "WEBP", lossless=True)
    assert np.array_equal(tokens_of(encoded(image, "PNG")), tokens_of(webp))


def test_a_jpeg_decoded_at_a_fraction_of_its_size_looks_like_the_whole() -> None:
    small = Image.fromarray(noise(40, 40))
    large = small.resize((800, 800), Image.Resampling.BICUBIC)
    from_jpeg = tokens_of(encoded(large, "JPEG", quality=95, subsampling=0)).astype(int)
    from_png = tokens_of(encoded(large, "PNG")).astype(int)
    assert np.abs(from_jpeg - from_png).mean() < 3


def test_sixteen_bit_grey_is_rounded_to_eight() -> None:
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    tokens = tokens_of(encoded(Image.fromarray(levels), "PNG"), channels=1)
    assert np.array_equal(unpatch(tokens, ImageTokens(size=16, patch=4, channels=1))[..., 0], levels // 257)


def test_transparency_is_laid_over_white() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8, 3] = 255  # black and opaque on the left, black and invisible on the right
    tokens = tokens_of(encoded(Image.fromarray(pixels), "PNG"), channels=1)
    seen = unpatch(tokens, ImageTokens(size=16, patch=4, channels=1))
    assert not seen[:, :8].any()
    assert (seen[:, 8:] == 255).all()


def test_a_palette_gives_its_colours_and_its_transparent_entry_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(1, (8, 0, 16, 16))
    assert set(map(tuple, unpatched(tokens_of(encoded(image, "PNG"))))) == {(10, 20, 30), (40, 50, 60)}
    transparent = encoded(image, "PNG", transparency=1)
    assert set(map(tuple, unpatched(tokens_of(transparent)))) == {(10, 20, 30), (255, 255, 255)}


def unpatched(tokens: np.ndarray) -> list[list[int]]:
    return unpatch(tokens, ImageTokens(size=16, patch=4)).reshape(-1, 3).tolist()


def test_cmyk_becomes_the_colour_that_is_printed() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = unpatched(tokens_of(encoded(image, "JPEG", quality=100)))[0]
    assert red > 250
    assert green < 5
    assert blue < 5


def test_grey_is_the_luma_of_the_colours() -> None:
    pixels = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    (sequence,) = build(ImageTokens(size=4, patch=4, channels=1), {})(PixelsRaw(pixels))
    assert set(sequence[0].tolist()) == {76}


def test_patches_expects_a_picture_in_one_of_three_modes() -> None:
    for mode in ("L", "RGB", "RGBA"):
        assert patches(Image.new(mode, (9, 5)), ImageTokens(size=8, patch=8)).shape == (1, 192)


def test_patches_made_before_come_through_as_they_are() -> None:
    tokeniser = build(ImageTokens(size=8, patch=4, channels=1), {})
    (made,) = tokeniser(PixelsRaw(noise(8, 8)))
    (again,) = tokeniser(ReadyRaw(made.astype(np.float32)))
    assert again.dtype == np.uint8
    assert np.array_equal(made, again)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((3, 16), np.float32),
        np.zeros((4, 15), np.float32),
        np.zeros(64, np.int32),
        np.full((4, 16), 256, np.float32),
        np.full((4, 16), -1, np.float32),
        np.full((4, 16), 0.5, np.float32),
        np.full((4, 16), np.nan, np.float32),
    ],
    ids=["too few", "too narrow", "flat", "above 255", "negative", "fractions", "nan"],
)
def test_patches_made_before_are_checked(values: np.ndarray) -> None:
    with pytest.raises(Invalid):
        build(ImageTokens(size=8, patch=4, channels=1), {})(ReadyRaw(values))


@pytest.mark.parametrize(
    "raw", [TextRaw("x"), WaveRaw(np.zeros(9, np.float32), 8000), PixelsRaw(np.zeros((4, 4, 2), np.uint8))]
)
def test_what_is_no_image_is_refused(raw: TextRaw | WaveRaw | PixelsRaw) -> None:
    with pytest.raises(Invalid):
        build(ImageTokens(), {})(raw)
