"""Critics in numpy: how vectors that a model gave are compared where there is no torch. The worker's are the same."""

from __future__ import annotations

from typing import assert_never

import numpy as np
from jaxtyping import Float32, Float64

from service.contract.losses import Critic


def prepare(critic: Critic, z: Float32[np.ndarray, "row dim"]) -> Float32[np.ndarray, "row dim"]:
    """Bring vectors to the form that the critic compares: unit length for the cosine, zero staying zero."""
    match critic:
        case "cosine":
            lengths = np.linalg.norm(z, axis=1, keepdims=True)
            return (z / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
        case "dot" | "squared_distance":
            return z
        case _:
            assert_never(critic)


def scores(
    critic: Critic, z_a: Float32[np.ndarray, "row dim"], z_b: Float32[np.ndarray, "column dim"]
) -> Float64[np.ndarray, "row column"]:
    """Compare all vectors of one side with all of the other; those of the cosine are unit vectors already."""
    inner = (z_a @ z_b.T).astype(np.float64)
    match critic:
        case "cosine" | "dot":
            return inner
        case "squared_distance":
            half_a, half_b = (np.square(z, dtype=np.float64).sum(axis=1) / 2 for z in (z_a, z_b))
            return inner - half_a[:, None] - half_b
        case _:
            assert_never(critic)
