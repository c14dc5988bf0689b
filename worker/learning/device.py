"""Where a job computes, how exactly, and what it means when the device gives up."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

from service.contract.errors import Transient

Precision = Literal["auto", "fp32", "bf16"]


def choose_device(name: str) -> torch.device:
    """Return the device of a setting: `auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def precision_of(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context to run a tower in: bf16 autocast where the recipe asks for it, or on CUDA by default."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def be_deterministic(device: torch.device) -> None:
    """Use deterministic algorithms: always on the CPU, on CUDA where the environment sets CUBLAS_WORKSPACE_CONFIG.

    cuBLAS is deterministic only with a workspace of its own, and that has to be set before the process starts.
    """
    if device.type == "cpu" or "CUBLAS_WORKSPACE_CONFIG" in os.environ:
        torch.use_deterministic_algorithms(mode=True)
        # An aid for finding reads of unset memory, on by default and 5 % of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def failure_of(error: BaseException) -> Transient | None:
    """Return what a job fails with for want of memory or for a device that is no longer usable; None for other errors.

    Both may pass: memory is shared, and the context of a device dies with its process.
    """
    text = str(error)
    short = text.partition("\n")[0][:300]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "CUDA error: out of memory" in text or "_ALLOC_FAILED" in text)
    ):
        return Transient(f"out of memory: {short or 'the host has no more'}", code="out_of_memory")
    if isinstance(error, RuntimeError) and "CUDA error" in text:
        return Transient(f"the device failed: {short}", code="device_failed")
    return None


@contextmanager
def blaming(batch_size: int) -> Generator[None]:
    """Name the batch size where a step runs out of memory.

    Raises Transient (`out_of_memory`).
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failure = failure_of(error)
        if failure is None or failure.code != "out_of_memory":
            raise
        message = f"a step with batch_size {batch_size} does not fit; a smaller one needs less ({failure.message})"
        raise Transient(message, code=failure.code) from error
