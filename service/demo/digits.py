"""Handwritten digits: the real scans that come with scikit-learn (UCI, 1998), 8 by 8 pixels, with captions."""

from __future__ import annotations

import io
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.demo.specimens import Collection, Specimen

WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS: Final = (
    "a handwritten {word}",
    "the digit {word} written by hand",
    "{word}",
    "the number {word} in pencil",
    "somebody wrote {word}",
    "a scan of the numeral {word}",
    "the digit {digit}",
)
_EVERY: Final = 5  # every fifth scan of a class is held out, the same in every run
_WHITE: Final = 16  # the scans count inked pixels of 4 by 4 cells


def caption(templates: tuple[str, ...], digit: int, rng: np.random.Generator) -> str:
    """Draw a caption for a digit."""
    return templates[int(rng.integers(len(templates)))].format(word=WORDS[digit], digit=digit)


def collect(seed: int) -> Collection:
    """Return the scans with captions drawn from the seed; the split does not depend on it."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]  # noqa: PLC0415  # 1 s

    rng = np.random.default_rng((seed, 1))
    bunch = load_digits()  # pyright: ignore[reportUnknownVariableType]
    scans = cast("NDArray[np.float64]", bunch.images)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    digits = cast("NDArray[np.int64]", bunch.target)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    seen = dict.fromkeys(range(10), 0)
    train: list[Specimen] = []
    holdout: list[Specimen] = []
    for at, (scan, target) in enumerate(zip(scans, digits, strict=True)):
        digit = int(target)
        specimen = Specimen(
            key=f"scan{at:04d}",
            payload=_png(scan),
            caption=caption(CAPTIONS, digit, rng),
            label=WORDS[digit],
            origin=f"scan {at}",
        )
        (holdout if seen[digit] % _EVERY == _EVERY - 1 else train).append(specimen)
        seen[digit] += 1
    return Collection("image", "handwritten digits of scikit-learn (real scans)", tuple(train), tuple(holdout))


def _png(scan: NDArray[np.float64]) -> bytes:
    pixels = np.clip(np.rint(scan * (255 / _WHITE)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return out.getvalue()
