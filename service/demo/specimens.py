"""What the demo's data sets hold, and how they are written: WebDataset tars, one pair of modalities each."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Medium = Literal["image", "audio"]
EXTENSIONS: Final[dict[Medium, str]] = {"image": "png", "audio": "wav"}
MEDIA_TYPES: Final[dict[Medium, str]] = {"image": "image/png", "audio": "audio/wav"}


@dataclass(frozen=True)
class Specimen:
    """One encoded image or sound with its caption, its class for the evaluation, and where it came from."""

    key: str
    payload: bytes
    caption: str
    label: str
    origin: str = ""


@dataclass(frozen=True)
class Collection:
    """All that the demo has of one medium: what is learned from, and what is kept for questions."""

    medium: Medium
    source: str
    train: tuple[Specimen, ...]
    holdout: tuple[Specimen, ...]


def write_tar(path: Path, collection: Collection) -> None:
    """Write a collection as a WebDataset tar: `.png` or `.wav`, `.txt`, `.cls` and a `.json` that names the split."""
    extension = EXTENSIONS[collection.medium]
    with tarfile.open(path, "w") as tar:
        for split, specimens in (("train", collection.train), ("holdout", collection.holdout)):
            for specimen in specimens:
                key = f"{split}-{specimen.key}"  # a user's two tars may number their samples alike
                about = {"split": split, "origin": specimen.origin}
                _add(tar, f"{key}.{extension}", specimen.payload)
                _add(tar, f"{key}.txt", specimen.caption.encode())
                _add(tar, f"{key}.cls", specimen.label.encode())
                _add(tar, f"{key}.json", json.dumps(about).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))


def read_tar(path: Path, medium: Medium) -> tuple[list[Specimen], list[Specimen]]:
    """Read the specimens of a WebDataset tar, in order: those to learn from, and those held out by their `.json`.

    Raises ValueError naming the file if it holds no specimen with a payload, a caption and a class.
    """
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path, "r") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key, _, extension = name.partition(".")
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                parts.setdefault(f"{folder}/{key}" if folder else key, {})[extension.lower()] = content.read()
    wanted = EXTENSIONS[medium]
    train: list[Specimen] = []
    holdout: list[Specimen] = []
    for key, part in parts.items():
        if {wanted, "txt", "cls"} <= part.keys():
            about = json.loads(part.get("json", b"{}"))
            specimen = Specimen(
                key=key.replace("/", "-"),
                payload=part[wanted],
                caption=part["txt"].decode().strip(),
                label=part["cls"].decode().strip(),
                origin=str(about.get("origin", "")),
            )
            (holdout if about.get("split") == "holdout" else train).append(specimen)
    if not train and not holdout:
        msg = f"{path}: no sample has a .{wanted}, a .txt and a .cls member"
        raise ValueError(msg)
    return train, holdout


def thin(specimens: Iterable[Specimen], at_most: int) -> tuple[Specimen, ...]:
    """Keep at most so many specimens, evenly spaced over the classes and the order within each."""
    by_label: dict[str, list[Specimen]] = {}
    for specimen in specimens:
        by_label.setdefault(specimen.label, []).append(specimen)
    share = max(1, at_most // max(1, len(by_label)))
    kept: list[Specimen] = []
    for label in sorted(by_label):
        group = by_label[label]
        step = max(1.0, len(group) / share)
        kept.extend(group[int(at * step)] for at in range(min(share, len(group))))
    return tuple(kept)
