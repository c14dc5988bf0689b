"""What the families' readers share: fields of JSON files that may say anything, and the parts of preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast, final

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer

from service.contract.errors import Invalid, Permanent
from service.contract.modality import ImageTokens, TextTokens
from service.contract.processing import ImageProcessing, TextProcessing
from service.contract.tokens.decode import decoding
from service.contract.tokens.image_processing import FILTERS
from service.contract.tokens.text_processing import plain_file
from service.contract.towers import PretrainedTower
from worker.learning.towers.pretrained import blocks_of, build_inner, configuring, library

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.contract.losses import Critic, Loss
    from service.contract.modality import TokeniserConfig
    from service.contract.towers import Family
    from worker.importing.source import Source

Medium = Literal["image", "text", "audio"]
MAX_CONFIG_BYTES: Final = 256 << 10
MAX_NUMBER: Final = 2**31
MAX_BLOCKS: Final = 1000
UNSAID: Final = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
    }
)
"""Of the library's configurations: says nothing about the numbers that come out."""
IMAGE_PROCESSORS: Final = ("CLIPImageProcessor", "CLIPFeatureExtractor", "SiglipImageProcessor")


@final
@dataclass(frozen=True)
class Part:
    """A tower of a checkpoint: what it is, its tokeniser's file, its fixed first step for pixels."""

    tower: PretrainedTower
    tokeniser: bytes | None = None
    first_step: tuple[list[float], list[float]] | None = None
    """Mean and deviation of each channel, in 8-bit values."""


@final
@dataclass(frozen=True)
class Found:
    """What a checkpoint holds; `numbers` names the tensors with the log of the pair's scale, and its bias."""

    architecture: str
    parts: dict[Medium, Part]
    dimensions: int
    prefix: str = ""
    """Of the names of the weights' files."""
    loss: Loss | None = None
    log_scale: str | None = None
    bias: str | None = None
    critic: Critic = "cosine"


def check_config(config: dict[str, Any]) -> None:
    """Refuse a configuration that is absurd before anything is built from it.

    Raises Permanent naming the field.
    """
    stack: list[tuple[str, Any]] = [("", config)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{name}.{key}".lstrip("."), each) for key, each in cast("dict[str, Any]", value).items()]
        elif isinstance(value, list):
            stack += [(name, each) for each in cast("list[Any]", value)]
        elif isinstance(value, int | float):
            is_count = name.rpartition(".")[2] in {"num_hidden_layers", "n_layers", "num_layers", "depths"}
            if abs(value) > MAX_NUMBER or (is_count and value > MAX_BLOCKS):
                raise Permanent(f"config.json: {name} is {value}, which no model has", code="bad_config")


def settings_of(raw: dict[str, Any], configuration: str, member: str | None, **changes: Any) -> dict[str, Any]:
    """Complete a configuration with the library's defaults, and leave out what says nothing or is not the family's.

    Raises Permanent if the library does not take it.
    """
    made = getattr(library(), configuration)
    with configuring(configuration.removesuffix("Config")):
        found = made.from_dict(raw)
        inner = found if member is None else getattr(found, member)
        settings = cast("dict[str, Any]", inner.to_dict())
        known = cast("dict[str, Any]", type(inner)().to_dict())
    return {name: value for name, value in settings.items() if name in known and name not in UNSAID} | changes


def integer(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """Return a whole number above zero from a configuration.

    Raises Permanent if it is none.
    """
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Permanent(f"config.json: {name} is no whole number above zero", code="bad_config")
    return value


def tower_of(
    family: Family, tokens: TokeniserConfig, config: dict[str, Any], size: int, **more: Any
) -> PretrainedTower:
    """Describe a tower, with the number of its blocks, which its modules know.

    Raises Permanent if the library does not take the configuration.
    """
    tower = validated(
        lambda: PretrainedTower(tokens=tokens, family=family, config=config, size=size, depth=1, **more), "config.json"
    )
    with torch.device("meta"):
        return tower.model_copy(update={"depth": len(blocks_of(build_inner(tower)))})


def member_of_processor(source: Source, member: str) -> dict[str, Any]:
    """Return how pictures or sounds are prepared: of preprocessor_config.json, or within processor_config.json."""
    if source.has("processor_config.json"):
        inside = source.document("processor_config.json").get(member)
        if isinstance(inside, dict):
            return cast("dict[str, Any]", inside)
    return source.document("preprocessor_config.json")


def validated(make: Callable[[], Any], file: str) -> Any:
    """Build a word of the contract from what a file says.

    Raises Permanent naming the file and the field.
    """
    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Permanent(f"{file}: {where + ': ' if where else ''}{first['msg']}", code="bad_config") from error


def image_part(
    source: Source, vision: dict[str, Any], *, squashes: bool
) -> tuple[ImageTokens, tuple[list[float], list[float]]]:
    """Read how pictures are prepared, and the fixed first step.

    Raises Permanent for what we cannot do alike.
    """
    file = "the image processor's configuration"
    given = member_of_processor(source, "image_processor")
    name = str(given.get("image_processor_type") or given.get("feature_extractor_type") or IMAGE_PROCESSORS[0])
    if name.removesuffix("Fast").removesuffix("Pil") not in IMAGE_PROCESSORS:
        raise Permanent(f"{file}: {name[:100]} is not one of {', '.join(IMAGE_PROCESSORS)}", code="bad_config")
    if not given.get("do_resize", True):
        raise Permanent(f"{file}: pictures that are not resized cannot be imported", code="bad_config")
    size = given.get("size", {"height": 224, "width": 224} if squashes else {"shortest_edge": 224})
    shortest: Any = None
    squash: Any = None
    if isinstance(size, dict) and "shortest_edge" in size and "longest_edge" not in size:
        shortest = cast("dict[str, Any]", size)["shortest_edge"]
    elif isinstance(size, int):
        shortest, squash = (None, size) if squashes else (size, None)
    else:
        squash = _square(size, file)
    crop = None
    if given.get("do_center_crop", not squashes):
        crop = _square(given.get("crop_size", 224), file)
    number = given.get("resample", 3)
    if not isinstance(number, int) or not 0 <= number < len(FILTERS):
        raise Permanent(f"{file}: resample is none of Pillow's filters", code="bad_config")
    patch = integer(vision, "patch_size")

    def make() -> ImageTokens:
        resample = cast("Any", list(FILTERS)[number])
        processing = ImageProcessing(shortest_edge=shortest, squash=squash, crop=crop, resample=resample)
        return ImageTokens(
            size=processing.side // patch * patch,
            patch=patch,
            resize="crop" if squash is None else "squash",
            processing=processing,
        )

    tokens = validated(make, file)
    if integer(vision, "num_channels", 3) != 3:
        raise Permanent("config.json: pictures of other than 3 channels cannot be imported", code="bad_config")
    if tokens.processing.side != integer(vision, "image_size"):
        message = f"{file} makes pictures of {tokens.processing.side} pixels, config.json wants {vision['image_size']}"
        raise Permanent(message, code="bad_config")
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    half = [0.5, 0.5, 0.5]
    of_clip = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    default = (half, half) if squashes else of_clip
    mean, deviation = given.get("image_mean", default[0]), given.get("image_std", default[1])
    if not given.get("do_normalize", True):
        mean, deviation = [0.0] * 3, [1.0] * 3
    scale = _level(factor, file)
    means, deviations = ([_level(each, file) for each in _three(values)] for values in (mean, deviation))
    if not scale or not all(deviations):
        raise Permanent(f"{file}: image_std or rescale_factor is zero", code="bad_config")
    return tokens, ([each / scale for each in means], [each / scale for each in deviations])


def _three(values: Any) -> list[Any]:
    return cast("list[Any]", values) if isinstance(values, list) and len(values) == 3 else [values] * 3  # pyright: ignore[reportUnknownArgumentType]


def _level(value: Any, file: str) -> float:
    if not isinstance(value, int | float) or not -1e6 < value < 1e6:
        raise Permanent(f"{file}: image_mean, image_std and rescale_factor are numbers", code="bad_config")
    return float(value)


def _square(size: Any, file: str) -> int:
    if isinstance(size, int):
        return size
    if isinstance(size, dict):
        sides = [cast("dict[str, Any]", size).get(name) for name in ("height", "width")]
        if isinstance(sides[0], int) and sides[0] == sides[1]:
            return sides[0]
    raise Permanent(f"{file}: only square sizes can be imported", code="bad_config")


def text_part(
    source: Source,
    prefix: str,
    config: dict[str, Any],
    max_length: int,
    *,
    pad_token: str | None = None,
    **processing: Any,
) -> tuple[TextTokens, bytes]:
    """Read how text becomes ids; `processing` as the family asks for, with `pad` the side to fill up with `pad_token`.

    Raises Permanent if there is no tokenizer.json, or it does not fit the model.
    """
    name = f"{prefix}tokenizer.json"
    if not source.has(name):
        message = f"{name} is missing from the checkpoint; save its fast tokeniser beside it with save_pretrained"
        raise Permanent(message, code="missing_file")
    data = source.read(name)
    try:
        with decoding(name):
            file = plain_file(data)
            tokenizer = Tokenizer.from_str(file.decode())
            special = tokenizer.encode("").ids  # which need not be those of its vocabulary
    except Invalid as error:
        raise Permanent(f"{name} is no tokeniser's file", code="bad_file") from error
    if tokenizer.num_special_tokens_to_add(is_pair=False) >= max_length:
        raise Permanent(f"{name} adds more special tokens than the model takes tokens", code="bad_config")
    last, rows = (
        max(*special, *tokenizer.get_vocab(with_added_tokens=True).values(), 0, 0),
        integer(config, "vocab_size"),
    )
    if last >= rows:
        raise Permanent(f"{name} has ids up to {last}, and the model has {rows} of them", code="wrong_shapes")
    if pad_token is not None:
        processing["pad_id"] = tokenizer.token_to_id(pad_token)
        if processing["pad_id"] is None:
            raise Permanent(f"{name} has no padding token {pad_token[:50]!r}", code="bad_config")
    make = lambda: TextTokens(max_length=max_length, processing=TextProcessing(**processing))  # noqa: E731
    return validated(make, name), file


def tokeniser_settings(source: Source, prefix: str = "") -> dict[str, Any]:
    """Return tokenizer_config.json, or nothing if the checkpoint has none."""
    name = f"{prefix}tokenizer_config.json"
    return source.document(name) if source.has(name) else {}


def longest(settings: dict[str, Any], most: int) -> int:
    """Return the tokens that a model takes: as the tokeniser says, and no more than there are positions for."""
    value = settings.get("model_max_length")
    return min(value, most) if isinstance(value, int) and value >= 3 else most
