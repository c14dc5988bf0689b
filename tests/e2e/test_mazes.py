"""Policies of a maze as plain composition: states, actions and labels are tokens like any others to the service."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.recipe import Recipe
from worker.composition import estimators
from worker.learning import critics
from worker.theory import mazes_policies as policies
from worker.theory.mazes_ground import BLANK, state_actions

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "mazes"
NUM_LABELS = BLANK.num_labels


def example() -> Any:
    spec = importlib.util.spec_from_file_location("mazes_example", EXAMPLE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_of_the_example() -> dict[str, Any]:
    return json.loads((EXAMPLE / "recipe.json").read_text(encoding="utf-8"))


def test_the_recipe_never_joins_an_action_with_a_label() -> None:
    recipe = recipe_of_the_example()
    for pair in recipe["pairs"]:
        pair["dataset"] = f"ds_{pair['dataset']}"
    read = Recipe.model_validate(recipe)
    assert sorted(sorted(pair.modalities) for pair in read.pairs) == [["label", "state"], ["state", "state_action"]]
    assert read.critic == policies.LOSS.critic
    assert {each.tokens.kind for each in read.towers.values()} == {"continuous", "discrete"}


def test_a_heading_is_chosen_by_composing_tokens(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directly, over the bank and over given states; what is answered is the policy of the model's own vectors."""
    run = example()
    monkeypatch.setattr(run, "NUM_WALKS", 50)
    monkeypatch.setattr(run, "MAX_STEPS", 3)
    recipe = recipe_of_the_example()
    for tower in recipe["towers"].values():
        tower |= {"width": 16, "depth": 1}
    recipe |= {"budget": {"steps": 30, "batch_size": 32, "log_every": 10}, "bank": {"size": 64}}
    rng = np.random.default_rng(0)
    places, labels, bridge = BLANK.draw_free(3, rng), np.array([2, 14, 7]), BLANK.draw_free(40, rng)
    acting = state_actions(np.repeat(places, 8, 0), np.tile(policies.HEADINGS, 3)).astype(np.float32)
    items = {
        "state_action": [run.tokens("state_action", [row]) for row in acting.tolist()],
        "state": [run.tokens("state", [row]) for row in bridge.astype(np.float32).tolist()],
        "label": [run.tokens("label", [label]) for label in range(NUM_LABELS)],
    }
    with serve(tmp_path / "data") as running:
        service = run.Service(running.http)
        found = run.measure(service, BLANK, recipe, 200, 4)
        assert found.keys() == {"random", "direct", "marginal"}
        assert all(0 <= each["spl"] <= each["success"] <= 1 for each in found.values())
        scales = running.get("/v1/models/mazes-blank")["logit_scales"]
        z = {
            name: torch.tensor([each["embedding"] for each in running.post("/v1/embeddings", body)["data"]])
            for name, body in ((name, {"model": "mazes-blank", "input": given}) for name, given in items.items())
        }
        question = {
            "model": "mazes-blank",
            "source": items["state_action"],
            "target": items["label"],
            "top_k": NUM_LABELS,
        }

        def ask(**more: Any) -> torch.Tensor:
            found = torch.empty(len(acting), NUM_LABELS)
            for each in running.post("/v1/compose", question | more)["data"]:
                for match in each["matches"]:
                    found[each["index"], match["index"]] = match["score"]
            return found

        def best(scores: torch.Tensor) -> list[int]:
            return scores.unflatten(0, (3, 8))[torch.arange(3), :, torch.from_numpy(labels)].argmax(1).tolist()

        direct = ask(method="direct")
        assert torch.allclose(direct, estimators.direct("squared_distance", z["state_action"], z["label"]), atol=1e-3)
        f_ab = scales["state+state_action"] * critics.scores("squared_distance", z["state_action"], z["state"])
        f_bc = scales["label+state"] * critics.scores("squared_distance", z["state"], z["label"])
        summed = estimators.marginal(f_ab, f_bc, normalise=True).log_ratio
        assert torch.allclose(ask(method="marginal", through=items["state"]).double(), summed, atol=1e-3)
        for method, scores in (("direct", direct), ("marginal", ask(method="marginal", through="state"))):
            assert service.policy("mazes-blank", BLANK, method)(places, labels).tolist() == best(scores)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_composing_tokens_finds_the_way(serve: Any, tmp_path: Path) -> None:
    with serve(tmp_path / "data") as running:
        done = subprocess.run(
            [sys.executable, EXAMPLE / "run.py", "--url", running.url, "--out", tmp_path / "found.json"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["marginal"]["success"] >= 0.85
    assert found["marginal"]["success"] >= max(found[name]["success"] for name in ("direct", "random")) + 0.2
    assert all(math.isfinite(each["spl"]) for each in found.values())
