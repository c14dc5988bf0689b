from __future__ import annotations

import itertools
import math
from collections import deque

import numpy as np
import pytest

from service.contract.errors import Cancelled
from worker.theory.mazes_ground import BLANK, FORK, ISLAND, MAZES, NEIGHBOURS, STEP, Maze, draw_walks

DOWN, UP, RIGHT = math.pi / 2, -math.pi / 2, 0.0


def nothing() -> None:
    """Stop nothing."""


def one_by_one(maze: Maze, goal: tuple[int, int]) -> np.ndarray:
    """Count steps breadth first, a cell at a time."""
    found = np.full(maze.walls.shape, np.inf)
    found[goal] = 0
    queue = deque([goal])
    while queue:
        here = queue.popleft()
        for row, column in NEIGHBOURS:
            there = here[0] + row, here[1] + column
            if (
                all(0 <= at < size for at, size in zip(there, found.shape, strict=True))
                and not maze.walls[there]
                and np.isinf(found[there])
            ):
                found[there] = found[here] + 1
                queue.append(there)
    return found


def test_the_mazes_are_as_large_as_the_papers() -> None:
    assert [maze.walls.shape for maze in MAZES] == [(10, 10), (15, 15), (11, 11)]
    assert [int(maze.walls.sum()) for maze in MAZES] == [0, 70, 10]
    assert [maze.num_labels for maze in MAZES] == [20, 30, 22]


def test_a_step_is_half_a_cell_and_walls_and_borders_stop_it() -> None:
    start = np.array([[2.5, 5.5], [0.2, 0.2], [2.9, 5.5], [5.5, 4.9]])
    after = ISLAND.move(start, np.array([RIGHT, UP, DOWN, RIGHT]))
    assert np.allclose(after[0], [2.5, 6.0])
    assert 0 <= after[1, 0] < 0.02
    assert 2.98 <= after[2, 0] < 3, "a wall begins at row 3"
    assert 4.98 <= after[3, 1] < 5, "and at column 5"


def test_nobody_gets_into_a_wall_or_further_than_a_step() -> None:
    rng = np.random.default_rng(0)
    for maze in MAZES:
        position = maze.draw_free(500, rng)
        assert maze.is_free(position).all()
        for _ in range(20):
            after = maze.move(position, rng.uniform(0, 2 * math.pi, 500))
            assert maze.is_free(after).all()
            assert (np.linalg.norm(after - position, axis=1) <= STEP + 1e-12).all()
            position = after


def test_free_points_are_spread_over_all_free_cells() -> None:
    points = np.floor(FORK.draw_free(20_000, np.random.default_rng(0))).astype(int)
    counts = np.zeros(FORK.walls.shape)
    np.add.at(counts, tuple(points.T), 1)
    assert (counts[FORK.walls] == 0).all()
    assert (np.abs(counts[~FORK.walls] - 20_000 / 155) < 60).all()


def test_distances_are_those_of_a_search_cell_by_cell() -> None:
    for maze, goal in ((BLANK, (3, 4)), (FORK, (0, 0)), (ISLAND, (5, 4))):
        area = np.zeros_like(maze.walls)
        area[goal] = True
        assert np.array_equal(maze.distances(area), one_by_one(maze, goal))
    assert FORK.distances(FORK.area(0))[2, 0] == 12, "out of the corridor, up and not into the next one"
    shut = Maze("shut", np.array([[False, True, False]]))
    assert shut.distances(np.array([[True, False, False]])).tolist() == [[0, np.inf, np.inf]]


def test_every_place_has_the_label_of_its_row_and_of_its_column() -> None:
    places = np.array([[3.7, 9.1], [0.0, 0.99]])
    assert BLANK.labels_of(places).tolist() == [[3, 19], [0, 10]]
    assert BLANK.satisfies(places, np.array([3, 11])).tolist() == [True, False]
    assert np.argwhere(FORK.area(1)).tolist() == [[1, column] for column in range(10, 15)]
    assert np.argwhere(FORK.area(15)).tolist() == [[row, 0] for row in range(0, 15, 2)]


def test_walks_reach_their_cells_along_shortest_ways() -> None:
    for maze in MAZES:
        walks = draw_walks(maze, 200, np.random.default_rng(1), nothing)
        assert maze.is_free(walks.positions).all()
        assert walks.positions.shape[1] == walks.headings.shape[1] + 1 == walks.lengths.max() + 1
        for positions, length in zip(walks.positions, walks.lengths, strict=True):
            goal = np.floor(positions[length]).astype(int)
            area = np.zeros_like(maze.walls)
            area[tuple(goal)] = True
            cells = np.floor(positions[: length + 1]).astype(int)
            away = maze.distances(area)[tuple(cells.T)]
            assert (away[:-1] > 0).all(), "a walk ends when it is there"
            assert length * STEP <= 1.5 * away[0] + 2, "and is hardly longer than it needs to be"
            assert (positions[length:] == positions[length]).all()


def test_a_state_is_paired_with_its_own_walks_later_states() -> None:
    rng = np.random.default_rng(2)
    walks = draw_walks(BLANK, 30, rng, nothing)
    acting, future = walks.draw(500, 3.0, rng)
    assert np.allclose(np.linalg.norm(acting[:, 2:], axis=1), 1)
    gaps: list[int] = []
    for place, later in zip(acting[:, :2], future, strict=True):
        # A start is the centre of a cell, which several walks may share.
        candidates = [
            int(np.flatnonzero((row == later).all(1))[0] - np.flatnonzero((row == place).all(1))[0])
            for row in walks.positions
            if (row == place).all(1).any() and (row == later).all(1).any()
        ]
        assert candidates
        gaps.append(max(candidates))
    assert min(gaps) >= 1
    assert 1.5 < np.mean(gaps) < 3.5
    after = BLANK.move(acting[:, :2], np.arctan2(acting[:, 2], acting[:, 3]))
    taken = np.array([[*here, *to] for row in walks.positions for here, to in itertools.pairwise(row)])
    assert all(
        np.isclose(taken, [*place, *to], atol=1e-9).all(1).any() for place, to in zip(acting[:, :2], after, strict=True)
    ), "the heading is the one that was taken there"


def test_walks_are_the_same_for_the_same_seed_and_can_be_stopped() -> None:
    first, again, other = (draw_walks(ISLAND, 20, np.random.default_rng(seed), nothing) for seed in (0, 0, 1))
    assert np.array_equal(first.positions, again.positions)
    assert not np.array_equal(first.lengths, other.lengths)

    def stop() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        draw_walks(ISLAND, 20, np.random.default_rng(0), stop)
