from __future__ import annotations

import pytest
import torch
from torch import nn

from service.contract.recipe import Optimiser
from worker.learning import optim

CONFIG = Optimiser(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)


def test_the_rate_warms_up_then_falls_along_half_a_cosine() -> None:
    rates = [optim.learning_rate(CONFIG, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_a_run_shorter_than_the_warm_up_still_reaches_the_rate() -> None:
    assert optim.learning_rate(CONFIG, 3, 4) == pytest.approx(1.0)


def test_only_matrices_decay() -> None:
    modules = nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.LayerNorm(3)})
    modules.register_parameter("positions", nn.Parameter(torch.ones(4, 3)))
    modules.register_parameter("log_scale", nn.Parameter(torch.ones(())))
    names = {id(parameter): name for name, parameter in modules.named_parameters()}
    decayed, plain = optim.build(Optimiser(), modules.named_parameters()).param_groups
    assert [names[id(parameter)] for parameter in decayed["params"]] == ["linear.weight"]
    assert decayed["weight_decay"] > 0
    assert plain["weight_decay"] == 0
    assert {"positions", "log_scale"} <= {names[id(parameter)] for parameter in plain["params"]}


def test_what_does_not_learn_is_left_alone() -> None:
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimiser = optim.build(Optimiser(), [("frozen", frozen), ("free", nn.Parameter(torch.ones(2, 2)))])
    assert sum(len(group["params"]) for group in optimiser.param_groups) == 1


def test_the_rate_is_set_in_all_groups() -> None:
    optimiser = optim.build(Optimiser(), [("a", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(2)))])
    optim.set_learning_rate(optimiser, 0.25)
    assert [group["lr"] for group in optimiser.param_groups] == [0.25, 0.25]
