"""Pictures of any shape and mode become the pixels that transformers makes of them, at the sizes of real models."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import transformers as hf
from PIL import Image

from service.contract.modality import ImageTokens
from service.contract.processing import ImageProcessing
from service.contract.tokens import image_processing
from service.contract.tokens.tokenise import EncodedRaw, build

SIZES = [(1, 1), (3, 700), (801, 2), (223, 225), (224, 224), (640, 479), (225, 1999)]
MODES = ["L", "RGBA", "P", "1", "LA", "CMYK"]
FORMATS = {"png": ("RGB", "L", "RGBA", "P", "1", "LA"), "jpeg": ("RGB", "L", "CMYK"), "webp": ("RGB", "RGBA")}
CASES: dict[str, tuple[ImageProcessing, Any]] = {
    "CLIP": (ImageProcessing(shortest_edge=224, crop=224), hf.CLIPImageProcessorPil()),
    "SigLIP": (ImageProcessing(squash=224), hf.SiglipImageProcessorPil()),
}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    noise = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)) for size in SIZES]
    return noise + [Image.fromarray(rng.integers(0, 256, (151, 333, 3), np.uint8)).convert(mode) for mode in MODES]


@pytest.mark.parametrize("family", CASES)
def test_files_become_the_checkpoints_own_features(family: str) -> None:
    processing, processor = CASES[family]
    config = ImageTokens(size=224, patch=16, resize="squash" if processing.squash else "crop", processing=processing)
    tokeniser, compared = build(config, {}), 0
    mean, deviation = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    for picture in pictures():
        for name, modes in FORMATS.items():
            if picture.mode not in modes:
                continue
            out = io.BytesIO()
            picture.save(out, name)
            with Image.open(io.BytesIO(out.getvalue())) as opened:
                wanted = processor(opened, return_tensors="np")["pixel_values"][0]
            (tokens,) = tokeniser(EncodedRaw(out.getvalue()))
            pixels = tokens.reshape(14, 14, 16, 16, 3).transpose(4, 0, 2, 1, 3).reshape(3, 224, 224)
            found = (pixels / 255 - mean) / deviation
            assert np.abs(found - wanted).max() < 1e-3, (picture.size, picture.mode, name)
            compared += 1
    assert compared == 3 * len(SIZES) + 8


@pytest.mark.parametrize(("edge", "crop"), [(224, 224), (256, 225), (150, 224)])
def test_of_a_picture_that_would_be_enlarged_to_gigabytes_only_the_middle_is_made(
    edge: int, crop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ImageProcessing(shortest_edge=edge, crop=crop)
    for size in ((20_000, 1), (1, 20_000)):
        line = Image.new("RGB", size, (10, 200, 30))
        assert image_processing.prepare(line, config, crop).getpixel((crop // 2, crop // 2)) == (10, 200, 30)
    # Smooth, so that nothing hangs on the order in which Pillow takes the axes.
    for width, height in ((40, 3000), (2999, 41), (333, 251)):
        across, down = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 9, height))
        waves = 128 + 100 * np.stack([np.sin(across + 1), np.cos(down), np.sin(across) * np.cos(down)], 2)
        picture = Image.fromarray(waves.round().astype(np.uint8))
        whole = np.asarray(image_processing.prepare(picture, config, crop), np.int64)
        monkeypatch.setattr(image_processing, "MAX_RESIZED", 1)
        middle = np.asarray(image_processing.prepare(picture, config, crop), np.int64)
        monkeypatch.undo()
        assert np.abs(whole - middle).max() <= 1
