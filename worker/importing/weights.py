"""The weights of a checkpoint: safetensors, in one file or in shards that an index names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast, final

import torch
from safetensors import SafetensorError, safe_open

from service.contract.errors import Permanent
from service.contract.modality import TextTokens
from worker.importing.source import checked_name
from worker.learning.device import failure_of
from worker.learning.towers.pretrained import FAULTS, build_inner, classes_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from service.contract.towers import PretrainedTower
    from worker.importing.source import Source

WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt", "tf_model.h5")
MAX_SHARDS: Final = 4096
ERROR_CHARACTERS: Final = 300


@final
@dataclass(frozen=True)
class Weights:
    """A folder with the weights and nothing else, and the shape of every tensor in it."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    files: tuple[str, ...]

    @property
    def num_values(self) -> int:
        """Values in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def number(self, name: str) -> float:
        """Return a tensor that holds one number.

        Raises Permanent if there is none by that name, or it is not one finite number.
        """
        if math.prod(self.shapes.get(name, (0,))) != 1:
            raise Permanent(f"the weights hold no number {name}", code="wrong_shapes")
        for file in self.files:
            with safe_open(self.folder / file, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 - not a mapping
                    value = float(tensors.get_tensor(name))
                    if math.isfinite(value):
                        return value
        raise Permanent(f"{name} is not finite", code="not_finite")


def fetch_weights(source: Source, prefix: str, folder: Path) -> Weights:
    """Bring a checkpoint's weights into a folder and read their headers.

    Raises Permanent if there are none that may be read, or a file is damaged.
    """
    if source.has(prefix + WHOLE):
        names = [WHOLE]
    elif source.has(prefix + INDEX):
        mapping = source.document(prefix + INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise Permanent(f"{INDEX} has no weight_map", code="bad_file")
        names = sorted({checked_name(name, INDEX) for name in cast("dict[str, object]", mapping).values()})
        for name in names:
            if "/" in name or not name.endswith(".safetensors") or len(names) > MAX_SHARDS:
                raise Permanent(f"{INDEX} names shards that are no safetensors beside it", code="forbidden_path")
            if not source.has(prefix + name):
                raise Permanent(f"{name} is missing from the checkpoint; {INDEX} names it", code="missing_file")
    else:
        found = next((name for name in PICKLES if source.has(prefix + name)), None)
        if found is None:
            raise Permanent(f"{WHOLE} is missing from the checkpoint; only safetensors are read", code="missing_file")
        message = (
            f"the weights lie in {found}, whose format can run code as it is read; only safetensors are read. "
            "Convert them where you trust the file: load it with transformers and save it with save_pretrained"
        )
        raise Permanent(message, code="pickle")
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes |= _shapes_of(source.fetch(prefix + name, folder))
    if names != [WHOLE]:
        (folder / INDEX).write_bytes(source.read(prefix + INDEX))
    return Weights(folder, shapes, tuple(names))


def _shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Permanent(f"{path.name} is damaged: {_short(error)}", code="bad_file") from error


def load_inner(config: PretrainedTower, weights: Weights) -> nn.Module:
    """Load the weights of one tower into the library's modules, in single precision.

    Raises Permanent if they are not those of the configuration.
    """
    with torch.device("meta"):  # a configuration may ask for more than any machine has
        num_values = sum(parameter.numel() for parameter in build_inner(config).parameters())
    if num_values > weights.num_values:
        message = f"config.json describes {num_values:,} weights and the files hold {weights.num_values:,}"
        raise Permanent(message, code="wrong_shapes")
    config_class, model_class, options = classes_of(config.family, is_text=isinstance(config.tokens, TextTokens))
    try:
        inner, about = model_class.from_pretrained(
            weights.folder,
            config=config_class.from_dict(config.config),
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # told of, so that `_check` can name them
            **options,
        )
    except (OSError, SafetensorError, *FAULTS) as error:
        if failure := failure_of(error):
            raise failure from error
        raise Permanent(f"the weights do not fit config.json: {_short(error)}", code="wrong_shapes") from error
    _check(cast("dict[str, Any]", about), inner)
    return inner.eval()


def _check(about: dict[str, Any], inner: nn.Module) -> None:
    if about.get("mismatched_keys"):
        name, *shapes = next(iter(about["mismatched_keys"]))
        found = " and ".join(str(tuple(shape)) for shape in shapes)
        raise Permanent(f"{name} has two shapes, in the file and by config.json: {found}", code="wrong_shapes")
    if missing := sorted(about.get("missing_keys", ())):
        message = f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        raise Permanent(message, code="missing_weights")
    for name, tensor in inner.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Permanent(f"{name} holds NaN or infinity", code="not_finite")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:ERROR_CHARACTERS]
