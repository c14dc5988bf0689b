"""Language that names no single place: section 6.3 and appendix D of Che & Eysenbach (2025).

A label holds in a whole row or column of a maze. Compared directly, an action is drawn to the one vector that stands
for all of these places; summed over the states between, to those of them that the action leads to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np

from service.contract.experiments import Map, Panel
from worker.theory import mazes_policies as policies
from worker.theory.findings import Outcome, Setting, at_least, finding
from worker.theory.mazes_ground import BLANK, FORK, ISLAND, draw_walks

if TYPE_CHECKING:
    from worker.theory.mazes_ground import Maze

NUM_WALKS: Final = 3000
STEPS: Final = 4000
EPISODES: Final = 200
MAX_STEPS: Final = 100
BRIDGE: Final = 1000
NOISE: Final = math.radians(20)
SEED_OF_EPISODES: Final = 1_000_003
"""Added to the seed of training: episodes draw other numbers."""
DRAWN: Final = 12  # paths in a panel


@final
@dataclass(frozen=True)
class _Case:
    maze: Maze
    more: float
    """How much more often the marginal policy has to succeed."""
    expected: str


CASES: Final = (
    _Case(BLANK, 0.20, "published .58 -> .90, SPL .35 -> .64; a prototype .61 -> .95"),
    _Case(FORK, 0.15, "published .24 -> .71, SPL .15 -> .56; a prototype .19 -> .43"),
    _Case(ISLAND, 0.10, "published .61 -> .95, SPL .40 -> .69; a prototype .73 -> .90"),
)
LEAST_ON_BLANK: Final = 0.85
SCORINGS: Final[tuple[policies.Scoring, ...]] = ("direct", "marginal", "normalised")


def num_runs(num_seeds: int) -> int:
    """Return how many steps of progress there are: a training and its episodes each."""
    return 2 * num_seeds * len(CASES)


def run(setting: Setting) -> Outcome:
    """Train an agent in every maze, and send it and a random walker to the same labels from the same places."""
    outcome = Outcome(
        set_up=[
            (
                "Three mazes: blank (10 x 10), fork (15 x 15, eight corridors that open to one hall), island (11 x 11, "
                "a block of 5 x 2 in the middle). A step is half a cell; walls stop it. Every row and every column has "
                "a label."
            ),
            (
                f"{NUM_WALKS:,} walks from cell to cell along breadth-first ways, headings with normal noise of 10 "
                "degrees. A state and its heading are paired with the state of the same walk a geometric number of "
                f"steps later (mean {policies.REACH:g}); a uniform free state with its row's or its column's label."
            ),
            (
                f"Perceptrons of three hidden layers of {policies.WIDTH}, {policies.DIMENSIONS} dimensions, critic "
                "-1/2 squared distance, InfoNCE over the batch with a learned scale for each pair, both pairs in every "
                f"step; {STEPS:,} steps of {policies.BATCH_SIZE} pairs, Adam at {policies.LEARNING_RATE:g} falling to "
                "0 along a cosine. States have one encoder for both pairs. No action is ever paired with a label."
            ),
            (
                f"{EPISODES} episodes for each seed and maze: a uniform start, a label that does not hold there, at "
                f"most {MAX_STEPS} steps, each the best of 8 headings with normal noise of 20 degrees. All policies "
                f"have the same starts, labels and noise. The marginal sums over {BRIDGE:,} uniform free states."
            ),
        ]
    )
    for case in CASES:
        _measure(setting, case, outcome)
    outcome.notes += [
        (
            "SPL: mean over the episodes of success x shortest / max(walked, shortest). The shortest way counts cells "
            "of a breadth-first path, the walked one half a cell a step, so a policy that cuts corners can have 1."
        ),
        (
            "`normalised` removes log mean_b e^f of each leg, as POST /v1/compose does: it estimates "
            "log p(label | state, action) - log p(label), and the paper's policy does not need it."
        ),
        (
            "How badly direct comparison does depends on the data. On walks that start anywhere in a cell and turn "
            "either way first (rows or columns, drawn for each walk) it succeeded in .92 of the episodes in the blank "
            "maze and the marginal in .98 (3 seeds): the claim is about walks with habits, as the paper's are."
        ),
    ]
    return outcome


def _measure(setting: Setting, case: _Case, outcome: Outcome) -> None:
    maze = case.maze
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("random", *SCORINGS)}
    for seed in setting.seeds:
        walks = draw_walks(maze, setting.steps(NUM_WALKS), np.random.default_rng(seed), setting.check)
        agent = policies.train(maze, walks, setting.steps(STEPS), seed, setting.check)
        setting.step()
        rng = np.random.default_rng(SEED_OF_EPISODES + seed)
        tasks = policies.draw_tasks(maze, setting.steps(EPISODES), MAX_STEPS, rng, noise=NOISE)
        bridge = maze.draw_free(BRIDGE, rng)
        chosen = {"random": policies.walk_at_random(rng)} | {name: agent.policy(name, bridge) for name in SCORINGS}
        episodes = {name: policies.run(maze, tasks, policy, setting.check) for name, policy in chosen.items()}
        for name, each in episodes.items():
            found[name].append((each.success, each.spl(tasks)))
        if seed == setting.seeds[0]:
            outcome.maps.append(_map(maze, tasks, episodes))
        setting.step()
    _judge(case, found, outcome)


def _judge(case: _Case, found: dict[str, list[tuple[float, float]]], outcome: Outcome) -> None:
    name = case.maze.name
    success = {policy: [each for each, _ in rows] for policy, rows in found.items()}
    outcome.findings.append(
        finding(
            f"{name}: success, marginal minus direct",
            "shares of the episodes that reach the label within the steps",
            case.expected,
            [summed - direct for summed, direct in zip(success["marginal"], success["direct"], strict=True)],
            at_least(case.more, mean=True),
        )
    )
    for policy, rows in found.items():
        is_asserted = case.maze is BLANK and policy == "marginal"
        outcome.findings += [
            finding(
                f"{name}: success, {policy}",
                "share of the episodes that reach the label within the steps",
                "published .90; a prototype .95" if is_asserted else "reported",
                success[policy],
                at_least(LEAST_ON_BLANK, mean=True) if is_asserted else None,
            ),
            finding(f"{name}: SPL, {policy}", "success weighted by path length", "reported", [spl for _, spl in rows]),
        ]


def _map(maze: Maze, tasks: policies.Tasks, episodes: dict[str, policies.Episodes]) -> Map:
    """Draw both policies on the way to the row and to the column that most episodes look for."""
    rows, _ = maze.walls.shape
    often = np.bincount(tasks.labels, minlength=maze.num_labels)
    panels: list[Panel] = []
    for label, what in ((int(often[:rows].argmax()), "row"), (rows + int(often[rows:].argmax()), "column")):
        chosen = np.flatnonzero(tasks.labels == label)[:DRAWN]
        for policy in ("direct", "marginal"):
            each = episodes[policy]
            # Rounded down, and not to the nearest, a point stays in its cell.
            paths = [(np.floor(1000 * each.paths[: each.steps[at] + 1, at]) / 1000).tolist() for at in chosen]
            title = f"{policy}, to {what} {label if label < rows else label - rows}"
            goal: list[tuple[int, int]] = [(int(row), int(column)) for row, column in np.argwhere(maze.area(label))]
            panels.append(Panel(title=title, goal=goal, paths=paths, reached=each.reached[chosen].tolist()))
    title = f"Ways to a label: {maze.name} (dot: start, shaded: goal, cross: not reached)"
    return Map(name=f"ways-{maze.name}", title=title, walls=maze.walls.tolist(), panels=panels)
