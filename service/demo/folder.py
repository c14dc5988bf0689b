"""Learning from a folder of WebDataset tars instead: {image,audio}-text-{train,test}.tar, the test ones held out."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Final

from service.demo.client import DemoError
from service.demo.specimens import Collection, Medium, read_tar, thin

MAX_TRAIN: Final = 10_000
MAX_HOLDOUT: Final = 500


def read_folder(folder: Path) -> tuple[Collection, Collection]:
    """Read the images and the sounds of a folder, thinned to what a few minutes can learn from.

    Raises DemoError naming what is missing or unusable.
    """
    images, sounds = _read(folder, "image"), _read(folder, "audio")
    if not {each.label for each in images.holdout} & {each.label for each in sounds.holdout}:
        msg = f"{folder}: the images and the sounds have no class in common, so no answer could be right"
        raise DemoError(msg)
    return images, sounds


def _read(folder: Path, medium: Medium) -> Collection:
    paths = {split: folder / f"{medium}-text-{split}.tar" for split in ("train", "test")}
    try:
        train, test = read_tar(paths["train"], medium), read_tar(paths["test"], medium)
    except FileNotFoundError as error:
        msg = f"{folder} needs {paths['train'].name} and {paths['test'].name}; {error.filename} is missing"
        raise DemoError(msg) from error
    except (tarfile.TarError, UnicodeDecodeError, ValueError) as error:
        raise DemoError(str(error)) from error
    kind = "images" if medium == "image" else "sounds"
    return Collection(medium, f"{kind} of {folder}", thin(train, MAX_TRAIN), thin(test, MAX_HOLDOUT))
