"""What to learn: towers per modality, pairs that join them, a loss, an optimiser, a budget.

A recipe is stored verbatim in the artifact that it leads to. Nested parts that a caller may leave out are `None`, and
the worker takes the class's own defaults then.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from service.contract.modality import TokeniserConfig
from service.contract.word import Id, ModalityName, Real, Word


class Tower(Word):
    """A pre-norm transformer over the tokens of one modality, with a linear read-out into the shared space."""

    tokens: TokeniserConfig
    width: Annotated[StrictInt, Field(ge=8, le=8192)] = 64
    depth: Annotated[StrictInt, Field(ge=1, le=128, description="blocks")] = 2
    heads: Annotated[StrictInt, Field(ge=1, le=128)] = 4
    mlp_ratio: Annotated[Real, Field(gt=0, le=16)] = 4.0
    pooling: Literal["mean", "cls"] = "mean"
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Tower:
        if self.width % self.heads:
            msg = f"width {self.width} is not a multiple of heads {self.heads}"
            raise ValueError(msg)
        return self


class Pair(Word):
    """A data set that joins two modalities, and how often its samples are drawn."""

    dataset: Id
    modalities: Annotated[
        tuple[ModalityName, ModalityName], Field(description="both present in every sample of the data set")
    ]
    weight: Annotated[Real, Field(gt=0, le=1000, description="relative share of the steps")] = 1.0

    @model_validator(mode="after")
    def _two_different_ones(self) -> Pair:
        if self.modalities[0] == self.modalities[1]:
            msg = "a pair joins two different modalities"
            raise ValueError(msg)
        return self


class InfoNCE(Word):
    """Symmetric InfoNCE over the batch, the mean of both directions (CLIP)."""

    kind: Literal["info_nce"] = "info_nce"
    init_scale: Annotated[Real, Field(gt=0, le=1000, description="the logit scale at the start")] = 14.285714
    max_scale: Annotated[Real, Field(gt=0, le=1000, description="the logit scale never exceeds this")] = 100.0
    learn_scale: StrictBool = True


Loss = InfoNCE  # a discriminated union on `kind` as soon as there are two


class Optimiser(Word):
    """AdamW with linear warm-up, cosine decay and clipping of the gradient's norm."""

    learning_rate: Annotated[Real, Field(gt=0, le=10)] = 1e-3
    weight_decay: Annotated[Real, Field(ge=0, le=10)] = 0.05
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = (0.9, 0.98)
    warmup_steps: Annotated[StrictInt, Field(ge=0, le=10_000_000)] = 50
    final_fraction: Annotated[Real, Field(ge=0, le=1, description="of the learning rate, at the last step")] = 0.0
    clip_norm: Annotated[Real, Field(gt=0, le=1e6)] = 1.0


class Budget(Word):
    """How long to train, and how often to look up from it."""

    steps: Annotated[StrictInt, Field(ge=1, le=100_000_000)] = 1000
    batch_size: Annotated[StrictInt, Field(ge=2, le=1_048_576, description="pairs in a step")] = 128
    checkpoint_s: Annotated[Real, Field(ge=0, le=86_400, description="at most this much work is at risk, seconds")] = (
        60.0
    )
    keep_checkpoints: Annotated[StrictInt, Field(ge=2, le=100)] = 2
    log_every: Annotated[StrictInt, Field(ge=1, le=100_000, description="steps between two metrics")] = 10


class Bank(Word):
    """The bridge bank: training items kept in the artifact, over which composition sums."""

    keep: Annotated[
        Literal["items", "vectors", "none"],
        Field(description="items: tokens and vectors; vectors: the items cannot be read back; none: nothing is kept"),
    ] = "items"
    size: Annotated[StrictInt, Field(ge=16, le=1_048_576, description="draws per pair and modality")] = 4096


class Recipe(Word):
    """A training run, whole: with the data sets that it names, it determines the model."""

    towers: Annotated[dict[ModalityName, Tower], Field(min_length=2, max_length=64)]
    pairs: Annotated[list[Pair], Field(min_length=1, max_length=256)]
    dimensions: Annotated[StrictInt, Field(ge=2, le=16_384, description="of the shared space")] = 64
    loss: Loss | None = None
    optimiser: Optimiser | None = None
    budget: Budget | None = None
    bank: Bank | None = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], Field(description="auto: bf16 autocast on CUDA, fp32 elsewhere")
    ] = "auto"
    seed: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] = 0

    @model_validator(mode="after")
    def _pairs_have_towers(self) -> Recipe:
        used: set[str] = set()
        for at, pair in enumerate(self.pairs):
            for modality in pair.modalities:
                if modality not in self.towers:
                    msg = f"pairs[{at}] names {modality!r}, which has no tower"
                    raise ValueError(msg)
                used.add(modality)
        if idle := sorted(set(self.towers) - used):
            msg = f"no pair trains the tower of {', '.join(map(repr, idle))}"
            raise ValueError(msg)
        return self


def pair_name(first: str, second: str) -> str:
    """Name a pair of modalities, the same in either order."""
    return "+".join(sorted((first, second)))
