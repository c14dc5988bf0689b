"""The joint generative hierarchical model of the sufficiency paper: two trees of symbols that share their root.

Small enough trees can be written out, and then everything about a pair is a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float64


@final
@dataclass(frozen=True)
class Shape:
    """A tree: states of a node, levels below the root, children of a node, and how noisy an edge is (`flip`)."""

    states: int = 3
    depth: int = 2
    branching: int = 2
    flip: float = 0.25


def kernels(shape: Shape, rng: np.random.RandomState) -> list[Float64[np.ndarray, "child parent_state state"]]:
    """Draw the transitions of each level: (1 - flip) times a permutation, the same for all children, plus noise.

    The order of the draws is that of the paper's published code, so that a seed gives its figures.
    """
    levels: list[np.ndarray] = []
    for _ in range(shape.depth):
        permutation = np.eye(shape.states)[rng.permutation(shape.states)]
        children: list[np.ndarray] = []
        for _ in range(shape.branching):
            weights = np.exp(rng.normal(size=(shape.states, shape.states)))
            children.append((1 - shape.flip) * permutation + shape.flip * weights / weights.sum(1, keepdims=True))
        levels.append(np.stack(children))
    return levels


def leaf_table(levels: list[Float64[np.ndarray, "child parent_state state"]]) -> Float64[np.ndarray, "root leaves"]:
    """Return P(leaves | root) of every sequence of leaves, leftmost leaf slowest."""
    table = np.eye(levels[0].shape[1])
    for level in reversed(levels):
        below = np.ones((level.shape[1], 1))
        for kernel in level:
            below = (below[:, :, None] * (kernel @ table)[:, None, :]).reshape(len(below), -1)
        table = below
    return table


def joint_table(shape: Shape, seed: int) -> Float64[np.ndarray, "x y"]:
    """Return P(x, y) of every pair of sequences, the root uniform; the kernels of x are drawn first."""
    rng = np.random.RandomState(seed)
    x, y = leaf_table(kernels(shape, rng)), leaf_table(kernels(shape, rng))
    return x.T @ y / shape.states
