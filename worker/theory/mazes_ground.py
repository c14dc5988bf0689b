"""Mazes to walk in: walls, motion, shortest ways, and labels that name a whole row or a whole column.

A position is (row, column) in cells, continuous: cell (2, 3) is [2, 3) x [3, 4). A heading is an angle in radians; 0
leads to higher columns, pi / 2 to higher rows. Everybody walks at once: functions take arrays of positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float64, Int64

STEP: Final = 0.5
"""Cells walked in one step, unless a wall is in the way."""
PROBES: Final = 25  # places of a step that are looked at for walls, 2 % of a cell apart
NEIGHBOURS: Final = ((1, 0), (-1, 0), (0, 1), (0, -1))
MAX_STEPS: Final = 400  # of a walk to be learned from; the longest way of these mazes is some 50 cells, 100 steps


@final
@dataclass(frozen=True)
class Maze:
    """A grid of cells, some of them walls. Rows are labels 0, 1, ..., columns the ones after."""

    name: str
    walls: Bool[np.ndarray, "row column"]

    @property
    def num_labels(self) -> int:
        """How many labels there are: one for each row and each column."""
        return sum(self.walls.shape)

    @property
    def cells(self) -> Int64[np.ndarray, "cell 2"]:
        """The cells that are no walls, in order."""
        return np.argwhere(~self.walls)

    def is_free(self, points: Float64[np.ndarray, "*batch 2"]) -> Bool[np.ndarray, "*batch"]:
        """Tell which points are inside the maze and not in a wall."""
        at = np.floor(points).astype(np.int64)
        size = np.array(self.walls.shape)
        is_inside = ((at >= 0) & (at < size)).all(-1)
        row, column = np.moveaxis(np.clip(at, 0, size - 1), -1, 0)
        return is_inside & ~self.walls[row, column]

    def draw_free(self, num: int, rng: np.random.Generator) -> Float64[np.ndarray, "point 2"]:
        """Draw points uniformly over all that is free."""
        return self.cells[rng.integers(len(self.cells), size=num)] + rng.random((num, 2))

    def move(
        self, positions: Float64[np.ndarray, "walker 2"], headings: Float64[np.ndarray, " walker"]
    ) -> Float64[np.ndarray, "walker 2"]:
        """Walk one step straight on; who comes to a wall stays in front of it."""
        shares = np.arange(1, PROBES + 1) / PROBES
        whole = STEP * np.stack([np.sin(headings), np.cos(headings)], 1)
        is_free = self.is_free(positions[:, None] + shares[:, None] * whole[:, None])
        num_free = np.logical_and.accumulate(is_free, axis=1).sum(1)
        return positions + (num_free / PROBES)[:, None] * whole

    def distances(self, goals: Bool[np.ndarray, "row column"]) -> Float64[np.ndarray, "row column"]:
        """Count the steps from each cell to the nearest goal, to a side at a time (breadth first); infinite: no way."""
        found = np.where(goals & ~self.walls, 0.0, np.inf)
        reached = np.isfinite(found)
        for distance in range(1, self.walls.size):
            beside = np.zeros_like(reached)
            beside[1:] |= reached[:-1]
            beside[:-1] |= reached[1:]
            beside[:, 1:] |= reached[:, :-1]
            beside[:, :-1] |= reached[:, 1:]
            new = beside & ~reached & ~self.walls
            if not new.any():
                break
            found[new] = distance
            reached |= new
        return found

    def labels_of(self, points: Float64[np.ndarray, "point 2"]) -> Int64[np.ndarray, "point 2"]:
        """Return both labels that hold at each point: its row's and its column's."""
        return np.floor(points).astype(np.int64) + np.array([0, len(self.walls)])

    def satisfies(
        self, points: Float64[np.ndarray, "point 2"], labels: Int64[np.ndarray, " point"]
    ) -> Bool[np.ndarray, " point"]:
        """Tell which points lie in the row or column that is asked of them."""
        return (self.labels_of(points) == labels[:, None]).any(1)

    def area(self, label: int) -> Bool[np.ndarray, "row column"]:
        """Return the free cells of a label."""
        rows, _ = self.walls.shape
        found = np.zeros_like(self.walls)
        if label < rows:
            found[label] = True
        else:
            found[:, label - rows] = True
        return found & ~self.walls


def _blank() -> Maze:
    return Maze("blank", np.zeros((10, 10), dtype=bool))


def _fork() -> Maze:
    walls = np.zeros((15, 15), dtype=bool)
    walls[1:14:2, :10] = True
    return Maze("fork", walls)


def _island() -> Maze:
    walls = np.zeros((11, 11), dtype=bool)
    walls[3:8, 5:7] = True
    return Maze("island", walls)


BLANK: Final = _blank()
"""10 x 10 without walls."""
FORK: Final = _fork()
"""15 x 15: eight corridors of 10 cells that open to one hall."""
ISLAND: Final = _island()
"""11 x 11 with a block of 5 x 2 in the middle."""
MAZES: Final = (BLANK, FORK, ISLAND)


@final
@dataclass(frozen=True)
class Walks:
    """Walks to random cells. Walk i has `lengths[i]` steps and one position more; what follows repeats the last."""

    positions: Float64[np.ndarray, "walk time 2"]
    headings: Float64[np.ndarray, "walk step"]
    lengths: Int64[np.ndarray, " walk"]

    def draw(
        self, num: int, reach: float, rng: np.random.Generator
    ) -> tuple[Float64[np.ndarray, "pair 4"], Float64[np.ndarray, "pair 2"]]:
        """Draw a state with the direction taken in it, and where that walk was a number of steps later.

        The number is geometric with mean `reach`, and what is beyond the end is the end: the discounted future of
        contrastive reinforcement learning (Eysenbach et al. 2022).
        """
        walk = rng.integers(len(self.lengths), size=num)
        at = np.floor(rng.random(num) * self.lengths[walk]).astype(np.int64)
        future = np.minimum(at + rng.geometric(1 / reach, size=num), self.lengths[walk])
        return state_actions(self.positions[walk, at], self.headings[walk, at]), self.positions[walk, future]


def state_actions(
    positions: Float64[np.ndarray, "walker 2"], headings: Float64[np.ndarray, " walker"]
) -> Float64[np.ndarray, "walker 4"]:
    """Join positions and headings, a heading as its unit vector."""
    return np.concatenate([positions, np.sin(headings)[:, None], np.cos(headings)[:, None]], 1)


def draw_walks(
    maze: Maze, num: int, rng: np.random.Generator, check: Callable[[], None], *, noise: float = math.radians(10)
) -> Walks:
    """Walk from centres of cells to other cells along breadth-first ways, with normal noise on every heading (radians).

    At each step the next cell is the first of `NEIGHBOURS` that is nearer to the goal: rows first, then columns.
    """
    cells = maze.cells
    goals = np.zeros((len(cells), *maze.walls.shape), dtype=bool)
    goals[np.arange(len(cells)), cells[:, 0], cells[:, 1]] = True
    distances = np.stack([maze.distances(goal) for goal in goals])  # (goal, row, column)
    beside = np.pad(distances, ((0, 0), (1, 1), (1, 1)), constant_values=np.inf)

    start = rng.integers(len(cells), size=num)
    goal = (start + rng.integers(1, len(cells), size=num)) % len(cells)  # another one
    position = cells[start] + 0.5
    sides = np.array(NEIGHBOURS)
    lengths = np.zeros(num, dtype=np.int64)
    positions, headings = [position], []
    walking = np.arange(num)
    for step in range(MAX_STEPS):
        check()
        here = np.floor(position[walking]).astype(np.int64)
        there = here[:, None] + sides  # (walker, side, 2)
        nearest = beside[goal[walking, None], there[..., 0] + 1, there[..., 1] + 1].argmin(1)
        to = there[np.arange(len(walking)), nearest] + 0.5 - position[walking]
        heading = np.zeros(num)
        heading[walking] = np.arctan2(to[:, 0], to[:, 1]) + noise * rng.normal(size=len(walking))
        position = position.copy()
        position[walking] = maze.move(position[walking], heading[walking])
        positions.append(position)
        headings.append(heading)
        lengths[walking] = step + 1
        arrived = np.floor(position[walking]).astype(np.int64)
        walking = walking[(arrived != cells[goal[walking]]).any(1)]
        if not len(walking):
            break
    return Walks(np.stack(positions, 1), np.stack(headings, 1), lengths)
