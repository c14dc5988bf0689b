"""Pixels to patches: one token is the uint8 values of one square patch.

The tower scales and centres them as its fixed first step, so a token is what the picture holds and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from service.contract.errors import Invalid
from service.contract.modality import ImageTokens
from service.contract.tokens import image_processing

REDUCING_GAP = (
    3.0  # shrink by whole factors first while three times the target is left: fast, and no visible difference
)

Box = tuple[float, float, float, float]
Fit = Callable[[Image.Image, ImageTokens], Image.Image]


def draft_side(config: ImageTokens, zoom: float = 1.0) -> int | None:
    """Return the least side, in pixels, at which a large JPEG may be decoded; the resize sees it at double the size.

    `zoom` is how much of the side is cut away before. None: whole, as an imported tower has to see it.
    """
    if config.processing is not None:
        return None
    return round(2 * config.size * zoom)


def from_pixels(pixels: UInt8[np.ndarray, "height width *channel"]) -> Image.Image:
    """Wrap decoded pixels: grey as (height, width) or one channel, RGB, or RGBA.

    Raises Invalid for any other shape.
    """
    match pixels.shape:
        case (_, _, 1):
            return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]))
        case (_, _) | (_, _, 3) | (_, _, 4):
            return Image.fromarray(np.ascontiguousarray(pixels))
        case shape:
            raise Invalid(f"pixels have shape (height, width) or (height, width, 1, 3 or 4), not {shape}")


def patches(picture: Image.Image, config: ImageTokens, fit: Fit | None = None) -> UInt8[np.ndarray, "token value"]:
    """Resize (bicubic) and cut, row by row; a token is (row, column, channel) of its patch, flattened.

    Transparency is laid over white, `pad` fills with black, and grey is the luma of ITU-R 601-2. Expects mode L, RGB or
    RGBA. A training run may pass a `fit` of its own in place of `fitted_to`.
    """
    if config.processing is not None and fit is None:
        fitted = image_processing.prepare(picture, config.processing, config.size)
    else:
        fitted = fitted_to(picture, config) if fit is None else fit(picture, config)
    if fitted.mode == "RGBA":
        # After the resize, which premultiplies: the same picture as before it, for a fraction of the memory.
        fitted = Image.alpha_composite(Image.new("RGBA", fitted.size, "white"), fitted).convert("RGB")
    fitted = fitted.convert("L" if config.channels == 1 else "RGB")
    if config.resize == "pad":
        canvas = Image.new(fitted.mode, (config.size, config.size))
        canvas.paste(fitted, ((config.size - fitted.width) // 2, (config.size - fitted.height) // 2))
        fitted = canvas
    side, patch = config.size // config.patch, config.patch
    grid = np.asarray(fitted, np.uint8).reshape(side, patch, side, patch, config.channels)
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4)).reshape(side * side, config.dim)


def fitted_to(picture: Image.Image, config: ImageTokens, box: Box | None = None) -> Image.Image:
    """Resize what lies in a box of the picture; by default all of it, or for `crop` its centre square.

    The box fills the whole of `size`, but for `pad`, which keeps the shape of what it holds.
    """
    width, height = picture.size
    size = (config.size, config.size)
    box = box or whole_box(width, height, config)
    if config.resize == "pad":
        left, top, right, bottom = box
        scale = config.size / max(right - left, bottom - top)
        size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=REDUCING_GAP)


def whole_box(width: int, height: int, config: ImageTokens) -> Box:
    """Return the part of a picture that is looked at: left, top, right, bottom in pixels."""
    match config.resize:
        case "squash" | "pad":
            return (0.0, 0.0, float(width), float(height))
        case "crop":
            short = min(width, height)
            side = float(short)
            if config.processing is not None and config.processing.shortest_edge is not None:
                side = min(side, short * config.size / config.processing.shortest_edge)
            left, top = (width - side) / 2, (height - side) / 2
            return (left, top, left + side, top + side)
        case _:
            assert_never(config.resize)


def ready(values: np.ndarray, config: ImageTokens) -> UInt8[np.ndarray, "token value"]:
    """Check patches that were made before: (token, value), whole numbers from 0 to 255.

    Raises Invalid naming what differs.
    """
    if values.shape != (config.max_length, config.dim):
        raise Invalid(f"image tokens have shape {(config.max_length, config.dim)}, not {values.shape}")
    if values.dtype == np.uint8:
        return values
    if not ((values >= 0) & (values <= 255) & (values == np.floor(values))).all():
        raise Invalid("image tokens are whole numbers from 0 to 255")
    return values.astype(np.uint8)
