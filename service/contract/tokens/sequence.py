"""Tokens that the caller made: ids of any alphabet, or vectors of anything."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32

from service.contract.errors import Invalid
from service.contract.modality import ContinuousTokens, DiscreteTokens


def discrete(values: np.ndarray, config: DiscreteTokens, *, truncate: bool) -> Int32[np.ndarray, " token"]:
    """Check ids in [0, vocab).

    Raises Invalid for another shape or range, and, unless `truncate`, if there are too many.
    """
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise Invalid("discrete tokens are a flat list of whole numbers")
    ids = _fit(values, config.max_length, truncate=truncate)
    if ids.min() < 0 or ids.max() >= config.vocab:
        raise Invalid(f"ids lie in 0 to {config.vocab - 1}; there is {ids.min()} to {ids.max()}")
    return ids.astype(np.int32, copy=False)


def continuous(values: np.ndarray, config: ContinuousTokens, *, truncate: bool) -> Float32[np.ndarray, "token value"]:
    """Check vectors of `dim` finite values; a single vector is one token.

    Raises Invalid for another shape, for NaN and infinity, and, unless `truncate`, if there are too many.
    """
    if values.shape == (config.dim,):
        values = values[None]
    if values.ndim != 2 or values.shape[1] != config.dim:
        raise Invalid(f"continuous tokens have shape (n, {config.dim}), not {values.shape}")
    with np.errstate(over="ignore"):
        vectors = _fit(values, config.max_length, truncate=truncate).astype(np.float32, copy=False)
    if not np.isfinite(vectors).all():
        raise Invalid("continuous tokens hold a value that is NaN, infinite or beyond float32", code="not_finite")
    return vectors


def _fit(values: np.ndarray, max_length: int, *, truncate: bool) -> np.ndarray:
    if not len(values):
        raise Invalid("there are no tokens", code="empty")
    if len(values) > max_length and not truncate:
        raise Invalid(f"there are {len(values)} tokens and the limit is {max_length}", code="too_long")
    return values[:max_length]
