"""Data whose truth is known: the case study of Chen et al. (2024), definition 5.3, and harder relatives of it.

A pair shares a class z with a code v_z, and nothing else: x = G [v_z; xi], y = H [v_z; zeta], where xi and zeta are the
modalities' own features, drawn independently given z. Everything is drawn with the random generator that is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64
    from torch import Tensor

SHORTEST: Final = 0.75
"""The norms of the own features are uniform on [SHORTEST * R, R]: bounded by R, and not all the same."""
_MAX_DRAWS: Final = 10_000


@final
@dataclass(frozen=True)
class Pairs:
    """Pairs and their classes; row i of all three belongs together."""

    z: Int64[Tensor, " pair"]
    x: Float64[Tensor, "pair observed_x"]
    y: Float64[Tensor, "pair observed_y"]


@final
@dataclass(frozen=True)
class Generator:
    """What draws pairs."""

    codes: Float64[np.ndarray, "label shared"]
    mixing_x: Float64[np.ndarray, "observed_x feature"]
    mixing_y: Float64[np.ndarray, "observed_y feature"]
    own_norm: float
    """R, the largest norm of xi and of zeta."""
    means: Float64[np.ndarray, "label own"]
    """E[zeta | z]."""
    noise: float = 0.0
    """Expected norm of what each modality adds to the code by itself; definition 5.3 has none."""

    @property
    def num_classes(self) -> int:
        """How many classes there are, all as frequent."""
        return len(self.codes)

    @property
    def margin(self) -> float:
        """Gamma: how far the inner product of two codes stays below 1."""
        between = self.codes @ self.codes.T
        np.fill_diagonal(between, -1.0)
        return float(1 - between.max())

    def draw(self, num: int, rng: np.random.Generator) -> Pairs:
        """Draw pairs."""
        z = rng.integers(self.num_classes, size=num)
        return Pairs(torch.from_numpy(z), self.x_of(z, rng), self.y_of(z, rng))

    def x_of(self, z: Int64[np.ndarray, " item"], rng: np.random.Generator) -> Float64[Tensor, "item observed_x"]:
        """Draw x given the class."""
        features = np.concatenate([self._seen(z, rng), self._own(len(z), self.own_norm, rng)], 1)
        return torch.from_numpy(features @ self.mixing_x.T)

    def y_of(self, z: Int64[np.ndarray, " item"], rng: np.random.Generator) -> Float64[Tensor, "item observed_y"]:
        """Draw y given the class."""
        left = self.own_norm - float(np.linalg.norm(self.means, axis=1).max())
        own = self.means[z] + self._own(len(z), left, rng)
        return torch.from_numpy(np.concatenate([self._seen(z, rng), own], 1) @ self.mixing_y.T)

    def prompts(self, rng: np.random.Generator) -> Float64[Tensor, "label observed_y"]:
        """Draw one y of every class, in order."""
        return self.y_of(np.arange(self.num_classes), rng)

    def oracle(
        self, x: Float64[Tensor, "row observed_x"], y: Float64[Tensor, "column observed_y"]
    ) -> Float64[Tensor, "row column"]:
        """Return f*(x, y) = <[G^+]_shared x, [H^+]_shared y>: <v_z, v_z'> where there is no noise (lemma 5.4)."""
        shared = self.codes.shape[1]
        from_x = torch.from_numpy(np.linalg.pinv(self.mixing_x)[:shared])
        from_y = torch.from_numpy(np.linalg.pinv(self.mixing_y)[:shared])
        return (x @ from_x.T) @ (y @ from_y.T).T

    def _seen(self, z: Int64[np.ndarray, " item"], rng: np.random.Generator) -> Float64[np.ndarray, "item shared"]:
        codes = self.codes[z]
        return codes + self.noise * rng.normal(size=codes.shape) / np.sqrt(codes.shape[1]) if self.noise else codes

    def _own(self, num: int, longest: float, rng: np.random.Generator) -> Float64[np.ndarray, "item own"]:
        return directions(num, self.means.shape[1], rng) * rng.uniform(SHORTEST * longest, longest, size=(num, 1))


def case_study(
    seed: int,
    *,
    own_norm: float,
    mean_norm: float = 0.0,
    orthonormal: bool = False,
    num_classes: int = 20,
    shared: int = 32,
    own: int = 16,
    observed: int = 64,
    margin: float = 0.5,
) -> Generator:
    """Make definition 5.3: K unit codes whose largest inner product is 1 - gamma, and linear dictionaries G and H.

    `own_norm` is R. `mean_norm` is |E[zeta | z]|, in a direction of the class's own. The dictionaries are Gaussian
    (columns neither orthogonal nor of one length) unless `orthonormal`.
    """
    rng = np.random.default_rng(seed)
    return Generator(
        codes=spread_codes(num_classes, shared, margin, rng),
        mixing_x=_dictionary(observed, shared + own, rng, orthonormal=orthonormal),
        mixing_y=_dictionary(observed, shared + own, rng, orthonormal=orthonormal),
        own_norm=own_norm,
        means=mean_norm * directions(num_classes, own, rng),
    )


def fine_grained(seed: int, *, num_clusters: int = 12, per_cluster: int = 8) -> Generator:
    """Make classes that are sub-classes: codes in clusters, within which they hardly differ, seen with noise.

    Cosines within a cluster are about .9, and the noise is about as large as what tells two sub-classes apart.
    """
    rng = np.random.default_rng(seed)
    shared, own, observed = 32, 16, 64
    centres = np.repeat(directions(num_clusters, shared, rng), per_cluster, axis=0)
    codes = centres + 0.35 * directions(len(centres), shared, rng)
    return Generator(
        codes=codes / np.linalg.norm(codes, axis=1, keepdims=True),
        mixing_x=_dictionary(observed, shared + own, rng, orthonormal=False),
        mixing_y=_dictionary(observed, shared + own, rng, orthonormal=False),
        own_norm=1.0,
        means=np.zeros((len(codes), own)),
        noise=0.25,
    )


def crowded(seed: int) -> Generator:
    """Make 300 classes with unrelated codes, to be told apart in few dimensions."""
    rng = np.random.default_rng(seed)
    shared, own, observed = 32, 16, 64
    codes = directions(300, shared, rng)
    return Generator(
        codes=codes,
        mixing_x=_dictionary(observed, shared + own, rng, orthonormal=False),
        mixing_y=_dictionary(observed, shared + own, rng, orthonormal=False),
        own_norm=1.0,
        means=np.zeros((len(codes), own)),
    )


def spread_codes(num: int, dim: int, margin: float, rng: np.random.Generator) -> Float64[np.ndarray, "label shared"]:
    """Draw unit vectors whose largest inner product is exactly 1 - margin.

    Random directions are drawn until all are at least that far apart, and then given a common component that brings the
    closest two to it. Raises ValueError if so many do not fit.
    """
    for _ in range(_MAX_DRAWS):
        codes = directions(num, dim - 1, rng)
        between = codes @ codes.T
        np.fill_diagonal(between, -1.0)
        closest = float(between.max())
        if closest <= 1 - margin:
            common = (1 - margin - closest) / (1 - closest)
            return np.concatenate([np.sqrt(1 - common) * codes, np.full((num, 1), np.sqrt(common))], 1)
    msg = f"{num} random directions of dimension {dim} are not {margin} apart"
    raise ValueError(msg)


def directions(num: int, dim: int, rng: np.random.Generator) -> Float64[np.ndarray, "row dim"]:
    """Draw unit vectors, uniformly."""
    drawn = rng.normal(size=(num, dim))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def _dictionary(
    rows: int, columns: int, rng: np.random.Generator, *, orthonormal: bool
) -> Float64[np.ndarray, "row column"]:
    drawn = rng.normal(size=(rows, columns)) / np.sqrt(rows)
    return np.linalg.qr(drawn)[0] if orthonormal else drawn
