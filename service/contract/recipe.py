"""What to learn: towers per modality, pairs that join them, a loss, an optimiser, a budget.

A recipe is stored verbatim in the artifact that it leads to. Nested parts that a caller may leave out are `None`, and
the worker takes the class's own defaults then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from service.contract.losses import Critic, InfoNCE, KSample, Loss, Scaled, Sigmoid, Square
from service.contract.towers import AnyTower, PretrainedTower, Tower
from service.contract.word import Id, ModalityName, Real, Word


class Pair(Word):
    """A data set that joins two modalities, and how often its samples are drawn."""

    dataset: Id
    modalities: Annotated[
        tuple[ModalityName, ModalityName], Field(description="both present in every sample of the data set")
    ]
    weight: Annotated[Real, Field(gt=0, le=1000, description="relative share of the steps")] = 1.0
    loss: Annotated[Loss | None, Field(description="null: the recipe's")] = None

    @model_validator(mode="after")
    def _two_different_ones(self) -> Pair:
        if self.modalities[0] == self.modalities[1]:
            msg = "a pair joins two different modalities"
            raise ValueError(msg)
        return self


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


class Compute(Word):
    """How the work is done. Nothing here changes what is learned, but for rounding."""

    micro_batch: Annotated[
        StrictInt | None,
        Field(
            ge=1,
            le=1_048_576,
            description="items encoded at once; the gradient stays the whole batch's (gradient caching); null: all",
        ),
    ] = None
    activation_checkpointing: Annotated[
        StrictBool, Field(description="compute the inside of blocks again on the way back instead of keeping it")
    ] = False
    compile: Annotated[
        Literal["auto", "never", "always"], Field(description="torch.compile; auto: on CUDA, for long runs")
    ] = "auto"
    loaders: Annotated[
        StrictInt | None,
        Field(ge=0, le=64, description="processes that prepare batches; 0: a thread; null: by the cores and media"),
    ] = None
    devices: Annotated[
        StrictInt, Field(ge=1, le=64, description="GPUs (processes on the CPU) that share every batch")
    ] = 1


class Bank(Word):
    """The bridge bank: training items kept in the artifact, over which composition sums."""

    keep: Annotated[
        Literal["items", "vectors", "none"],
        Field(description="items: tokens and vectors; vectors: the items cannot be read back; none: nothing is kept"),
    ] = "items"
    size: Annotated[StrictInt, Field(ge=16, le=1_048_576, description="draws per pair and modality")] = 4096


class Recipe(Word):
    """A training run, whole: with the data sets that it names, it determines the model."""

    towers: Annotated[dict[ModalityName, AnyTower], Field(min_length=2, max_length=64)]
    pairs: Annotated[list[Pair], Field(min_length=1, max_length=256)]
    dimensions: Annotated[StrictInt, Field(ge=2, le=16_384, description="of the shared space")] = 64
    loss: Loss | None = None
    optimiser: Optimiser | None = None
    budget: Budget | None = None
    compute: Compute | None = None
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

    @model_validator(mode="after")
    def _towers_end_in_the_space(self) -> Recipe:
        check_dimensions(self.towers, self.dimensions)
        for name, tower in self.towers.items():
            if isinstance(tower, PretrainedTower) and tower.init_from is None:
                msg = f"towers.{name}: a pretrained tower needs init_from: its weights come from a model"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _devices_share_a_batch(self) -> Recipe:
        devices, batch_size = (self.compute or Compute()).devices, (self.budget or Budget()).batch_size
        if batch_size % devices:
            msg = f"batch_size {batch_size} is not a multiple of compute.devices {devices}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _losses_agree(self) -> Recipe:
        by_name: dict[str, tuple[int, Loss]] = {}
        batch_size = (self.budget or Budget()).batch_size
        critic = self.critic
        for at, pair in enumerate(self.pairs):
            loss = self.loss_of(pair)
            first, other = by_name.setdefault(pair_name(*pair.modalities), (at, loss))
            if other != loss:
                msg = f"pairs[{at}] has another loss than pairs[{first}], which joins the same modalities by one scale"
                raise ValueError(msg)
            if loss.critic != critic:
                msg = f"pairs[{at}]: critic {loss.critic} beside {critic}; one space has one critic"
                raise ValueError(msg)
            if isinstance(loss, Square) and not any(self.towers[modality].is_still for modality in pair.modalities):
                msg = f"pairs[{at}]: square loss needs a locked tower, or all vectors meet in one point"
                raise ValueError(msg)
            if isinstance(loss, KSample) and batch_size % (loss.candidates + 1):
                msg = (
                    f"pairs[{at}]: batch_size {batch_size} is not a multiple of candidates + 1 = {loss.candidates + 1}"
                )
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _every_pair_teaches_something(self) -> Recipe:
        for at, pair in enumerate(self.pairs):
            loss = self.loss_of(pair)
            learns_alone = isinstance(loss, Sigmoid) or (isinstance(loss, Scaled) and loss.learn_scale)
            if all(self.towers[modality].is_still for modality in pair.modalities) and not learns_alone:
                msg = f"pairs[{at}]: both towers are locked, and no scale learns: there is nothing to train"
                raise ValueError(msg)
        return self

    def loss_of(self, pair: Pair) -> Loss:
        """Return the loss of one of the pairs."""
        return pair.loss or self.loss or InfoNCE()

    @property
    def critic(self) -> Critic:
        """How two vectors of the space are compared."""
        return self.loss_of(self.pairs[0]).critic


def check_dimensions(towers: Mapping[str, Tower | PretrainedTower], dimensions: int) -> None:
    """Raise ValueError if a tower without a read-out has vectors of another size than the space."""
    for name, tower in towers.items():
        if isinstance(tower, PretrainedTower) and not tower.readout and tower.size != dimensions:
            msg = f"towers.{name}: its vectors have {tower.size} values and the space {dimensions}: set readout"
            raise ValueError(msg)


def pair_name(first: str, second: str) -> str:
    """Name a pair of modalities, the same in either order."""
    return "+".join(sorted((first, second)))
