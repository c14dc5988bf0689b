"""Tensors as safetensors files, with the errors of a disk as Python knows them."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors of the CPU to a file.

    Raises OSError as any write does; the library itself has one error for a full disk and for a bug of ours.
    """
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error
