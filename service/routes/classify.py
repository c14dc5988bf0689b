"""Zero-shot classification: any modality against labels that nobody trained.

The logit of label c for item x and prompts m = 1..M of c, where f(x, z) = scale * critic(z_x, z) + bias. The critic is
the model's (cosine, inner product or -1/2 squared distance), the scale that of the pair of modalities, the bias that of
a pair trained with the sigmoid loss, else 0:

    score ensemble       log (1/M) sum_m exp f(x, z_m)                             (Oko et al. 2025; the default)
    embedding ensemble   f(x, z), z the mean of the z_m, of unit length for cosine (CLIP)

The score of c is the softmax over labels of logit + log prior. With `multi_label` each label is judged on its own:
- where all pairs were trained with the sigmoid loss and no prior is given, by that loss's own yes or no, the sigmoid of
  the logit (Zhai et al. 2023): the odds among as many negatives as a training batch held;
- else against the others, since other losses leave the logit's offset free: the sigmoid of its logit minus the log mean
  exp of all other labels' prompts, plus its prior's log odds if one is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from fastapi import APIRouter, Response
from jaxtyping import Float32, Float64

from service.catalogue import Model
from service.contract.errors import Invalid, NotFound, TooLarge, UnsupportedMedia
from service.contract.items import AnyItem, TextItem
from service.contract.operations import ClassifyRequest, ClassifyResponse
from service.contract.priors import as_log_prior
from service.contract.settings import Settings
from service.deps import Inferrer, Running, Service
from service.edge.problems import documented
from service.inference import critics
from service.inference.answers import check_matches, respond
from service.inference.hangups import InferenceRoute
from service.inference.inputs import Timings, encode, listed, places
from service.inference.label_cache import LabelCache

router = APIRouter(tags=["inference"], prefix="/v1", route_class=InferenceRoute)


@dataclass(frozen=True)
class Prompts:
    """The prompts of all labels end to end, `counts[c]` of them for label c."""

    labels: list[str]
    items: list[AnyItem]
    at: list[str]
    counts: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Place of each label's first prompt."""
        return np.cumsum(self.counts) - self.counts


@router.post(
    "/classify",
    operation_id="classify",
    summary="Classify items by labels that are given now",
    response_model=ClassifyResponse,
    responses=documented(NotFound, TooLarge, UnsupportedMedia),
)
async def create(service: Running, caller: Inferrer, body: ClassifyRequest) -> Response:
    """Classify items by comparing them with prompts of each label, at the trained scale of their pair."""
    model = await service.catalogue.find(caller.tenant, body.model)
    items = listed(service, body.input, "input")
    prompts = _prompts(body, service.settings)
    log_prior = _log_prior(body, prompts.labels)
    if body.multi_label and len(prompts.labels) < 2:
        raise Invalid("a label is judged against the others: give two at least", param="labels")
    top_k = min(body.top_k or len(prompts.labels), len(prompts.labels))
    check_matches(len(items), top_k)
    timings = Timings()
    at = places("input", items, body.input)
    found = await encode(service, model, items, at, timings, hint=body.modality, truncate=body.truncate)
    z_prompts, modalities, num_tokens = await _encode_prompts(service, model, prompts, timings, truncate=body.truncate)

    def entries() -> Iterator[dict[str, Any]]:
        f = _scaled(model, found.vectors, found.modalities, z_prompts, modalities)
        log_sums = np.logaddexp.reduceat(f, prompts.starts, axis=1)
        if body.ensemble == "score":
            logits = log_sums - np.log(prompts.counts)
        else:
            means, of = _mean_prompts(model, z_prompts, modalities, prompts)
            logits = _scaled(model, found.vectors, found.modalities, means, of)
        if body.multi_label and body.prior is None and _says_yes_or_no(model, found.modalities, modalities):
            scores = 1.0 / (1.0 + np.exp(np.clip(-logits, -700.0, 700.0)))
        elif body.multi_label:
            scores = _alone(logits, log_sums, prompts, log_prior if body.prior is not None else None)
        else:
            scores = _softmax(logits + log_prior)
        return _ranked(prompts.labels, scores, logits, top_k)

    num_read = found.num_tokens + num_tokens
    rest = {"model": body.model, "usage": {"prompt_tokens": num_read, "total_tokens": num_read}}
    return await respond(service, entries, rest, timings, num_values=len(items) * (len(prompts.items) + 3 * top_k))


def _ranked(
    labels: list[str],
    scores: Float64[np.ndarray, "item label"],
    logits: Float64[np.ndarray, "item label"],
    top_k: int,
) -> Iterator[dict[str, Any]]:
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    for index, order in enumerate(best.tolist()):
        yield {
            "object": "classification",
            "index": index,
            "prediction": labels[order[0]],
            "score": float(scores[index, order[0]]),
            "predictions": [
                {
                    "label": labels[label],
                    "score": float(scores[index, label]),
                    "logit": float(logits[index, label]),
                }
                for label in order
            ],
        }


def _prompts(body: ClassifyRequest, settings: Settings) -> Prompts:
    """Write out the prompts of every label.

    Raises Invalid for too many, TooLarge for more text than a request could carry if it held them written out.
    """
    if isinstance(body.labels, dict):
        if body.templates is not None:
            raise Invalid("templates go with a list of labels; these labels have their prompts", param="templates")
        by_label = body.labels
        names = list(by_label)
        _check_number(sum(map(len, by_label.values())), settings)
    else:
        names = list(body.labels)
        if len(set(names)) != len(names):
            raise Invalid("a label is given twice", param="labels")
        templates = body.templates or ["{}"]
        _check_number(len(names) * len(templates), settings)
        for index, template in enumerate(templates):
            if "{}" not in template:
                raise Invalid("a template holds {}, which takes the label", param=f"templates[{index}]")
        # A template that takes a long label a thousand times is short to send and gigabytes to write out.
        gaps = sum(template.count("{}") for template in templates)
        plain = sum(map(len, templates)) - 2 * gaps
        num_characters = len(names) * plain + gaps * sum(map(len, names))
        if num_characters > settings.max_body_bytes:
            raise TooLarge(
                f"prompts of {num_characters} characters, at most {settings.max_body_bytes}", param="templates"
            )
        by_label = {
            name: [cast("AnyItem", TextItem(text=template.replace("{}", name))) for template in templates]
            for name in names
        }
    at = [f"labels.{name[:64]}[{index}]" for name in names for index in range(len(by_label[name]))]
    counts = np.array([len(by_label[name]) for name in names])
    return Prompts(names, [item for name in names for item in by_label[name]], at, counts)


def _check_number(num_prompts: int, settings: Settings) -> None:
    if num_prompts > settings.max_items:
        raise Invalid(f"{num_prompts} prompts, at most {settings.max_items} in a request", param="labels")


def _log_prior(body: ClassifyRequest, labels: list[str]) -> Float64[np.ndarray, " label"]:
    if body.prior is None:
        return np.full(len(labels), -np.log(len(labels)))
    if set(body.prior) - set(labels):
        raise Invalid("a prior is given for what is not among the labels", param="prior")
    return as_log_prior([body.prior.get(label, 0.0) for label in labels])


async def _encode_prompts(
    service: Service, model: Model, prompts: Prompts, timings: Timings, *, truncate: bool
) -> tuple[Float32[np.ndarray, "prompt dim"], list[str], int]:
    """Return vectors and modalities of the prompts, and the tokens read for those that were not known yet."""
    keys = [LabelCache.key(model.ref.digest, item, truncate=truncate) for item in prompts.items]
    known = [service.labels.get(key) for key in keys]
    missing = [index for index, entry in enumerate(known) if entry is None]
    num_tokens = 0
    if missing:
        items, at = [prompts.items[index] for index in missing], [prompts.at[index] for index in missing]
        found = await encode(service, model, items, at, timings, truncate=truncate)
        num_tokens = found.num_tokens
        for index, vector, modality in zip(missing, found.vectors, found.modalities, strict=True):
            known[index] = (modality, vector)
            service.labels.put(keys[index], modality, vector)
    entries = [entry for entry in known if entry is not None]
    return np.stack([vector for _, vector in entries]), [modality for modality, _ in entries], num_tokens


def _scaled(
    model: Model,
    z_items: Float32[np.ndarray, "item dim"],
    item_modalities: list[str],
    z_prompts: Float32[np.ndarray, "prompt dim"],
    prompt_modalities: list[str],
) -> Float64[np.ndarray, "item prompt"]:
    """Return scale * score + bias, the scale and the bias those of each pair of modalities.

    Raises Invalid for a pair that was never trained.
    """
    f = critics.scores(model.critic, z_items, z_prompts)
    rows, columns = np.array(item_modalities), np.array(prompt_modalities)
    for first in dict.fromkeys(item_modalities):
        for second in dict.fromkeys(prompt_modalities):
            block = np.ix_(rows == first, columns == second)
            f[block] *= model.scale(first, second, param="labels")
            f[block] += model.bias(first, second) or 0.0
    return f


def _says_yes_or_no(model: Model, item_modalities: list[str], prompt_modalities: list[str]) -> bool:
    return all(
        model.bias(first, second) is not None for first in set(item_modalities) for second in set(prompt_modalities)
    )


def _mean_prompts(
    model: Model, z_prompts: Float32[np.ndarray, "prompt dim"], modalities: list[str], prompts: Prompts
) -> tuple[Float32[np.ndarray, "label dim"], list[str]]:
    means: list[np.ndarray] = []
    of: list[str] = []
    for name, start, count in zip(prompts.labels, prompts.starts, prompts.counts, strict=True):
        kinds = set(modalities[start : start + count])
        if len(kinds) > 1:
            raise Invalid(
                "prompts of several modalities have no mean: use the score ensemble", param=f"labels.{name[:64]}"
            )
        means.append(z_prompts[start : start + count].mean(axis=0))
        of += kinds
    return critics.prepare(model.critic, np.stack(means)), of


def _alone(
    logits: Float64[np.ndarray, "item label"],
    log_sums: Float64[np.ndarray, "item label"],
    prompts: Prompts,
    log_prior: Float64[np.ndarray, " label"] | None,
) -> Float64[np.ndarray, "item label"]:
    # All other labels are those before and those after: taking one away from the whole sum would cancel digits.
    nothing = np.full((len(log_sums), 1), -np.inf)
    before = np.hstack([nothing, np.logaddexp.accumulate(log_sums, axis=1)[:, :-1]])
    after = np.hstack([np.logaddexp.accumulate(log_sums[:, ::-1], axis=1)[:, -2::-1], nothing])
    odds = logits - np.logaddexp(before, after) + np.log(prompts.counts.sum() - prompts.counts)
    if log_prior is not None:
        odds = odds + log_prior - np.log1p(-np.exp(np.minimum(log_prior, -1e-12)))
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-odds))


def _softmax(values: Float64[np.ndarray, "item label"]) -> Float64[np.ndarray, "item label"]:
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
