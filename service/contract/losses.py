"""What a pair is trained with: the closed union `Loss`, and the critic by which two vectors are compared.

A contrastive loss sees f = scale * s(z_a, z_b), where s is the critic and the scale belongs to the pair. `attract`
adds the one-sided regulariser -attract * mean s(positive pairs) (Chen et al. 2024, section 6): it pulls positives
together and leaves negatives alone, which only need a margin.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from service.contract.word import Real, Word

Critic = Literal["cosine", "dot", "squared_distance"]
"""cosine of the vectors; their inner product; -1/2 |a - b|^2. The last two take the vectors as the towers give them."""

_CRITIC = Field(description="cosine; dot: inner product; squared_distance: -1/2 |a - b|^2. One for a whole recipe")
_Scale = Annotated[Real, Field(gt=0, le=1000)]


class Scaled(Word):
    """What all contrastive losses share."""

    critic: Annotated[Critic, _CRITIC] = "cosine"
    init_scale: Annotated[
        _Scale | None,
        Field(
            description="the logit scale (1 / temperature) at the start; null: by the loss for cosine (14.285714; "
            "sigmoid 10), else 1 / sqrt(dimensions)"
        ),
    ] = None
    max_scale: Annotated[_Scale, Field(description="the logit scale never exceeds this")] = 100.0
    learn_scale: Annotated[StrictBool, Field(description="false: the scale stays as it starts")] = True
    attract: Annotated[
        Real, Field(ge=0, le=1000, description="weight of the one-sided regulariser, the mean critic of positives")
    ] = 0.0


class InfoNCE(Scaled):
    """Symmetric InfoNCE over the batch, the mean of both directions (CLIP)."""

    kind: Literal["info_nce"] = "info_nce"


class KSample(Scaled):
    """The K-sample risk of the sufficiency paper: both directions summed, each positive beside K - 1 independent ones.

    A batch of (K + 1) n pairs holds n positives for each direction; the rest are the negatives of both.
    """

    kind: Literal["k_sample"] = "k_sample"
    candidates: Annotated[StrictInt, Field(ge=2, le=4096, description="K, the positive included")] = 4


class Sigmoid(Scaled):
    """A yes or no for each of the batch's pairs, with a learned bias (SigLIP)."""

    kind: Literal["sigmoid"] = "sigmoid"
    init_bias: Annotated[Real, Field(ge=-1000, le=1000, description="added to the scaled score, at the start")] = -10.0


class Square(Word):
    """Mean |z_a - z_b|^2 towards a locked tower: regression, not contrast, and what contrast is measured against.

    Without a locked tower both sides would meet in one point.
    """

    kind: Literal["square"] = "square"
    critic: Annotated[
        Literal["dot", "squared_distance"], Field(description="how the vectors are compared afterwards")
    ] = "squared_distance"


Loss = Annotated[InfoNCE | KSample | Sigmoid | Square, Field(discriminator="kind")]
