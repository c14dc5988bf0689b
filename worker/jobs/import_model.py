"""Import a checkpoint that was trained elsewhere into a model of our own, which needs the checkpoint no more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from service.contract.blueprint import Imported, ImportedPair
from service.contract.errors import IsthmusError, Permanent
from service.contract.jobs import ImportModelArgs, ImportModelResult
from service.contract.modality import AudioTokens, ImageTokens
from service.contract.tokens.text import FILE as TOKENISER_FILE
from worker.importing.families import MAX_SCALE, read_checkpoint
from worker.importing.reading import validated
from worker.importing.source import open_source
from worker.importing.weights import fetch_weights, load_inner
from worker.learning.device import failure_of
from worker.learning.model import MultiTower, build_tokenisers, save_model, vocab_sizes
from worker.learning.ragged import Ragged
from worker.learning.towers.pretrained import FAULTS, Pretrained, library

if TYPE_CHECKING:
    from service.contract.tokens.tokenise import Tokeniser
    from worker.importing.reading import Found
    from worker.importing.weights import Weights
    from worker.runner import Context

MAX_BIAS = 1000.0


def run(args: ImportModelArgs, ctx: Context) -> ImportModelResult:
    """Read the checkpoint, check it, publish the model.

    Raises Permanent, naming the file, for what is missing, damaged or of no family that we know; Transient if it cannot
    be reached now.
    """
    source = open_source(args.source, ctx)
    found = read_checkpoint(source)
    names = {medium: (args.modalities or {}).get(medium, medium) for medium in found.parts}
    if unknown := sorted(set(args.modalities or {}) - set(names)):
        raise Permanent(f"modalities: the checkpoint reads no {unknown[0]}; it reads {', '.join(sorted(names))}")
    parts = {names[medium]: part for medium, part in found.parts.items()}
    ctx.check()
    weights = fetch_weights(source, found.prefix, ctx.scratch / "weights")
    pairs = [ImportedPair(modalities=_two(list(parts)), loss=found.loss)] if len(parts) == 2 else []
    blueprint: Imported = validated(
        lambda: Imported(
            source=args.source,
            architecture=found.architecture,
            towers={name: part.tower for name, part in parts.items()},
            pairs=pairs,
            dimensions=found.dimensions,
            critic=found.critic,
            precision=args.precision,
        ),
        "config.json",
    )
    files = {name: {TOKENISER_FILE: part.tokeniser} for name, part in parts.items() if part.tokeniser is not None}
    tokenisers = build_tokenisers(blueprint, files)
    with torch.device("meta"):
        model = MultiTower(blueprint, vocab_sizes(blueprint, tokenisers))
    for name, part in parts.items():
        ctx.check()
        tower = model.towers[name]
        assert isinstance(tower, Pretrained)
        tower.inner = load_inner(part.tower, weights)
        if part.first_step is not None:
            tower.mean, tower.deviation = (torch.tensor(values) for values in part.first_step)
    _set_scale(model, found, weights)
    model.eval().requires_grad_(requires_grad=False)
    for name in parts:
        _try(model, name, tokenisers[name])
    model_id = "model_" + ctx.job.partition("_")[2]
    folder = ctx.scratch / "model"
    body = save_model(
        model,
        folder,
        recipe=blueprint,
        tokeniser_files=files,
        banks={},
        extra={
            "step": 0,
            "metrics": {},
            "data": {},
            "init_from": {},
            "imported": {"source": args.source, "architecture": found.architecture},
            "transformers": library().__version__,
        },
    )
    key = f"models/{model_id}/{ctx.epoch}"
    manifest = ctx.store.publish(folder, key, kind="model", id=model_id, body=body)
    return ImportModelResult(
        artifact=key,
        architecture=found.architecture,
        modalities=sorted(parts),
        dimensions=found.dimensions,
        logit_scales=body["logit_scales"],
        logit_biases=body["logit_biases"],
        critic=found.critic,
        metrics={},
        digest=manifest.digest,
        num_bytes=manifest.num_bytes,
    )


def _two(names: list[str]) -> tuple[str, str]:
    return names[0], names[1]


def _set_scale(model: MultiTower, found: Found, weights: Weights) -> None:
    """Give the pair the checkpoint's own scale and bias.

    Raises Permanent if they are none that composition could use.
    """
    for name in model.log_scales:
        assert found.log_scale is not None
        log_scale = weights.number(found.log_scale)
        if log_scale > math.log(MAX_SCALE):
            raise Permanent(f"{found.log_scale} is {log_scale:g}: a scale above {MAX_SCALE:g}", code="bad_weights")
        model.log_scales[name] = torch.nn.Parameter(torch.tensor(log_scale))
        if found.bias is not None:
            bias = weights.number(found.bias)
            if abs(bias) > MAX_BIAS:
                raise Permanent(f"{found.bias} is {bias:g}: beyond {MAX_BIAS:g}", code="bad_weights")
            model.biases[name] = torch.nn.Parameter(torch.tensor(bias))


@torch.inference_mode()
def _try(model: MultiTower, modality: str, tokeniser: Tokeniser) -> None:
    """Encode something once: sizes that do not fit each other show here and not in somebody's request.

    Of text also something shorter beside it, which is padded.
    """
    tokens = tokeniser.config
    lengths = [tokens.max_length]
    match tokens:
        case ImageTokens(dim=dim):
            values = torch.zeros(tokens.max_length, dim, dtype=torch.uint8)
        case AudioTokens(dim=dim):
            values = torch.zeros(tokens.max_length, dim)
        case _:
            lengths.append(tokens.max_length - 1)
            values = torch.zeros(sum(lengths), dtype=torch.long)
    try:
        z = model.encode(modality, Ragged(values, torch.tensor(lengths)))
    except IsthmusError:
        raise
    except FAULTS as error:
        if failure := failure_of(error):
            raise failure from error
        message = f"config.json: the {modality} tower does not run: {' '.join(str(error).split())[:300]}"
        raise Permanent(message, code="bad_config") from error
    if z.shape != (len(lengths), model.dimensions):
        message = f"config.json: the {modality} tower gives {z.shape[-1]} values and not {model.dimensions}"
        raise Permanent(message, code="wrong_shapes")
    if not z.isfinite().all():
        raise Permanent(f"the {modality} tower gives NaN or infinity", code="not_finite")
