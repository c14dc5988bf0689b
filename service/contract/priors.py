"""Priors: weights that a caller gives, as logarithms of probabilities."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from service.contract.errors import Invalid


def as_log_prior(weights: list[float]) -> Float64[np.ndarray, " choice"]:
    """Scale weights to sum 1 and take their logarithms; a weight of zero gives -inf.

    Raises Invalid if every one is zero.
    """
    given = np.array(weights, np.float64)
    largest = given.max()
    if largest <= 0:
        raise Invalid("not every prior can be zero", param="prior")
    given /= largest  # first, so that the sum of large ones stays finite
    with np.errstate(divide="ignore"):
        return np.log(given / given.sum())
