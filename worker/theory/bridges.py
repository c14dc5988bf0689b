"""Bridges whose truth can be computed: clusters of points on a sphere, and three alphabets of which one is between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

from worker.composition.diagnostics import resultant
from worker.theory.generators import directions

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64
    from torch import Tensor

NUM_CLUSTERS: Final = 3
BETWEEN_CLUSTERS: Final = 0.15
"""Inner product of two centres, so that all the bridge in its centres would have a mean of length .66."""
SEARCHED: Final = 40_000  # points by which a concentration is found
HALVINGS: Final = 30


@final
@dataclass(frozen=True)
class Clusters:
    """Points of a sphere: a centre times the concentration, plus a normal vector of expected length 1, normalised."""

    centres: Float64[np.ndarray, "cluster dim"]
    concentration: float

    def draw(self, num: int, rng: np.random.Generator) -> Float64[Tensor, "point dim"]:
        """Draw unit vectors; all clusters are as frequent."""
        dim = self.centres.shape[1]
        which = rng.integers(len(self.centres), size=num)
        points = self.concentration * self.centres[which] + rng.normal(size=(num, dim)) / math.sqrt(dim)
        return torch.from_numpy(points / np.linalg.norm(points, axis=1, keepdims=True))


def clusters(seed: int, dim: int, length: float) -> Clusters:
    """Make clusters whose mean vector has a given length, from 0 (even on the sphere) to below .65."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(dim, NUM_CLUSTERS + 1)))[0].T
    centres = math.sqrt(1 - BETWEEN_CLUSTERS) * axes[1:] + math.sqrt(BETWEEN_CLUSTERS) * axes[0]
    if length == 0:
        return Clusters(centres, 0.0)
    low, high = 0.0, 100.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = resultant(Clusters(centres, middle).draw(SEARCHED, np.random.default_rng(seed)))
        low, high = (middle, high) if found < length else (low, middle)
    return Clusters(centres, high)


@final
@dataclass(frozen=True)
class Alphabets:
    """Symbols a and c that are independent given b."""

    of_b: Float64[Tensor, " b"]
    """p(b)."""
    a_given_b: Float64[Tensor, "b a"]
    c_given_b: Float64[Tensor, "b c"]

    @property
    def of_a(self) -> Float64[Tensor, " a"]:
        """p(a)."""
        return self.of_b @ self.a_given_b

    @property
    def of_c(self) -> Float64[Tensor, " c"]:
        """p(c)."""
        return self.of_b @ self.c_given_b

    @property
    def joint(self) -> Float64[Tensor, "a c"]:
        """p(a, c), written out."""
        return (self.a_given_b * self.of_b[:, None]).T @ self.c_given_b

    @property
    def c_given_a(self) -> Float64[Tensor, "a c"]:
        """p(c | a)."""
        return self.joint / self.of_a[:, None]

    @property
    def first_leg(self) -> Float64[Tensor, "a b"]:
        """The log-ratio log p(b | a) / p(b)."""
        return (self.a_given_b / self.of_a).T.log()

    @property
    def second_leg(self) -> Float64[Tensor, "b c"]:
        """The log-ratio log p(c | b) / p(c)."""
        return (self.c_given_b / self.of_c).log()

    @property
    def information(self) -> float:
        """I(a; c), nats."""
        return float((self.joint * (self.joint / self.of_a[:, None] / self.of_c).log()).sum())

    def draw_b(self, num: int, rng: np.random.Generator) -> Int64[Tensor, " draw"]:
        """Draw b."""
        return torch.from_numpy(_draw(self.of_b.numpy()[None], np.zeros(num, dtype=np.int64), rng))

    def draw_first(self, num: int, rng: np.random.Generator) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]:
        """Draw pairs (a, b)."""
        b = self.draw_b(num, rng)
        return torch.from_numpy(_draw(self.a_given_b.numpy(), b.numpy(), rng)), b

    def draw_second(self, num: int, rng: np.random.Generator) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]:
        """Draw pairs (b, c)."""
        b = self.draw_b(num, rng)
        return b, torch.from_numpy(_draw(self.c_given_b.numpy(), b.numpy(), rng))


def alphabets(
    seed: int, sizes: tuple[int, int, int] = (40, 60, 40), *, of_b: float = 0.5, given_b: float = 0.2
) -> Alphabets:
    """Draw p(b), p(a | b) and p(c | b) from symmetric Dirichlet distributions with these concentrations."""
    rng = np.random.default_rng(seed)
    num_a, num_b, num_c = sizes

    def drawn(num: int, concentration: float, *rows: int) -> Tensor:
        # What underflows to nothing would have no logarithm.
        probabilities = rng.dirichlet(np.full(num, concentration), size=rows or None).clip(min=1e-12)
        return torch.from_numpy(probabilities / probabilities.sum(-1, keepdims=True))

    return Alphabets(drawn(num_b, of_b), drawn(num_a, given_b, num_b), drawn(num_c, given_b, num_b))


def even(num: int, dim: int, rng: np.random.Generator) -> Float64[Tensor, "point dim"]:
    """Draw unit vectors, uniformly."""
    return torch.from_numpy(directions(num, dim, rng))


def _draw(
    rows: Float64[np.ndarray, "row value"], which: Int64[np.ndarray, " draw"], rng: np.random.Generator
) -> Int64[np.ndarray, " draw"]:
    """Draw a value from a row's distribution, for every row that is named."""
    upper = rows.cumsum(1)
    upper[:, -1] = np.inf
    found = np.empty(len(which), dtype=np.int64)
    uniform = rng.random(len(which))
    for row in np.unique(which):
        chosen = which == row
        found[chosen] = np.searchsorted(upper[row], uniform[chosen], side="right")
    return found
