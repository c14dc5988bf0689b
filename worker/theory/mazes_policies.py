"""Policies that find the way to a label, and how well they do.

Three encoders of one space: of a state with an action in it, of a state, of a label. States and actions learn from
walks which states follow (contrastive reinforcement learning, Eysenbach et al. 2022), and states learn which labels
hold in them. No action ever sees a label: a policy composes the two (Che & Eysenbach 2025, section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, final

import numpy as np
import torch
from torch import nn

from service.contract.losses import InfoNCE
from worker.composition import estimators
from worker.learning import critics, losses
from worker.theory import encoders
from worker.theory.mazes_ground import STEP, state_actions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int64
    from torch import Tensor

    from worker.theory.mazes_ground import Maze, Walks

HEADINGS: Final = np.arange(8) * math.pi / 4
LOSS: Final = InfoNCE(critic="squared_distance")
DIMENSIONS: Final = 8
WIDTH: Final = 64
BATCH_SIZE: Final = 256
LEARNING_RATE: Final = 3e-3
REACH: Final = 10.0
"""Mean number of steps to the future that a state and an action are paired with."""
CHECK_EVERY: Final = 100
Scoring = Literal["direct", "marginal", "normalised"]
"""normalised: marginal without what InfoNCE leaves free, log mean_b e^f of each leg."""


Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Positions (walker, 2) and the labels that they look for -> indices of headings."""


@final
@dataclass(frozen=True)
class Agent:
    """What was learned. Positions are scaled by the size of the maze."""

    maze: Maze
    state_action: nn.Module
    state: nn.Module
    label: nn.Module
    scales: tuple[float, float]
    """Of the pairs state and action with future, and state with label."""

    @torch.no_grad()
    def scores(
        self,
        positions: Float64[np.ndarray, "walker 2"],
        scoring: Scoring,
        bridge: Float64[np.ndarray, "bridge 2"],
    ) -> Float[Tensor, "walker heading label"]:
        """Compare every heading in every place with every label, directly or over the states of a bridge."""
        num = len(positions)
        repeated = np.repeat(positions, len(HEADINGS), 0)
        z_a = self.state_action(inputs(self.maze, state_actions(repeated, np.tile(HEADINGS, num))))
        z_c = self.label(torch.arange(self.maze.num_labels))
        if scoring == "direct":
            found = estimators.direct(LOSS.critic, z_a, z_c)
        else:
            z_b = self.state(inputs(self.maze, bridge))
            f_ab = self.scales[0] * critics.scores(LOSS.critic, z_a, z_b)
            f_bc = self.scales[1] * critics.scores(LOSS.critic, z_b, z_c)
            found = estimators.marginal(f_ab, f_bc, normalise=scoring == "normalised").log_ratio
        return found.unflatten(0, (num, len(HEADINGS)))

    def policy(self, scoring: Scoring, bridge: Float64[np.ndarray, "bridge 2"]) -> Policy:
        """Return the policy that takes the heading of the best score."""

        def choose(positions: np.ndarray, labels: np.ndarray) -> np.ndarray:
            scores = self.scores(positions, scoring, bridge)
            return scores[torch.arange(len(positions)), :, torch.from_numpy(labels)].argmax(1).numpy()

        return choose


def inputs(maze: Maze, points: Float64[np.ndarray, "point value"]) -> Float[Tensor, "point value"]:
    """Bring the place in points to [-1, 1]; the rest of them stays."""
    scaled = points.copy()
    scaled[:, :2] = 2 * points[:, :2] / np.array(maze.walls.shape) - 1
    return torch.from_numpy(scaled).float()


def train(maze: Maze, walks: Walks, steps: int, seed: int, check: Callable[[], None]) -> Agent:
    """Train both pairs together, a batch of each in every step, with Adam and a rate that falls to zero."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    state_action = _perceptron(4, generator)
    state = _perceptron(2, generator)
    table = nn.Embedding(maze.num_labels, WIDTH)
    nn.init.normal_(table.weight, generator=generator)
    label = nn.Sequential(table, _perceptron(WIDTH, generator))
    log_scales = nn.Parameter(torch.full((2,), -math.log(DIMENSIONS) / 2))
    modules = nn.ModuleList([state_action, state, label])
    optimiser = torch.optim.Adam([*modules.parameters(), log_scales], lr=LEARNING_RATE, fused=True)
    for step in range(steps):
        if step % CHECK_EVERY == 0:
            check()
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        acting, future = walks.draw(BATCH_SIZE, REACH, rng)
        places = maze.draw_free(BATCH_SIZE, rng)
        labels = maze.labels_of(places)[np.arange(BATCH_SIZE), rng.integers(2, size=BATCH_SIZE)]
        z_b, z_b2 = state(inputs(maze, np.concatenate([future, places]))).chunk(2)
        scales = log_scales.exp()
        loss = losses.compute(LOSS, state_action(inputs(maze, acting)), z_b, scales[0])
        loss = loss + losses.compute(LOSS, z_b2, label(torch.from_numpy(labels)), scales[1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    modules.requires_grad_(requires_grad=False)
    first, second = log_scales.detach().exp().tolist()
    return Agent(maze, state_action, state, label, (first, second))


def walk_at_random(rng: np.random.Generator) -> Policy:
    """Return the policy that knows nothing."""
    return lambda positions, _: rng.integers(len(HEADINGS), size=len(positions))


def _perceptron(num_values: int, generator: torch.Generator) -> nn.Module:
    layers: list[nn.Module] = []
    for columns in (num_values, WIDTH, WIDTH):
        layers += [encoders.linear(columns, WIDTH, generator, bias=True), nn.ReLU()]
    return nn.Sequential(*layers, encoders.linear(WIDTH, DIMENSIONS, generator, bias=True))


@final
@dataclass(frozen=True)
class Tasks:
    """Where episodes start, what they are to reach, and by how much each step strays: the same for all policies."""

    starts: Float64[np.ndarray, "episode 2"]
    labels: Int64[np.ndarray, " episode"]
    shortest: Float64[np.ndarray, " episode"]
    noise: Float64[np.ndarray, "step episode"]


def draw_tasks(maze: Maze, num: int, max_steps: int, rng: np.random.Generator, *, noise: float) -> Tasks:
    """Draw starts over all that is free, and for each a label that does not hold there."""
    starts = maze.draw_free(num, rng)
    labels = rng.integers(maze.num_labels, size=num)
    while (done := maze.satisfies(starts, labels)).any():
        labels[done] = rng.integers(maze.num_labels, size=int(done.sum()))
    away = np.stack([maze.distances(maze.area(label)) for label in range(maze.num_labels)])
    row, column = np.floor(starts).astype(np.int64).T
    return Tasks(starts, labels, away[labels, row, column], noise * rng.normal(size=(max_steps, num)))


@final
@dataclass(frozen=True)
class Episodes:
    """What became of them."""

    reached: Bool[np.ndarray, " episode"]
    steps: Int64[np.ndarray, " episode"]
    paths: Float64[np.ndarray, "time episode 2"]

    @property
    def success(self) -> float:
        """The share that reached the label."""
        return float(self.reached.mean())

    def spl(self, tasks: Tasks) -> float:
        """Success weighted by path length: the shortest way over the way that was walked (Anderson et al. 2018).

        The shortest way counts the cells of a breadth-first path, and the walked one half a cell a step.
        """
        walked = STEP * self.steps
        return float((self.reached * tasks.shortest / np.maximum(walked, tasks.shortest)).mean())


def run(maze: Maze, tasks: Tasks, policy: Policy, check: Callable[[], None]) -> Episodes:
    """Run all episodes at once, each until it reaches its label or its steps are over."""
    position = tasks.starts.copy()
    paths = [position.copy()]
    steps = np.zeros(len(position), dtype=np.int64)
    walking = np.flatnonzero(~maze.satisfies(position, tasks.labels))
    for noise in tasks.noise:
        if not len(walking):
            break
        check()
        headings = HEADINGS[policy(position[walking], tasks.labels[walking])] + noise[walking]
        position[walking] = maze.move(position[walking], headings)
        steps[walking] += 1
        paths.append(position.copy())
        walking = walking[~maze.satisfies(position[walking], tasks.labels[walking])]
    return Episodes(maze.satisfies(position, tasks.labels), steps, np.stack(paths))
