"""That the peers of the benchmark sum the same, and that it knows what fits."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compose
from benchmarks.composing import served, sums

SMALL = sums.Sizes(sources=4, bridge=300, targets=700, dim=16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def operands(tmp_path: Path) -> sums.Operands:
    np.save(tmp_path / "targets.npy", sums.draw(SMALL.targets, SMALL.dim, 3).numpy())
    return sums.Operands(SMALL, tmp_path / "targets.npy", CPU)


def test_what_is_streamed_is_the_sum_over_a_tensor_of_everything(operands: sums.Operands) -> None:
    for num in (1, SMALL.targets):
        torch.testing.assert_close(
            sums.run("fixed", operands, num).float(), sums.run("broadcast", operands, num), atol=1e-4, rtol=1e-4
        )


def test_a_file_is_ranked_as_a_service_answers(operands: sums.Operands) -> None:
    torch.testing.assert_close(
        sums.run("ranked", operands, SMALL.targets).float(), sums.run("answered", operands, SMALL.targets)
    )


def test_the_plain_products_are_of_the_same_matrices(operands: sums.Operands) -> None:
    expected = operands.source @ operands.bridge.T @ operands.bridge @ operands.target.T
    torch.testing.assert_close(sums.run("products", operands, SMALL.targets), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(sums.run("bf16", operands, SMALL.targets), expected, atol=0.5, rtol=0.1)


def test_every_peer_tells_its_time_and_its_memory(operands: sums.Operands) -> None:
    for kind in compose.NAMES:
        told = sums.measure(kind, operands, SMALL.targets)
        assert told["ms"] > 0
        assert told["peak"] >= 0 or sys.platform != "linux"
        assert np.isfinite(told["mean"])


def test_the_tensor_of_everything_fits_in_the_memory_that_it_may_take() -> None:
    sizes = sums.Sizes(sources=64, bridge=10_000, targets=100_000)
    assert compose.targets_within(10e9, sizes) == 1024
    assert compose.targets_within(1e15, sizes) == 100_000
    assert compose.targets_within(0, sizes) == 1


def test_samples_have_what_they_are_asked_for() -> None:
    with tarfile.open(fileobj=io.BytesIO(served.tar(3, ("text", "mark"), seed=0))) as found:
        assert found.getnames() == ["0.txt", "0.mark.ids.npy", "1.txt", "1.mark.ids.npy", "2.txt", "2.mark.ids.npy"]


def test_without_a_gpu_the_device_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["compose", "--device", "cuda"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        compose.main()
