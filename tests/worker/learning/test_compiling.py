from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from service.contract.recipe import Recipe
from worker.learning.compiling import compile_towers
from worker.learning.model import MultiTower
from worker.learning.ragged import Ragged

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


def build(recipe: Recipe) -> MultiTower:
    torch.manual_seed(0)
    return MultiTower(recipe, {"text": 260, "codes": 24})


def imu(*lengths: int) -> Ragged:
    return Ragged(torch.randn(sum(lengths), 3), torch.tensor(lengths))


@pytest.mark.parametrize("wanted", ["auto", "never"])
def test_on_the_cpu_nothing_is_compiled_that_nobody_asked_for(wanted: str, recipe: MakeRecipe, bench: Any) -> None:
    made = recipe(compute={"compile": wanted}, budget={"steps": 1_000_000})
    model = build(made)
    compile_towers(model, made, CPU, bench.context("job_c"))
    assert bench.said("job_c", "event") == []


@pytest.mark.filterwarnings("ignore")
def test_without_a_compiler_a_run_goes_on_and_says_so(
    recipe: MakeRecipe, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "fx_graph_cache", False)
    made = recipe(compute={"compile": "always"})
    model, plain = build(made), build(made)
    compile_towers(model, made, CPU, bench.context("job_c"))
    (event,) = bench.said("job_c", "event")
    assert event["type"] == "not_compiled"
    assert "no-such-compiler" in event["detail"]["reason"]
    batch = imu(3, 5)
    assert torch.equal(model.encode("imu", batch), plain.encode("imu", batch))


SCRIPT = """
import sys
import torch
from service.contract.recipe import Recipe
from worker.learning.compiling import compile_towers
from worker.learning.model import MultiTower
from worker.learning.ragged import Ragged

class Context:
    def event(self, kind, detail):
        print(kind)

recipe = Recipe.model_validate_json(sys.argv[1])
models = []
for _ in range(2):
    torch.manual_seed(0)
    models.append(MultiTower(recipe, {"text": 260, "codes": 24}))
compile_towers(models[0], recipe, torch.device("cpu"), Context())
assert models[0].state_dict().keys() == models[1].state_dict().keys()
for lengths in ((3, 5, 2), (4, 4), (8, 1, 1, 7)):
    batch = Ragged(torch.randn(sum(lengths), 3), torch.tensor(lengths))
    z, expected = (model.encode("imu", batch) for model in models)
    torch.testing.assert_close(z, expected, atol=1e-5, rtol=1e-5)
for vectors in (z, expected):
    vectors[:, 0].sum().backward()
for one, other in zip(*(model.parameters() for model in models)):
    if other.grad is not None:
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
"""


@pytest.mark.slow
def test_compiled_blocks_give_the_same_vectors_and_gradients_under_the_same_names(recipe: MakeRecipe) -> None:
    """In a process of its own: what checks shapes in these tests cannot be compiled."""
    made = recipe(compute={"compile": "always"})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, made.model_dump_json()], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr
