"""Pictures as an imported tower expects them: pixel for pixel what Pillow makes of the checkpoint's own instructions.

Resize, then cut out the centre; both on 8-bit values, so that what remains (scale, mean, deviation) is the tower's
fixed first step. Transparency is dropped and not laid over white, because the checkpoint's own processor drops it.
"""

from __future__ import annotations

from typing import Final

from PIL import Image

from service.contract.processing import ImageProcessing

FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
"""In the order of the numbers that checkpoints name them by: nearest, lanczos, bilinear, bicubic, box, hamming."""

MAX_RESIZED: Final = 1 << 24
"""Pixels of a resized picture from which on only what the cut leaves of it is made."""


def prepare(picture: Image.Image, config: ImageProcessing, size: int) -> Image.Image:
    """Return the top left `size` pixels of the processed picture, in mode RGB."""
    found = picture.convert("RGB")
    if config.squash is not None:
        new = (config.squash, config.squash)
    else:
        assert config.shortest_edge is not None  # one of the two is set
        short, long = sorted(found.size)
        other = int(config.shortest_edge * long / short)
        new = (config.shortest_edge, other) if found.width <= found.height else (other, config.shortest_edge)
    if config.crop is not None and new[0] * new[1] > MAX_RESIZED:
        found = _strip(found, new, config.crop, FILTERS[config.resample])
    elif new != found.size:
        found = found.resize(new, FILTERS[config.resample])
    if config.crop is not None:
        # A picture smaller than the crop is laid into black; of an odd rest, the larger half lies in front of it, and
        # of one that is cut off, behind it.
        left, top = ((have - config.crop) // 2 for have in found.size)
        found = found.crop((left, top, left + config.crop, top + config.crop))
    return found if found.size == (size, size) else found.crop((0, 0, size, size))


def _strip(picture: Image.Image, new: tuple[int, int], crop: int, resample: Image.Resampling) -> Image.Image:
    """Resize, but make only the middle of the long axis: a line of pixels could be enlarged to gigabytes."""
    spans = [(max(0, (whole - crop) // 2), min(whole, (whole - crop) // 2 + crop)) for whole in new]
    short = 0 if new[0] <= new[1] else 1
    spans[short] = (0, new[short])  # whose middle `prepare` takes
    (left, right), (top, bottom) = spans
    across, down = (have / whole for have, whole in zip(picture.size, new, strict=True))
    box = (left * across, top * down, right * across, bottom * down)
    return picture.resize((right - left, bottom - top), resample, box=box)
