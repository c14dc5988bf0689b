from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from service.contract.errors import Transient
from tests.supervisors import ROOT
from worker.learning import device
from worker.learning.device import Precision, choose_device, precision_of


def test_auto_takes_what_there_is() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_half_precision_on_the_cpu_only_if_asked_for(precision: Precision, expected: torch.dtype) -> None:
    with precision_of(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), "device_failed"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device_failed"),
    ],
)
def test_want_of_memory_and_a_failed_device_may_pass(error: BaseException, code: str) -> None:
    failure = device.failure_of(error)
    assert failure is not None
    assert failure.code == code
    assert "\n" not in failure.message


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    failure = device.failure_of(refused.value)
    assert failure is not None
    assert failure.code == "out_of_memory"


def test_other_errors_are_bugs() -> None:
    assert device.failure_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    with pytest.raises(RuntimeError, match="shapes"), device.blaming(8):
        torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_step_that_does_not_fit_names_its_batch_size() -> None:
    with pytest.raises(Transient, match="batch_size 512 does not fit") as failure, device.blaming(512):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert failure.value.code == "out_of_memory"


@pytest.mark.gpu
def test_a_step_that_a_gpu_has_no_memory_for_names_its_batch_size() -> None:
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        with pytest.raises(Transient, match="batch_size 4096 does not fit") as failure, device.blaming(4096):
            torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failure.value.code == "out_of_memory"


@pytest.mark.gpu
def test_a_context_that_an_assertion_on_the_gpu_broke_is_a_failed_device() -> None:
    """In a process of its own: nothing can be computed there afterwards."""
    code = (
        "import torch; from worker.learning.device import failure_of\n"
        "try:\n"
        "    torch.zeros(4, device='cuda')[torch.tensor([9], device='cuda')].cpu()\n"
        "except RuntimeError as error:\n"
        "    print(failure_of(error).code)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["device_failed"]
