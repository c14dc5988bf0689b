"""Sums of vectors as operands: which modality a sum takes part as, and its vector."""

from __future__ import annotations

from typing import Final

import numpy as np
from jaxtyping import Float32, Float64

from service.catalogue import Model
from service.contract.errors import Invalid
from service.contract.items import SumItem
from service.contract.losses import Critic

CANCELLED: Final = 1e-5
"""Of what the weights of a sum add up to: a shorter sum of unit vectors is the rounding of its parts."""


def modality_of(model: Model, item: SumItem, of_parts: list[str], hint: str | None) -> str:
    """Return the modality that a sum counts as; `hint` is what the request says where the item does not.

    Raises Invalid where nothing says it and the parts differ, and for parts that share no space with it.
    """
    if item.modality is not None:
        model.check_modality(item.modality, param="modality")
    kinds = list(dict.fromkeys(of_parts))
    modality = item.modality or hint
    if modality is None and len(kinds) > 1:
        raise Invalid(f"parts of {' and '.join(kinds)}: say with modality which of them the sum counts as", param="sum")
    modality = modality or kinds[0]
    space = model.space(modality)
    for number, each in enumerate(of_parts):
        if each not in space:
            message = f"nothing that the model was trained on joins {each} with {modality}: they share no space"
            raise Invalid(message, param=f"sum[{number}]", code="no_shared_space")
    return modality


def add(
    critic: Critic, weights: Float64[np.ndarray, " part"], z: Float32[np.ndarray, "part dim"], *, param: str, item: int
) -> Float32[np.ndarray, " dim"]:
    """Sum vectors by their weights; for the cosine the sum has unit length, as its parts have.

    Raises Invalid where unit vectors cancel, since rounding alone would choose the direction, and beyond float32.
    """
    if critic == "cosine":
        shares = weights / np.abs(weights).max()
        total = shares @ z.astype(np.float64)
        length = float(np.linalg.norm(total))
        if length <= CANCELLED * np.abs(shares).sum():
            raise Invalid("the parts of the sum cancel: it has no direction", param=param, item=item)
        return (total / length).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        found = (weights @ z.astype(np.float64)).astype(np.float32)
    if not np.isfinite(found).all():
        raise Invalid("the sum is beyond float32", param=param, item=item)
    return found
