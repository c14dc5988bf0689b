"""Triples a, b, c that are jointly normal: every density ratio has a closed form, so that critics have a truth.

b is normal, and a and c are noisy linear views of it (Che & Eysenbach 2025, section 6.1). A share `bypass` of what a
and c see can come from a second source u that b knows nothing of: then a and c are not independent given b, and Lemma 1
does not hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import Tensor

LARGEST_CORRELATION: Final = 1 - 1e-14
"""Rounding may lead a correlation to 1, where the ratio has no logarithm."""


@final
@dataclass(frozen=True)
class Triples:
    """Row i of all three belongs together."""

    a: Float64[Tensor, "triple observed_a"]
    b: Float64[Tensor, "triple observed_b"]
    c: Float64[Tensor, "triple observed_c"]


@final
@dataclass(frozen=True)
class Ratio:
    """log p(x, y) / (p(x) p(y)) of two normal vectors, nats.

    In their canonical coordinates u and v, with correlations r: sum of -1/2 log(1 - r^2)
    - (r^2 u^2 - 2 r u v + r^2 v^2) / (2 (1 - r^2)).
    """

    mean_x: Float64[np.ndarray, " observed_x"]
    mean_y: Float64[np.ndarray, " observed_y"]
    to_u: Float64[np.ndarray, "canonical observed_x"]
    to_v: Float64[np.ndarray, "canonical observed_y"]
    correlations: Float64[np.ndarray, " canonical"]

    @property
    def information(self) -> float:
        """I(x; y), nats: the mean of the logarithm."""
        return -float(np.log1p(-(self.correlations**2)).sum()) / 2

    def scores(
        self, x: Float64[Tensor, "row observed_x"], y: Float64[Tensor, "column observed_y"]
    ) -> Float64[Tensor, "row column"]:
        """Compute the logarithm for every x and every y."""
        r = torch.from_numpy(self.correlations)
        u = (x - torch.from_numpy(self.mean_x)) @ torch.from_numpy(self.to_u).T
        v = (y - torch.from_numpy(self.mean_y)) @ torch.from_numpy(self.to_v).T
        squares = r**2 / (1 - r**2) / 2
        found = (u * (r / (1 - r**2))) @ v.T
        found -= (u.square() @ squares)[:, None]
        found += self.information - v.square() @ squares
        return found


@final
@dataclass(frozen=True)
class Law:
    """The joint distribution of a triple."""

    mean: Float64[np.ndarray, " value"]
    covariance: Float64[np.ndarray, "value value"]
    dims: tuple[int, int, int]
    """Of a, b and c, in this order in `mean` and `covariance`."""

    def draw(self, num: int, rng: np.random.Generator) -> Triples:
        """Draw triples."""
        eigenvalues, axes = np.linalg.eigh(self.covariance)
        root = axes * np.sqrt(eigenvalues.clip(min=0))
        values = torch.from_numpy(self.mean + rng.normal(size=(num, len(self.mean))) @ root.T)
        a, b, c = values.split(self.dims, dim=1)
        return Triples(a.contiguous(), b.contiguous(), c.contiguous())

    @property
    def first_leg(self) -> Ratio:
        """Of a and b."""
        return self._ratio("a", "b", self._between("a", "b"))

    @property
    def second_leg(self) -> Ratio:
        """Of b and c."""
        return self._ratio("b", "c", self._between("b", "c"))

    @property
    def whole(self) -> Ratio:
        """Of a and c, the Bayes score: no other ranks better."""
        return self._ratio("a", "c", self._between("a", "c"))

    @property
    def composed(self) -> Ratio:
        """What Lemma 1 gives without any error: the ratio of a and c if they were independent given b."""
        return self._ratio("a", "c", self._through_b())

    @property
    def bypassed_information(self) -> float:
        """I(a; c | b), nats: 0 where Lemma 1 holds."""
        aa = self._between("a", "a") - self._given_b("a", "a")
        cc = self._between("c", "c") - self._given_b("c", "c")
        ac = self._between("a", "c") - self._given_b("a", "c")
        r = np.linalg.svd(_whitening(aa) @ ac @ _whitening(cc).T, compute_uv=False)
        return -float(np.log1p(-(r.clip(max=LARGEST_CORRELATION) ** 2)).sum()) / 2

    def without_bypass(self) -> Law:
        """Return the law with the same pairs (a, b) and (b, c) in which a and c are independent given b."""
        covariance = self.covariance.copy()
        (a, _, c), through = self._slices, self._through_b()
        covariance[a, c], covariance[c, a] = through, through.T
        return Law(self.mean, covariance, self.dims)

    @property
    def _slices(self) -> tuple[slice, slice, slice]:
        first, second, _ = np.cumsum(self.dims)
        return slice(0, first), slice(first, second), slice(second, None)

    def _part(self, name: str) -> slice:
        return self._slices["abc".index(name)]

    def _between(self, x: str, y: str) -> Float64[np.ndarray, "observed_x observed_y"]:
        return self.covariance[self._part(x), self._part(y)]

    def _given_b(self, x: str, y: str) -> Float64[np.ndarray, "observed_x observed_y"]:
        return self._between(x, "b") @ np.linalg.solve(self._between("b", "b"), self._between("b", y))

    def _through_b(self) -> Float64[np.ndarray, "observed_a observed_c"]:
        return self._given_b("a", "c")

    def _ratio(self, x: str, y: str, between: Float64[np.ndarray, "observed_x observed_y"]) -> Ratio:
        to_x, to_y = _whitening(self._between(x, x)), _whitening(self._between(y, y))
        left, correlations, right = np.linalg.svd(to_x @ between @ to_y.T, full_matrices=False)
        return Ratio(
            self.mean[self._part(x)],
            self.mean[self._part(y)],
            left.T @ to_x,
            right @ to_y,
            correlations.clip(max=LARGEST_CORRELATION),
        )


def views(seed: int, dims: tuple[int, int, int], *, noise: float, bypass: float = 0.0, ridge: float = 0.0) -> Law:
    """Make the paper's triples: b ~ N(mu, R^T R), a = M_a b + noise, c = M_c b + noise, all entries uniform on [-1, 1].

    With a bypass rho, a = sqrt(1 - rho) M_a b + sqrt(rho) N_a u + noise, where u is drawn as b is (with entries of its
    own) and independently, and c sees the same u. `ridge` is added to the covariance of b and of u.
    """
    rng = np.random.default_rng(seed)
    of_a, of_b, of_c = dims

    def uniform(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, size=shape)

    mean_b, root_b, mean_u, root_u = uniform(of_b), uniform(of_b, of_b), uniform(of_b), uniform(of_b, of_b)
    covariance_b, covariance_u = (root.T @ root + ridge * np.eye(of_b) for root in (root_b, root_u))
    loadings = [
        (math.sqrt(1 - bypass) * uniform(each, of_b), math.sqrt(bypass) * uniform(each, of_b)) for each in (of_a, of_c)
    ]
    nothing, self_ = np.zeros((of_b, of_b)), np.eye(of_b)
    (a_b, a_u), (c_b, c_u) = loadings
    seen_b, seen_u = np.concatenate([a_b, self_, c_b]), np.concatenate([a_u, nothing, c_u])
    covariance = seen_b @ covariance_b @ seen_b.T + seen_u @ covariance_u @ seen_u.T
    covariance += np.diag(np.repeat([noise**2, 0.0, noise**2], dims))
    return Law(seen_b @ mean_b + seen_u @ mean_u, covariance, dims)


def _whitening(covariance: Float64[np.ndarray, "value value"]) -> Float64[np.ndarray, "value value"]:
    return np.linalg.inv(np.linalg.cholesky(covariance))
