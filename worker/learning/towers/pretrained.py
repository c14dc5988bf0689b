"""Towers that were trained elsewhere: modules of the transformers library behind our tokens and before our read-out.

The library is imported when such a tower is built and never before: it takes seconds, and most processes need none.
What a checkpoint's own processor does to floats (scale, mean, deviation of pixels) is the fixed first step here, in two
buffers that are part of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final, assert_never, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from service.contract.errors import Permanent
from service.contract.modality import AudioTokens, ContinuousTokens, DiscreteTokens, ImageTokens, TextTokens
from service.contract.towers import Family, PretrainedTower
from worker.learning.ragged import Ragged

CHANNELS: Final = 3
AFTER_BLOCKS: Final = (
    "final_layer_norm",
    "post_layernorm",
    "audio_encoder.norm",
    "head",
    "pooler",
    "text_projection",
    "visual_projection",
    "audio_projection",
)
"""What acts after the last block, by its name in any family."""

FAULTS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the library raises for configurations that nobody would write, as they are read, built from or run."""


@final
class Pretrained(nn.Module):
    """Tokens -> one vector per sequence: of the checkpoint's own space, or of the shared one with a read-out."""

    def __init__(self, config: PretrainedTower, vocab: int | None, dimensions: int) -> None:
        """Build the tower with weights that mean nothing yet.

        Raises Permanent if this process cannot.
        """
        super().__init__()
        self.config = config
        self.is_locked = False
        """Nothing but a new read-out learns: the tower stays in evaluation mode."""
        self.inner = build_inner(config)
        self.readout = nn.Linear(config.size, dimensions, bias=False) if config.readout else None
        if self.readout is not None:
            nn.init.normal_(self.readout.weight, std=config.size**-0.5)
        if isinstance(config.tokens, ImageTokens):
            self.register_buffer("mean", torch.zeros(CHANNELS))
            self.register_buffer("deviation", torch.ones(CHANNELS))
        rows = getattr(self.inner.get_input_embeddings(), "num_embeddings", None) if vocab is not None else None
        if vocab is not None and rows is not None and vocab > rows:
            message = f"tokenizer.json has ids up to {vocab - 1}, and the model has weights for {rows} of them"
            raise Permanent(message, code="wrong_shapes")

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, first to last; those of a Swin transformer are its stages."""
        return blocks_of(self.inner)

    @property
    def recomputes(self) -> bool:
        """Activation checkpointing: the inside of blocks is computed again on the way back."""
        return bool(self.inner.is_activation_checkpointing)

    @recomputes.setter
    def recomputes(self, wanted: bool) -> None:
        if wanted and self.inner.supports_gradient_checkpointing:
            self.inner.activation_checkpointing_enable({"use_reentrant": False})

    def train(self, mode: bool = True) -> Pretrained:  # noqa: FBT001, FBT002 - torch's own signature
        """Set the mode, as torch does; a locked tower stays in evaluation mode, and so do running statistics.

        They would make a vector depend on its batch.
        """
        super().train(mode and not self.is_locked)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        return self

    def hold_still(self, num_blocks: int) -> None:
        """Keep the embedding and the first blocks from learning."""
        inside = {id(parameter) for parameter in self.blocks.parameters()}
        learning = {id(parameter) for block in self.blocks[num_blocks:] for parameter in block.parameters()}
        for name, parameter in self.inner.named_parameters():
            comes_after = id(parameter) not in inside and any(f".{part}." in f".{name}." for part in AFTER_BLOCKS)
            parameter.requires_grad_(id(parameter) in learning or comes_after)

    def forward(self, batch: Ragged) -> Float[Tensor, "sequence dimensions"]:
        """Encode each sequence on its own: padding and batch mates change nothing but rounding."""
        tokens, mask = batch.pad()
        z = self._vectors(tokens, mask)
        if self.config.unit:
            z = functional.normalize(z, dim=-1)
        return z if self.readout is None else self.readout(z)

    def _vectors(self, tokens: Tensor, mask: Bool[Tensor, "sequence token"]) -> Float[Tensor, "sequence size"]:
        config = self.config.tokens
        match config:
            case ImageTokens():
                return self._pictures(tokens, config)
            case TextTokens():
                return self._texts(tokens, mask)
            case AudioTokens():
                return self._sounds(tokens, config)
            case DiscreteTokens() | ContinuousTokens():
                raise AssertionError(config.kind)  # the contract lets no family read them
            case _:
                assert_never(config)

    def pixels(self, tokens: Tensor, config: ImageTokens) -> Float[Tensor, "sequence channel size size"]:
        """Return the pictures that patches were cut from, as the checkpoint's modules take them."""
        side, patch = config.size // config.patch, config.patch
        grid = tokens.unflatten(1, (side, side)).unflatten(-1, (patch, patch, CHANNELS))
        pixels = (grid.float() - self.get_buffer("mean")) / self.get_buffer("deviation")
        # (sequence, row, column, height, width, channel) -> (sequence, channel, size, size)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), CHANNELS, config.size, config.size)

    def _pictures(self, tokens: Tensor, config: ImageTokens) -> Float[Tensor, "sequence size"]:
        found = self.inner(pixel_values=self.pixels(tokens, config))
        return found.image_embeds if self.config.family == "clip" else found.pooler_output

    def _texts(self, tokens: Tensor, mask: Bool[Tensor, "sequence token"]) -> Float[Tensor, "sequence size"]:
        if self.config.family == "siglip":
            return self.inner(input_ids=tokens).pooler_output  # it was trained to look at padding too
        pad = self.inner.config.pad_token_id
        # Positions of some families are counted over what is no padding, by its id.
        ids = tokens if pad is None else tokens.masked_fill(~mask, pad)
        found = self.inner(input_ids=ids, attention_mask=mask.long())
        if self.config.pooling == "own":
            return found.text_embeds
        x = found.last_hidden_state
        match self.config.pooling:
            case "cls":
                return x[:, 0]
            case "max":
                return x.masked_fill(~mask[..., None], -math.inf).amax(1)
            case "mean":
                weight = mask.to(x.dtype)[..., None]
                return (x * weight).sum(1) / weight.sum(1)
            case _:
                assert_never(self.config.pooling)

    def _sounds(self, tokens: Tensor, config: AudioTokens) -> Float[Tensor, "sequence size"]:
        # (sequence, frame, picture * mel) -> (sequence, picture, frame, mel)
        pictures = tokens.float().unflatten(-1, (-1, config.mels)).transpose(1, 2)
        is_longer = (pictures[:, :1] != pictures[:, 1:]).flatten(1).any(1, keepdim=True)
        return self.inner(input_features=pictures.contiguous(), is_longer=is_longer).audio_embeds


def library() -> Any:
    """Return the transformers library, told to be quiet.

    Raises Permanent if it is not installed here.
    """
    try:
        import transformers  # noqa: PLC0415
    except ImportError as error:
        message = "imported towers need the transformers library in the worker: install isthmus[hf]"
        raise Permanent(message, code="no_transformers") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def build_inner(config: PretrainedTower) -> Any:
    """Build the library's modules for a tower, in evaluation mode.

    Raises Permanent if the library is not installed, or if it does not take the configuration.
    """
    config_class, model_class, options = classes_of(config.family, is_text=isinstance(config.tokens, TextTokens))
    from transformers.initialization import no_init_weights  # noqa: PLC0415

    with configuring(config.family), no_init_weights():  # they come from a file, always
        return model_class(config_class.from_dict(config.config), **options).eval()


@contextmanager
def configuring(what: str) -> Generator[None]:
    """Turn what the library raises for a configuration that it does not take into Permanent."""
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415

    try:
        yield
    except (StrictDataclassError, *FAULTS) as error:
        message = f"config.json describes no model of the family {what}: {_first_line(error)}"
        raise Permanent(message, code="bad_config") from error


def classes_of(family: Family, *, is_text: bool) -> tuple[Any, Any, dict[str, bool]]:
    """Return the library's classes of a tower's configuration and of its modules, and what the latter is told."""
    hf = library()
    headless = {"add_pooling_layer": False}  # sentences are pooled by `pooling`
    match family:
        case "clip" if is_text:
            return hf.CLIPTextConfig, hf.CLIPTextModelWithProjection, {}
        case "clip":
            return hf.CLIPVisionConfig, hf.CLIPVisionModelWithProjection, {}
        case "siglip" if is_text:
            return hf.SiglipTextConfig, hf.SiglipTextModel, {}
        case "siglip":
            return hf.SiglipVisionConfig, hf.SiglipVisionModel, {}
        case "clap" if is_text:
            return hf.ClapTextConfig, hf.ClapTextModelWithProjection, {}
        case "clap":
            return hf.ClapAudioConfig, hf.ClapAudioModelWithProjection, {}
        case "bert":
            return hf.BertConfig, hf.BertModel, headless
        case "distilbert":
            return hf.DistilBertConfig, hf.DistilBertModel, {}
        case "mpnet":
            return hf.MPNetConfig, hf.MPNetModel, headless
        case "roberta":
            return hf.RobertaConfig, hf.RobertaModel, headless
        case "xlm-roberta":
            return hf.XLMRobertaConfig, hf.XLMRobertaModel, headless
        case _:
            assert_never(family)


def blocks_of(inner: nn.Module) -> nn.ModuleList:
    """Return the library's blocks: the first list of layers that no other list holds."""
    for name, module in inner.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in {"layers", "layer"}:
            return module
    raise AssertionError("every family has blocks")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
