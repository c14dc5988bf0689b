from __future__ import annotations

from service.contract.experiments import Map, Panel
from worker.theory import plots


def test_a_map_draws_any_number_of_panels() -> None:
    panel = Panel(title="up", goal=[(0, 1)], paths=[[(1.5, 0.5), (0.9, 1.2)], [(1.5, 0.5)]], reached=[True, False])
    for num in (1, 2, 3):
        plan = Map(name="m", title="Ways", walls=[[True, False], [False, False]], panels=[panel] * num)
        assert plots.draw_map(plan).startswith(b"\x89PNG")
