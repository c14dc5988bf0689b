from __future__ import annotations

import pytest
import torch

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
