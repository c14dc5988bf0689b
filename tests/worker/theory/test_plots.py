from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageColor

from service.contract.experiments import Map, Panel
from worker.pages.drawing import GREEN, RED
from worker.theory import plots


def plan(*panels: Panel) -> Map:
    return Map(name="m", title="Ways", walls=[[True, False], [False, False]], panels=list(panels))


def drawn(given: Map) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(plots.draw_map(given))).convert("RGB"))


def filled(image: np.ndarray, colour: str) -> np.ndarray:
    return np.argwhere((image == ImageColor.getrgb(colour)).all(-1))


def drawn_in(image: np.ndarray, colour: str) -> np.ndarray:
    """Find the pixels of a colour; lines are a little paler at their edges."""
    return np.argwhere((np.abs(image.astype(int) - ImageColor.getrgb(colour)) < 50).all(-1))


def test_a_map_draws_any_number_of_panels() -> None:
    panel = Panel(title="up", goal=[(0, 1)], paths=[[(1.5, 0.5), (0.9, 1.2)], [(1.5, 0.5)]], reached=[True, False])
    heights = [len(drawn(plan(*[panel] * num))) for num in (1, 2, 3)]
    assert heights[0] == heights[1] == heights[2] / 2


def test_a_map_shows_walls_goals_and_where_paths_go() -> None:
    """One wall in the upper left, the goal right of it: a path up into it is green, one that stays below is red."""
    into = Panel(title="in", goal=[(0, 1)], paths=[[(1.5, 1.5), (0.5, 1.5)]], reached=[True])
    image = drawn(plan(into))
    wall, goal = (filled(image, colour) for colour in (plots.WALL, plots.GOAL))
    way = drawn_in(image, GREEN)
    side = np.ptp(wall, axis=0)
    assert abs(side[0] - side[1]) <= 2, "cells are squares"
    assert abs(len(wall) - len(goal)) < 0.1 * len(wall), "one cell each, but for the path"
    assert goal[:, 1].min() > wall[:, 1].max()
    assert abs(goal[:, 0].mean() - wall[:, 0].mean()) < 3
    assert way[:, 0].min() < wall[:, 0].max() < way[:, 0].max()
    assert not len(drawn_in(image, RED))

    beside = into.model_copy(update={"paths": [[(1.5, 1.5), (1.5, 0.5)]], "reached": [False]})
    image = drawn(plan(beside))
    assert not len(drawn_in(image, GREEN))
    assert drawn_in(image, RED)[:, 0].min() > wall[:, 0].max()
