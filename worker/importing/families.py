"""The checkpoints that can be imported, family by family: which files say what, and which weights are the pair's scale.

Each reader looks at JSON alone; `weights` reads the tensors afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from service.contract.errors import Permanent
from service.contract.losses import InfoNCE, Sigmoid
from service.contract.modality import AudioTokens
from service.contract.processing import AudioProcessing
from service.contract.towers import Family
from worker.importing.reading import (
    MAX_CONFIG_BYTES,
    Found,
    Part,
    check_config,
    image_part,
    integer,
    longest,
    member_of_processor,
    settings_of,
    text_part,
    tokeniser_settings,
    tower_of,
    validated,
)
from worker.importing.source import checked_name

if TYPE_CHECKING:
    from worker.importing.source import Source

MAX_SCALE: Final = 1000.0  # SigLIP's lie above the 100 at which CLIP's are held
SENTENCE_FAMILIES: Final = {
    "bert": "Bert",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}
"""As configurations name them -> as the library does."""
SUPPORTED: Final = (
    f"CLIP, SigLIP (of fixed resolution), CLAP, and sentence-transformers of {', '.join(SENTENCE_FAMILIES)}"
)


def read_checkpoint(source: Source) -> Found:
    """Read what a checkpoint is.

    Raises Permanent, naming the architecture or the file, for what cannot be imported.
    """
    if source.has("modules.json"):
        return _sentences(source)
    raw = _config(source, "config.json")
    kind = str(raw.get("model_type"))
    match kind:
        case "clip":
            return _clip(source, raw)
        case "siglip":
            return _siglip(source, raw)
        case "clap":
            return _clap(source, raw)
        case _:
            architectures = raw.get("architectures")
            named = kind
            if isinstance(architectures, list) and architectures:
                named = cast("list[object]", architectures)[0]
            extra = ""
            if kind in SENTENCE_FAMILIES:
                extra = "; it has no modules.json, which says how sentence-transformers pools"
            message = f"config.json: {str(named)[:100]} cannot be imported{extra}. What can: {SUPPORTED}"
            raise Permanent(message, code="unknown_architecture")


def _config(source: Source, name: str) -> dict[str, Any]:
    raw = source.document(name)
    if len(source.read(name)) > MAX_CONFIG_BYTES:
        raise Permanent(f"{name} has more than {MAX_CONFIG_BYTES >> 10} KiB", code="too_large")
    check_config(raw)
    if "quantization_config" in raw:
        raise Permanent(f"{name}: quantised weights cannot be imported", code="bad_config")
    return raw


def _clip(source: Source, raw: dict[str, Any]) -> Found:
    size = integer(raw, "projection_dim", 512)
    vision = settings_of(raw, "CLIPConfig", "vision_config", projection_dim=size)
    text = settings_of(raw, "CLIPConfig", "text_config", projection_dim=size)
    image_tokens, first_step = image_part(source, vision, squashes=False)
    most = longest(tokeniser_settings(source), integer(text, "max_position_embeddings"))
    text_tokens, tokeniser = text_part(source, "", text, most)
    return Found(
        architecture="CLIP",
        parts={
            "image": Part(tower_of("clip", image_tokens, vision, size), first_step=first_step),
            "text": Part(tower_of("clip", text_tokens, text, size), tokeniser),
        },
        dimensions=size,
        loss=InfoNCE(max_scale=MAX_SCALE),
        log_scale="logit_scale",
    )


def _siglip(source: Source, raw: dict[str, Any]) -> Found:
    vision = settings_of(raw, "SiglipConfig", "vision_config")
    text = settings_of(raw, "SiglipConfig", "text_config")
    size = integer(vision, "hidden_size")
    if text.get("projection_size") not in {None, size}:
        raise Permanent(f"config.json: text_config.projection_size is not {size}, as pictures have", code="bad_config")
    if not vision.get("vision_use_head", True):
        raise Permanent("config.json: vision_config has no head to pool with", code="bad_config")
    image_tokens, first_step = image_part(source, vision, squashes=True)
    settings = tokeniser_settings(source)
    name = str(settings.get("tokenizer_class", "SiglipTokenizer")).removesuffix("Fast")
    is_first = name == "SiglipTokenizer"
    side = settings.get("padding_side", "left" if name == "Siglip2Tokenizer" else "right")
    text_tokens, tokeniser = text_part(
        source,
        "",
        text,
        integer(text, "max_position_embeddings"),
        lowercase=name == "Siglip2Tokenizer" or (is_first and bool(settings.get("do_lower_case", True))),
        canonical=is_first,
        pad=side,
        pad_token=_pad_token(settings, "</s>" if is_first else "<pad>"),
    )
    return Found(
        architecture="SigLIP",
        parts={
            "image": Part(tower_of("siglip", image_tokens, vision, size), first_step=first_step),
            "text": Part(tower_of("siglip", text_tokens, text, size), tokeniser),
        },
        dimensions=size,
        loss=Sigmoid(max_scale=MAX_SCALE),
        log_scale="logit_scale",
        bias="logit_bias",
    )


def _clap(source: Source, raw: dict[str, Any]) -> Found:
    size = integer(raw, "projection_dim", 512)
    audio = settings_of(raw, "ClapConfig", "audio_config", projection_dim=size)
    text = settings_of(raw, "ClapConfig", "text_config", projection_dim=size)
    given = member_of_processor(source, "feature_extractor")
    file = "the feature extractor's configuration"
    truncation = given.get("truncation", "fusion")
    is_fused = truncation == "fusion"
    if truncation not in {"fusion", "rand_trunc"} or is_fused != bool(audio.get("enable_fusion")):
        message = f"{file}: truncation is {str(truncation)[:50]!r}, and the model's enable_fusion is not of that kind"
        raise Permanent(message, code="bad_config")

    def make() -> AudioTokens:
        rate = given.get("sampling_rate", 48_000)
        fft, hop = given.get("fft_window_size", 1024), given.get("hop_length", 480)
        processing = AudioProcessing(
            fft=fft,
            hop=hop,
            min_hz=given.get("frequency_min", 0),
            max_hz=given.get("frequency_max", 14_000),
            scale="htk" if is_fused else "slaney",
            fill=given.get("padding", "repeatpad"),
            fused=is_fused,
        )
        return AudioTokens(
            sample_rate=rate,
            window_s=given.get("max_length_s", 10),
            mels=given.get("feature_size", 64),
            frame_ms=1000 * fft / rate,
            hop_ms=1000 * hop / rate,
            frames=1,
            processing=processing,
        )

    try:
        audio_tokens = validated(make, file)
    except (TypeError, ZeroDivisionError) as error:
        raise Permanent(f"{file}: its sizes are no numbers", code="bad_config") from error
    if audio_tokens.mels != integer(audio, "num_mel_bins", 64) or (is_fused and audio_tokens.mels != 64):
        message = f"{file} makes {audio_tokens.mels} mel bands, config.json wants {audio.get('num_mel_bins')}"
        raise Permanent(message, code="bad_config")
    text_tokens, tokeniser = text_part(source, "", text, _positions(source, "", text))
    return Found(
        architecture="CLAP",
        parts={
            "audio": Part(tower_of("clap", audio_tokens, audio, size)),
            "text": Part(tower_of("clap", text_tokens, text, size), tokeniser),
        },
        dimensions=size,
        loss=InfoNCE(max_scale=MAX_SCALE),
        # Of its two scales the one that contrasts sounds with texts; the other belongs to a head that inference lacks.
        log_scale="logit_scale_a",
    )


def _sentences(source: Source) -> Found:
    modules = source.json("modules.json")
    if not isinstance(modules, list) or not modules or not all(isinstance(each, dict) for each in modules):  # pyright: ignore[reportUnknownVariableType]
        raise Permanent("modules.json is no list of modules", code="bad_file")
    listed = cast("list[dict[str, Any]]", modules)
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in listed]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        message = f"modules.json: {', '.join(kinds)[:200]} cannot be imported; Transformer, Pooling and Normalize can"
        raise Permanent(message, code="unknown_architecture")
    places = ["" if not each.get("path") else f"{checked_name(each['path'], 'modules.json')}/" for each in listed]
    prefix = places[0]
    raw = _config(source, f"{prefix}config.json")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in SENTENCE_FAMILIES:
        message = f"{prefix}config.json: {str(family)[:100]} cannot be imported. What can: {SUPPORTED}"
        raise Permanent(message, code="unknown_architecture")
    name = SENTENCE_FAMILIES[family]
    config = settings_of(raw, f"{name}Config", None)
    size = integer(config, "dim" if family == "distilbert" else "hidden_size")
    own = f"{prefix}sentence_bert_config.json"
    wanted = source.document(own) if source.has(own) else {}
    limit = wanted.get("max_seq_length")
    text_tokens, tokeniser = text_part(
        source,
        prefix,
        config,
        _positions(source, prefix, config, limit if isinstance(limit, int) and limit > 0 else None),
        lowercase=bool(wanted.get("do_lower_case", False)),
    )
    is_unit = "Normalize" in kinds
    about = "config_sentence_transformers.json"
    said = source.document(about) if source.has(about) else {}
    if (prompt := said.get("default_prompt_name")) is not None:
        message = f"{about}: default_prompt_name is {str(prompt)[:100]!r}; texts with prompts cannot be imported"
        raise Permanent(message, code="bad_config")
    similarity = said.get("similarity_fn_name")
    tower = tower_of(
        cast("Family", family),
        text_tokens,
        config,
        size,
        pooling=_pooling(source, f"{places[1]}config.json"),
        unit=is_unit,
    )
    return Found(
        architecture=f"sentence-transformers {name}",
        parts={"text": Part(tower, tokeniser)},
        dimensions=size,
        prefix=prefix,
        critic="dot" if similarity == "dot" and not is_unit else "cosine",
    )


def _pooling(source: Source, name: str) -> str:
    given = source.document(name)
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
    found = [mode for mode, is_on in given.items() if mode.startswith("pooling_mode_") and is_on]
    if isinstance(given.get("pooling_mode"), str):
        return _known_mode(given["pooling_mode"], name)
    if len(found) != 1 or found[0] not in modes:
        message = f"{name}: pooling by {', '.join(found)[:200] or 'nothing'} cannot be imported"
        raise Permanent(message, code="bad_config")
    return modes[found[0]]


def _known_mode(mode: str, name: str) -> str:
    if mode not in {"mean", "cls", "max"}:
        raise Permanent(f"{name}: pooling by {mode[:100]} cannot be imported; mean, cls and max can", code="bad_config")
    return mode


def _positions(source: Source, prefix: str, config: dict[str, Any], limit: int | None = None) -> int:
    """Return the tokens that a text may have, by a limit if there is one and by the tokeniser's own otherwise.

    Families that follow RoBERTa count places from behind the padding id.
    """
    most = integer(config, "max_position_embeddings")
    if config.get("model_type") in {"roberta", "xlm-roberta", "mpnet", "clap_text_model"}:
        pad = config.get("pad_token_id")
        most -= (pad if isinstance(pad, int) else 1) + 1
    if limit is not None:
        return min(limit, most)
    return longest(tokeniser_settings(source, prefix), most)


def _pad_token(settings: dict[str, Any], default: str) -> str:
    token = settings.get("pad_token", default)
    return str(cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token)
