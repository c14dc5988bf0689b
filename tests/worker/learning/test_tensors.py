from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from worker.learning.tensors import save_tensors


def test_a_disk_that_is_full_is_an_os_error_with_its_number(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="weights") as failure:
            save_tensors({"a": torch.zeros(1000)}, tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failure.value.errno == errno.EFBIG


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(3)}, tmp_path / "weights")
    assert torch.equal(load_file(tmp_path / "weights")["a"], torch.arange(3))


def test_a_folder_that_is_missing_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "nowhere" / "weights")
