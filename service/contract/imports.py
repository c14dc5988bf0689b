"""Where a checkpoint to be imported may lie: a bucket, a hub, or a folder that was set up for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
"""A model of a hub, as org/name."""

OUTSIDE: Final = "checkpoints are imported from the folders that ISTHMUS_IMPORT_FOLDERS names: this is in none of them"


def local_path(source: str) -> Path | None:
    """Return the path on the worker's machine that a source names; None for a bucket or a hub."""
    if HUB_ID.fullmatch(source):
        return None
    scheme, separator, rest = source.partition("://")
    if separator and scheme not in {"file", "local"}:
        return None
    return Path(rest if separator else source)


def is_allowed(path: Path, folders: Sequence[Path]) -> bool:
    """Tell whether a path, with every link on its way followed, lies in one of the folders."""
    try:
        found = path.resolve()
    except (OSError, RuntimeError):  # a name that is too long, links in a circle
        return False
    return any(found.is_relative_to(folder) for folder in folders)
