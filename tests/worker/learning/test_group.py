from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worker.learning.group import ALONE

ROOT = Path(__file__).resolve().parents[3]
STEP = """
import json, sys
from datetime import timedelta
import numpy as np, torch
from pydantic import TypeAdapter
from torch import distributed
from torch.nn import functional
from service.contract.losses import Loss
from service.contract.towers import Tower
from worker.learning import caching, grouping, losses, towers
from worker.learning.group import ALONE, Group
from worker.learning.ragged import Ragged

rank, size, folder, cases = json.loads(sys.argv[1])
torch.set_num_threads(1)
group = ALONE
if size > 1:
    store = distributed.FileStore(folder + "/store", size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    group = Group(rank, size, store)
def step(config, micro_batch):
    config = TypeAdapter(Loss).validate_python(config)
    tokens = {"kind": "continuous", "dim": 3, "max_length": 12}
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        tower = Tower.model_validate({"tokens": tokens, "width": 16, "depth": 1})
        models.append(towers.build(tower, None, 8).double())
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -1.0))
    rng = np.random.default_rng(0)
    sides = []
    for model in models:
        lengths = rng.integers(1, 13, 12)
        values = torch.from_numpy(rng.normal(size=(lengths.sum(), 3)))
        whole = Ragged(values, torch.from_numpy(lengths))
        own = whole.take(range(12)[group.share.rows(12)])
        parts = grouping.plan(grouping.Lengths(own), micro_batch)
        run = lambda part, model=model: functional.normalize(model(part), dim=-1)
        sides.append(caching.encode(run, own, parts, torch.device("cpu"), learns=True, cached=True, draws=False))
    z_a, z_b = (side.z for side in sides)
    loss = losses.compute(config, z_a, z_b, scale, bias, gathered=group.gather(z_a, z_b))
    loss.backward()
    for side in sides:
        side.backward()
    parameters = [*models[0].parameters(), *models[1].parameters(), scale, bias]
    loss = group.average(loss, parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    return torch.cat([loss.reshape(1), flat]).numpy()


np.savez(f"{folder}/{size}-{rank}.npz", *(step(config, micro_batch) for config, micro_batch in cases))
"""


CASES: list[tuple[dict[str, Any], int | None]] = [
    ({"kind": "info_nce"}, None),
    ({"kind": "info_nce", "attract": 0.3}, 4),
    ({"kind": "k_sample", "candidates": 3}, 2),
    ({"kind": "sigmoid"}, 4),
]


def test_the_gradient_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """In float64, with uneven lengths, loss and all gradients; both ranks hold the same."""
    started = [
        subprocess.Popen([sys.executable, "-c", STEP, json.dumps([rank, size, str(tmp_path), CASES])], cwd=ROOT)
        for rank, size in ((0, 1), (0, 2), (1, 2))
    ]
    assert [process.wait(100) for process in started] == [0, 0, 0]
    found = [np.load(tmp_path / f"{name}.npz") for name in ("1-0", "2-0", "2-1")]
    for at in range(len(CASES)):
        one, first, second = (arrays[f"arr_{at}"] for arrays in found)
        assert np.abs(one).max() > 1e-2
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, one, rtol=1e-6, atol=1e-9)


def test_a_single_process_shares_nothing_and_draws_on() -> None:
    torch.manual_seed(1)
    stands = torch.get_rng_state()
    ALONE.seed_step(3, 4)
    assert torch.equal(torch.get_rng_state(), stands)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    assert float(ALONE.average(torch.tensor(5.0, requires_grad=True), [parameter])) == 5.0
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert ALONE.gather(torch.ones(2, 2), torch.ones(2, 2)) is None
    assert ALONE.share.rows(8) == slice(0, 8)
