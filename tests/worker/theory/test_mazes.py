from __future__ import annotations

import numpy as np
import pytest

from service.contract.errors import Cancelled
from worker.theory import mazes, mazes_policies
from worker.theory.findings import Outcome, Setting
from worker.theory.mazes_ground import MAZES, STEP


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that learn nearly nothing."""
    for name, value in {"STEPS": 100, "NUM_WALKS": 100, "EPISODES": 400, "MAX_STEPS": 15, "BRIDGE": 50}.items():
        monkeypatch.setattr(mazes, name, value)
    monkeypatch.setattr(mazes_policies, "BATCH_SIZE", 16)


def nothing() -> None:
    """Stop nothing."""


def ran(*seeds: int) -> tuple[Outcome, int]:
    """Run a tenth of it, and count its steps of progress."""
    done: list[None] = []
    outcome = mazes.run(Setting(seeds, quick=True, step=lambda: done.append(None), check=nothing))
    return outcome, len(done)


def test_the_claim_is_judged_by_the_difference_of_both_policies_in_each_maze() -> None:
    outcome, num_steps = ran(3, 4)
    assert num_steps == mazes.num_runs(2)
    found = {each.name: each for each in outcome.findings}
    bars = {name: (each.bar.relation, each.bar.over, each.bar.bound) for name, each in found.items() if each.bar}
    assert bars == {
        "blank: success, marginal minus direct": ("at least", "mean", 0.20),
        "blank: success, marginal": ("at least", "mean", 0.85),
        "fork: success, marginal minus direct": ("at least", "mean", 0.15),
        "island: success, marginal minus direct": ("at least", "mean", 0.10),
    }
    for maze in MAZES:
        direct, summed = (np.array(found[f"{maze.name}: success, {name}"].per_seed) for name in ("direct", "marginal"))
        assert found[f"{maze.name}: success, marginal minus direct"].per_seed == (summed - direct).tolist()
        for policy in ("random", "direct", "marginal", "normalised"):
            success, spl = (np.array(found[f"{maze.name}: {what}, {policy}"].per_seed) for what in ("success", "SPL"))
            assert ((spl > 0) & (spl <= success) & (success < 1)).all()
            assert np.allclose(success * 40, np.round(success * 40)), "shares of 40 episodes"


def test_the_drawn_ways_are_ways_through_the_maze_to_what_is_asked() -> None:
    outcome, _ = ran(0, 1)
    assert [plan.name for plan in outcome.maps] == ["ways-blank", "ways-fork", "ways-island"], "the first seed's"
    for maze, plan in zip(MAZES, outcome.maps, strict=True):
        assert np.array_equal(plan.walls, maze.walls)
        assert [panel.title.split(",")[0] for panel in plan.panels] == ["direct", "marginal"] * 2
        assert any(any(panel.reached) for panel in plan.panels)
        for panel in plan.panels:
            what, number = panel.title.rsplit(" ", 2)[1:]
            lines = {cell[0 if what == "row" else 1] for cell in panel.goal}
            assert lines == {int(number)}, "the goal is one row or one column"
            assert len(panel.goal) == (~maze.walls if what == "row" else ~maze.walls.T)[int(number)].sum()
            assert panel.paths
            for path, is_there in zip(panel.paths, panel.reached, strict=True):
                cells = [(int(row), int(column)) for row, column in path]
                assert not any(maze.walls[cell] for cell in cells)
                assert [cell in panel.goal for cell in cells] == [False] * (len(cells) - 1) + [is_there]
                assert (np.linalg.norm(np.diff(path, axis=0), axis=1) <= STEP + 2e-3).all()
        for direct, marginal in (plan.panels[:2], plan.panels[2:]):
            assert [path[0] for path in direct.paths] == [path[0] for path in marginal.paths], "from the same places"


def test_the_same_seed_finds_the_same_whatever_seeds_are_beside_it() -> None:
    both, _ = ran(5, 6)
    alone, _ = ran(6)
    assert [each.per_seed[1:] for each in both.findings] == [each.per_seed for each in alone.findings]
    for each in both.findings:
        if each.name.endswith("SPL, random"):
            assert each.per_seed[0] != each.per_seed[1], "other episodes for another seed"


def test_it_stops_in_the_middle_of_any_part() -> None:
    """Between two checks is never more than a hundred steps of training or one step of all walkers."""
    checks: list[None] = []

    def count() -> None:
        checks.append(None)

    mazes.run(Setting((0,), quick=True, step=nothing, check=count))
    assert len(checks) > 100
    for allowed in (0, len(checks) // 2, len(checks) - 1):
        checks.clear()

        def stop(allowed: int = allowed) -> None:
            count()
            if len(checks) > allowed:
                raise Cancelled

        with pytest.raises(Cancelled):
            mazes.run(Setting((0,), quick=True, step=nothing, check=stop))
        assert len(checks) == allowed + 1
