"""The joints of a composition: what is said of the bridge between each two legs, and where in the request it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, final

from service.contract.errors import Invalid
from service.contract.operations import EmbeddingSetRef, Joint, SetJoint, Through


@final
@dataclass(frozen=True)
class Asked:
    """A bridge as it is asked for: a modality or nothing for the models' banks, otherwise its items or sets."""

    through: Through
    weights: list[float] | None
    param: str
    weights_param: str

    @property
    def is_bank(self) -> bool:
        """Tell whether the models' banks are asked for."""
        return self.through is None or isinstance(self.through, str)

    @property
    def sets(self) -> list[EmbeddingSetRef]:
        """Return the embedding sets that are the bridge; none if it is something else."""
        given = self.through if isinstance(self.through, list) else [self.through]
        return [each for each in given if isinstance(each, EmbeddingSetRef)]


def joints_of(through: Through | Sequence[Joint | SetJoint], weights: list[float] | None, num: int) -> list[Asked]:
    """Return what is asked for at each of `num` joints.

    Raises Invalid for bridges that are not as many, and for weights that could be those of several.
    """
    if isinstance(through, list) and isinstance(through[0], Joint | SetJoint):
        joints = cast("list[Joint | SetJoint]", through)
        if len(joints) != num:
            raise Invalid(f"{len(joints)} bridges for {num} joints between legs", param="through", code="bridges")
        if weights is not None:
            raise Invalid("the weights of a list of joints stand in the joints", param="bridge_weights")
        return [
            Asked(joint.through, joint.weights, f"through[{at}].through", f"through[{at}].weights")
            for at, joint in enumerate(joints)
        ]
    if num > 1 and through is not None:
        message = "several legs have a bridge between each two: give a list of joints, or none for the models' banks"
        raise Invalid(message, param="through", code="bridges")
    if num > 1 and weights is not None:
        raise Invalid("each of several bridges has weights of its own: give a list of joints", param="bridge_weights")
    return [Asked(cast("Through", through), weights, "through", "bridge_weights")] * num


def check_weights(asked: Asked, num_items: int) -> None:
    """Raise Invalid for weights that are not those of so many bridge items."""
    weights = asked.weights
    if weights is None:
        return
    if asked.is_bank:
        message = "the bank is drawn from p(b) already: weights go with items or an embedding set in `through`"
        raise Invalid(message, param=asked.weights_param)
    if len(weights) != num_items:
        raise Invalid(f"{len(weights)} weights for {num_items} bridge items", param=asked.weights_param)
    if not any(weights):
        raise Invalid("not every weight can be zero", param=asked.weights_param)
