"""What turns the tokens of one modality into a vector of the shared space, and what of it learns.

A tower starts from the seed, or with `init_from` from the same modality of a model that exists. What is not locked,
frozen or replaced by low-rank updates learns.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, cast

from pydantic import Discriminator, Field, StrictBool, StrictInt, Tag, model_validator

from service.contract.errors import Invalid
from service.contract.modality import AudioTokens, ContinuousTokens, DiscreteTokens, ImageTokens, TokeniserConfig
from service.contract.word import Id, ModalityName, Real, Word

Preset = Literal["tiny", "small", "medium", "base", "large"]
PRESETS: Final[dict[Preset, dict[str, int | float]]] = {
    "tiny": {"width": 64, "depth": 2, "heads": 4, "mlp_ratio": 4.0},
    "small": {"width": 192, "depth": 6, "heads": 3, "mlp_ratio": 4.0},
    "medium": {"width": 512, "depth": 12, "heads": 8, "mlp_ratio": 4.0},  # CLIP's text tower
    "base": {"width": 768, "depth": 12, "heads": 12, "mlp_ratio": 4.0},  # ViT-B
    "large": {"width": 1024, "depth": 24, "heads": 16, "mlp_ratio": 4.0},  # ViT-L
}

_Share = Annotated[Real, Field(ge=0, le=1)]


class InitFrom(Word):
    """A tower of a model that exists: its weights and its tokeniser are where this one starts."""

    model: Annotated[Id, Field(description="a model's id or alias, or job_x@latest, job_x@<step>")]
    modality: Annotated[ModalityName | None, Field(description="null: the same name")] = None


class LoRA(Word):
    """Low-rank updates of the blocks' matrices; the matrices themselves stay as they are (Hu et al. 2021)."""

    rank: Annotated[StrictInt, Field(ge=1, le=1024)] = 8
    alpha: Annotated[Real, Field(gt=0, le=4096, description="the update is scaled by alpha / rank")] = 16.0


class ImageAugment(Word):
    """What happens to a training image before it is cut into patches, anew in every epoch."""

    kind: Literal["image"] = "image"
    crop: Annotated[Real, Field(gt=0, le=1, description="a random crop keeps at least this share of the area")] = 0.9
    flip: Annotated[_Share, Field(description="chance of a mirror image; wrong for digits and letters")] = 0.0
    colour: Annotated[_Share, Field(description="brightness, contrast and saturation change by up to this")] = 0.0


class AudioAugment(Word):
    """What happens to a training sound before and after it becomes a log-mel picture, anew in every epoch."""

    kind: Literal["audio"] = "audio"
    shift_s: Annotated[Real, Field(ge=0, le=600, description="the window moves by up to this, seconds")] = 0.0
    noise_db: Annotated[
        Real | None, Field(ge=-20, le=120, description="white noise this far below the sound's level; null: none")
    ] = None
    time_masks: Annotated[StrictInt, Field(ge=0, le=32)] = 0
    time_share: Annotated[_Share, Field(description="a time mask spans at most this share of the window")] = 0.1
    mel_masks: Annotated[StrictInt, Field(ge=0, le=32)] = 0
    mel_share: Annotated[_Share, Field(description="a mel mask spans at most this share of the bands")] = 0.2


class TokenAugment(Word):
    """What happens to a training sequence of text, ids or vectors, anew in every epoch."""

    kind: Literal["tokens"] = "tokens"
    drop: Annotated[
        Real, Field(ge=0, lt=1, description="chance that a token is left out; start, end and the last one stay")
    ] = 0.1


Augment = Annotated[ImageAugment | AudioAugment | TokenAugment, Field(discriminator="kind")]


_NEW_READOUT: Final = Field(
    description="draw the linear map into the shared space anew and learn it, even where the tower is locked; "
    "needs init_from"
)


class Tower(Word):
    """A pre-norm transformer over the tokens of one modality, with a linear read-out into the shared space."""

    kind: Literal["transformer"] = "transformer"
    tokens: TokeniserConfig
    preset: Annotated[
        Preset | None, Field(description="fills in width, depth, heads and mlp_ratio where they are left out")
    ] = None
    width: Annotated[StrictInt, Field(ge=8, le=8192)] = 64
    depth: Annotated[StrictInt, Field(ge=1, le=128, description="blocks")] = 2
    heads: Annotated[StrictInt, Field(ge=1, le=128)] = 4
    mlp_ratio: Annotated[Real, Field(gt=0, le=16)] = 4.0
    positions: Annotated[Literal["learned", "rotary"], Field(description="rotary: over the place in the sequence")] = (
        "learned"
    )
    pooling: Annotated[
        Literal["mean", "cls", "attention"], Field(description="attention: one learned query over the last tokens")
    ] = "mean"
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    init_from: InitFrom | None = None
    locked: Annotated[
        StrictBool, Field(description="nothing of the tower learns, but for a new read-out; needs init_from")
    ] = False
    new_readout: Annotated[StrictBool, _NEW_READOUT] = False
    frozen_blocks: Annotated[
        StrictInt, Field(ge=0, le=128, description="the embedding and the first blocks do not learn; needs init_from")
    ] = 0
    lora: LoRA | None = None
    augment: Augment | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = cast("dict[str, Any]", value)
        preset = given.get("preset")
        return {**PRESETS[preset], **given} if isinstance(preset, str) and preset in PRESETS else given

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Tower:
        if self.width % self.heads:
            msg = f"width {self.width} is not a multiple of heads {self.heads}"
            raise ValueError(msg)
        if self.positions == "rotary" and self.width // self.heads % 2:
            msg = f"rotary positions turn pairs of values: width / heads is odd, {self.width // self.heads}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _what_stays_was_learned_elsewhere(self) -> Tower:
        if self.init_from is None:
            for what, is_asked in (
                ("locked", self.locked),
                ("new_readout", self.new_readout),
                ("frozen_blocks", self.frozen_blocks > 0),
                ("lora", self.lora is not None),
            ):
                if is_asked:
                    msg = f"{what} needs init_from: random weights are not worth keeping"
                    raise ValueError(msg)
        if self.locked and (self.lora is not None or self.frozen_blocks or self.augment is not None):
            msg = "a locked tower learns nothing: leave out lora, frozen_blocks and augment"
            raise ValueError(msg)
        _check_frozen(self.frozen_blocks, self.depth)
        return self

    @model_validator(mode="after")
    def _augment_fits_the_medium(self) -> Tower:
        _check_augment(self.augment, self.tokens)
        return self

    @model_validator(mode="after")
    def _tokens_are_ours(self) -> Tower:
        if not isinstance(self.tokens, DiscreteTokens | ContinuousTokens) and self.tokens.processing is not None:
            msg = "tokens.processing belongs to a tower of kind 'pretrained'"
            raise ValueError(msg)
        return self

    @property
    def is_still(self) -> bool:
        """Whether nothing of the tower learns, so that its vectors stay what they are."""
        return self.locked and not self.new_readout


Family = Literal["clip", "siglip", "clap", "bert", "distilbert", "mpnet", "roberta", "xlm-roberta"]
"""Whose modules a pre-trained tower is made of."""

_READ_BY: Final[dict[Family, tuple[str, ...]]] = {
    "clip": ("image", "text"),
    "siglip": ("image", "text"),
    "clap": ("audio", "text"),
}
"""Kinds of tokens; the other families read text alone."""


class PretrainedTower(Word):
    """A tower that was imported: modules of the transformers library, and perhaps a linear read-out behind them.

    Recipes name one by `kind: inherited`, which fills in what the model has.
    """

    kind: Literal["pretrained"] = "pretrained"
    tokens: TokeniserConfig
    family: Family
    config: Annotated[dict[str, Any], Field(description="of its modules, as the checkpoint had it")]
    pooling: Annotated[
        Literal["own", "mean", "cls", "max"], Field(description="over the last tokens; own: as the family does it")
    ] = "own"
    unit: Annotated[StrictBool, Field(description="vectors are brought to unit length before the read-out")] = False
    size: Annotated[StrictInt, Field(ge=1, le=16_384, description="values in a vector before the read-out")]
    depth: Annotated[StrictInt, Field(ge=1, le=1000, description="blocks")]
    readout: Annotated[
        StrictBool, Field(description="a linear map into the shared space; false: size is its dimensions")
    ] = False
    init_from: InitFrom | None = None
    locked: Annotated[
        StrictBool, Field(description="nothing of the tower learns, but for a new read-out; needs init_from")
    ] = False
    new_readout: Annotated[StrictBool, _NEW_READOUT] = False
    frozen_blocks: Annotated[
        StrictInt, Field(ge=0, le=1000, description="the embedding and the first blocks do not learn; needs init_from")
    ] = 0
    augment: Augment | None = None

    @model_validator(mode="after")
    def _fields_fit(self) -> PretrainedTower:
        if self.tokens.kind not in (reads := _READ_BY.get(self.family, ("text",))):
            msg = f"tokens of kind {self.tokens.kind!r}: {self.family} reads {' and '.join(reads)}"
            raise ValueError(msg)
        if self.new_readout and not self.readout:
            msg = "new_readout needs readout"
            raise ValueError(msg)
        if self.init_from is None and (self.locked or self.new_readout or self.frozen_blocks):
            msg = "locked, new_readout and frozen_blocks need init_from: random weights are not worth keeping"
            raise ValueError(msg)
        if self.locked and (self.frozen_blocks or self.augment is not None):
            msg = "a locked tower learns nothing: leave out frozen_blocks and augment"
            raise ValueError(msg)
        if alien := next((name for name in self.config if name.startswith("_") or "implementation" in name), None):
            # Such as where to fetch the code of its attention from.
            msg = f"config.{alien[:50]}: config says what the modules are, and nothing of how they run"
            raise ValueError(msg)
        _check_frozen(self.frozen_blocks, self.depth)
        _check_augment(self.augment, self.tokens)
        if self.augment is not None and self.augment.kind == "tokens":
            msg = "tokens of an imported tower cannot be left out: some of them mean something to it by their place"
            raise ValueError(msg)
        return self

    @property
    def is_still(self) -> bool:
        """Whether nothing of the tower learns, so that its vectors stay what they are."""
        return self.locked and not self.new_readout


def _check_frozen(frozen_blocks: int, depth: int) -> None:
    if frozen_blocks > depth:
        msg = f"frozen_blocks {frozen_blocks} is more than depth {depth}"
        raise ValueError(msg)


def _check_augment(augment: Augment | None, tokens: TokeniserConfig) -> None:
    wanted = tokens.kind if isinstance(tokens, ImageTokens | AudioTokens) else "tokens"
    if augment is not None and augment.kind != wanted:
        msg = f"augment of kind {augment.kind!r} does not fit {tokens.kind}: use {wanted!r}"
        raise ValueError(msg)


def _kind_of(value: Any) -> str | None:
    # Recipes from before there was a second kind do not say theirs.
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).get("kind", "transformer")
    return getattr(value, "kind", None)


AnyTower = Annotated[
    Annotated[Tower, Tag("transformer")] | Annotated[PretrainedTower, Tag("pretrained")], Discriminator(_kind_of)
]


def draws_readout(
    tower: Tower | PretrainedTower, dimensions: int, start: Tower | PretrainedTower, start_dimensions: int
) -> bool:
    """Tell whether the read-out of a tower cannot, or should not, be that of the tower it starts from."""
    if isinstance(tower, PretrainedTower) and isinstance(start, PretrainedTower) and not start.readout:
        return tower.readout
    return tower.new_readout or dimensions != start_dimensions


def check_start(
    tower: Tower | PretrainedTower, dimensions: int, start: Tower | PretrainedTower, start_dimensions: int
) -> None:
    """Check that a tower can start from another: what decides the shape and the meaning of its weights is the same.

    Dropout and what learns may differ, and the dimensions of the space unless the tower is locked without a new
    read-out. Raises Invalid (`start_differs`), naming the field and both values.
    """
    wanted, found = _shape(tower), _shape(start)
    for name in dict.fromkeys((*wanted, *found)):
        if wanted.get(name) != found.get(name):
            message = f"{name} is {wanted.get(name)} here and {found.get(name)} in the model to start from"
            if name == "config":  # dozens of fields
                message = "config is not that of the model to start from"
            raise Invalid(message, code="start_differs")
    if isinstance(tower, PretrainedTower) and isinstance(start, PretrainedTower) and start.readout > tower.readout:
        raise Invalid("readout is False here and True in the model to start from", code="start_differs")
    if tower.is_still and draws_readout(tower, dimensions, start, start_dimensions):
        message = f"dimensions is {dimensions} here and {start_dimensions} in the model to start from"
        raise Invalid(f"{message}: a locked tower needs new_readout then, which learns", code="start_differs")


def _shape(tower: Tower | PretrainedTower) -> dict[str, Any]:
    ours = {"kind", "width", "depth", "heads", "mlp_ratio", "positions", "pooling"}
    tokens = {f"tokens.{name}": value for name, value in tower.tokens.model_dump().items()}
    return tokens | tower.model_dump(include=ours | {"family", "unit", "size", "config"})
