"""Learning from a folder of WebDataset tars instead.

Either `{image,audio}-text.tar`, where a `.json` member names the split of each sample, or
`{image,audio}-text-{train,test}.tar`.
"""

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
    whole = folder / f"{medium}-text.tar"
    try:
        if whole.exists():
            train, holdout = read_tar(whole, medium)
        else:
            train = [each for part in read_tar(folder / f"{medium}-text-train.tar", medium) for each in part]
            holdout = [each for part in read_tar(folder / f"{medium}-text-test.tar", medium) for each in part]
    except FileNotFoundError as error:
        msg = f"{folder} needs {whole.name}, or {medium}-text-train.tar and {medium}-text-test.tar"
        raise DemoError(msg) from error
    except (tarfile.TarError, UnicodeDecodeError, ValueError) as error:
        raise DemoError(str(error)) from error
    if not train or not holdout:
        msg = f"{whole}: a .json member with the split, train or holdout, has to name some samples of each"
        raise DemoError(msg)
    kind = "images" if medium == "image" else "sounds"
    return Collection(medium, f"{kind} of {folder}", thin(train, MAX_TRAIN), thin(holdout, MAX_HOLDOUT))
