"""The zero-shot parts of an evaluation: classify by prompts, and say how far that can be trusted.

The logit of a label is log prior + log mean exp of its prompts' scores. With prompts drawn from p(prompt | label) this
estimates p(label | sample), with an excess that falls as 1 / prompts (Oko et al. 2025, figure 5).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, final

import numpy as np
import torch

from service.contract.errors import IsthmusError, Permanent
from service.contract.tokens.tokenise import TextRaw
from worker.evaluation import calibration, certificate, ensembles, estimates
from worker.jobs.report import Calibrated, Certified, PromptCurve, ZeroShot
from worker.learning import retrieval
from worker.learning.ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Float64, Int64
    from torch import Tensor

    from service.contract.jobs import Part
    from worker.jobs.evaluate_scope import Scope
    from worker.learning.data import Dataset, Evaluated

PROMPTS_PER_LABEL: Final = 250
SCORES_AT_ONCE: Final = 1 << 22
KEPT_LOGITS: Final = 1 << 23  # of all samples together, to calibrate with
CURVE_SCORES: Final = 1 << 27  # of all draws together
NUM_DRAWS: Final = 10
PARTS: Final[tuple[Part, ...]] = ("zero_shot", "prompt_curve", "certificate", "calibration")


@final
@dataclass(frozen=True)
class Prompts:
    """The embedded prompts of two labels or more, label after label; `owners` names the label of each."""

    modality: str
    origin: Literal["given", "training"]
    labels: list[str]
    vectors: Float[Tensor, "prompt dim"]
    owners: Int64[Tensor, " prompt"]
    log_prior: Float64[Tensor, " label"]


@final
@dataclass(frozen=True)
class Task:
    """One modality of a data set to classify: its labelled samples."""

    one: Evaluated
    modality: str
    prompts: Prompts
    z: Float[Tensor, "item dim"]
    truth: Int64[Tensor, " item"]
    scale: float


@final
@dataclass(frozen=True)
class Outcome:
    """What classification made of every sample."""

    cost: Float64[Tensor, " item"]
    hits: dict[int, Float64[Tensor, " item"]]
    kept: Int64[Tensor, " kept"]
    log_posterior: Float64[Tensor, "kept label"]


@final
@dataclass(frozen=True)
class Measured:
    """What the zero-shot parts found."""

    zero_shot: list[ZeroShot]
    prompt_curve: list[PromptCurve]
    certificate: list[Certified]
    calibration: list[Calibrated]


def measure(scope: Scope) -> Measured:
    """Classify every labelled modality: by text that was trained with it, else by whatever was trained with it.

    Raises Permanent for a given prompt that the model cannot read.
    """
    found = Measured([], [], [], [])
    for task in _tasks(scope):
        of = {"dataset": task.one.dataset.name, "modality": task.modality, "prompts_modality": task.prompts.modality}
        if any(scope.wants(part) for part in ("zero_shot", "certificate", "calibration")):
            outcome = _classify(scope, task)
            if scope.wants("zero_shot"):
                found.zero_shot.append(_zero_shot(scope, task, outcome))
            if scope.wants("certificate"):
                misses = {k: 1 - hit for k, hit in outcome.hits.items() if k < len(task.prompts.labels)}
                certificates = certificate.certify(outcome.cost, misses)
                found.certificate.append(
                    Certified.model_validate({**of, "num_samples": len(task.truth), "certificates": certificates})
                )
            if scope.wants("calibration"):
                _calibrate(scope, task, outcome, of, found.calibration)
        if scope.wants("prompt_curve"):
            curve = _curve(scope, task)
            if isinstance(curve, str):
                scope.leave_out("prompt_curve", task.one.dataset.name, task.modality, curve)
            else:
                found.prompt_curve.append(curve)
    return found


def log_posterior(
    f: Float[Tensor, "item prompt"], owners: Int64[Tensor, " prompt"], log_prior: Float64[Tensor, " label"]
) -> Float64[Tensor, "item label"]:
    """Return log p(label | item) from the scaled scores of all prompts."""
    return (ensembles.log_evidence(f, owners, len(log_prior)) + log_prior).log_softmax(1)


def _tasks(scope: Scope) -> Iterator[Task]:
    cache: dict[tuple[str, str], Prompts | str] = {}
    for one in scope.evaluated:
        for modality in one.vectors:
            scope.ctx.check()
            task = _task(scope, one, modality, cache)
            if isinstance(task, str):
                for part in PARTS:
                    scope.leave_out(part, one.dataset.name, modality, task)
            else:
                yield task


def _task(scope: Scope, one: Evaluated, modality: str, cache: dict[tuple[str, str], Prompts | str]) -> Task | str:
    if not any(one.labels):
        return "no sample has a label"
    prompts = _prompts_for(scope, one.dataset, modality, cache)
    if isinstance(prompts, str):
        return prompts
    number = {label: at for at, label in enumerate(prompts.labels)}
    kept = [at for at, label in enumerate(one.labels) if label in number]
    if not kept:
        return "no sample has a label with a prompt"
    truth = torch.tensor([number[one.labels[at]] for at in kept])
    scale = float(scope.loaded.model.scale(modality, prompts.modality))
    return Task(one, modality, prompts, one.vectors[modality][kept], truth, scale)


def _classify(scope: Scope, task: Task) -> Outcome:
    """Classify all samples, a block at a time; keep the logits of as many, drawn at random, as there is room for."""
    num_items, num_labels = len(task.truth), len(task.prompts.labels)
    kept = scope.shuffled(num_items, max(1, KEPT_LOGITS // num_labels)).sort().values
    is_kept = torch.zeros(num_items, dtype=torch.bool)
    is_kept[kept] = True
    # Made at once: small pieces that stay, between large ones that go, would tear the memory into holes.
    rows = torch.empty(len(kept), num_labels, dtype=torch.float64)
    cost = torch.empty(num_items, dtype=torch.float64)
    hits = {k: torch.empty(num_items, dtype=torch.float64) for k in {1, *scope.ks}}
    num_kept = 0
    at_once = max(1, SCORES_AT_ONCE // max(len(task.prompts.vectors), num_labels))
    for start in range(0, num_items, at_once):
        scope.ctx.check()
        block = slice(start, start + at_once)
        f = task.scale * scope.scores(task.z[block], task.prompts.vectors)
        found = log_posterior(f, task.prompts.owners, task.prompts.log_prior)
        truth = task.truth[block]
        cost[block] = certificate.log_sum_exp(found, truth)
        relevant = torch.arange(num_labels) == truth[:, None]
        for k, each in hits.items():
            each[block] = retrieval.hits_at_k(found, relevant, k)[0]
        chosen = found[is_kept[block]]
        rows[num_kept : num_kept + len(chosen)] = chosen
        num_kept += len(chosen)
    return Outcome(cost, hits, kept, rows)


def _zero_shot(scope: Scope, task: Task, outcome: Outcome) -> ZeroShot:
    accuracy, cross_entropy = estimates.mean(outcome.hits[1]), estimates.mean(outcome.cost)
    num_labels = len(task.prompts.labels)
    return ZeroShot(
        modality=task.modality,
        dataset=task.one.dataset.name,
        prompts_modality=task.prompts.modality,
        prompts=task.prompts.origin,
        prompts_overlap=task.prompts.origin == "training" and scope.args.split != "holdout",
        num_prompts=len(task.prompts.vectors),
        num_labels=num_labels,
        num_samples=len(task.truth),
        num_left_out=len(task.one.labels) - len(task.truth),
        accuracy=accuracy.value,
        accuracy_standard_error=accuracy.standard_error,
        chance=1 / num_labels,
        top={k: estimates.mean(outcome.hits[k]) for k in scope.ks},
        chance_top={k: min(1.0, k / num_labels) for k in scope.ks},
        cross_entropy=cross_entropy.value,
        cross_entropy_standard_error=cross_entropy.standard_error,
    )


def _calibrate(scope: Scope, task: Task, outcome: Outcome, of: dict[str, str], into: list[Calibrated]) -> None:
    if len(outcome.kept) < calibration.FEWEST:
        reason = f"{len(outcome.kept)} labelled samples, {calibration.FEWEST} are needed"
        scope.leave_out("calibration", task.one.dataset.name, task.modality, reason)
        return
    found = calibration.measure(
        outcome.log_posterior, task.truth[outcome.kept], scope.args.bins or calibration.NUM_BINS, scope.args.seed
    )
    into.append(Calibrated.model_validate({**of, "calibration": found}))


def _curve(scope: Scope, task: Task) -> PromptCurve | str:
    """Measure with 1, 2, 5, ... prompts per label, drawn several times; returns a reason if there are too few."""
    prompts, num_labels = task.prompts, len(task.prompts.labels)
    counts = torch.bincount(prompts.owners, minlength=num_labels)
    fewest = int(counts.min())
    nums = ensembles.steps_to(fewest)
    if len(nums) < 3:
        return f"label {prompts.labels[int(counts.argmin())]!r} has {fewest} prompts, three M need 3 or more"
    room = CURVE_SCORES // (NUM_DRAWS * num_labels * fewest)
    chosen = scope.shuffled(len(task.truth), max(64, room))
    orders = [ensembles.draw_order(prompts.owners, num_labels, scope.args.seed + draw) for draw in range(NUM_DRAWS)]
    figures = torch.zeros(2, NUM_DRAWS, len(nums), len(chosen), dtype=torch.float64)
    at_once = max(1, SCORES_AT_ONCE // len(prompts.vectors))
    for start in range(0, len(chosen), at_once):
        at = chosen[start : start + at_once]
        f = task.scale * scope.scores(task.z[at], prompts.vectors)
        truth = task.truth[at].repeat(len(nums))
        relevant = torch.arange(num_labels) == truth[:, None]
        for draw, order in enumerate(orders):
            scope.ctx.check()
            logits = (ensembles.by_num_prompts(f, order, nums) + prompts.log_prior).flatten(0, 1)  # (num * item, label)
            hit, _ = retrieval.hits_at_k(logits, relevant, 1)
            inside = slice(start, start + len(at))
            figures[0, draw, :, inside] = certificate.log_sum_exp(logits, truth).view(len(nums), -1)
            figures[1, draw, :, inside] = 1 - hit.view(len(nums), -1)
    by_item, by_draw = figures.mean(1), figures.mean(3)
    cross_entropies, errors = (ensembles.combine(by_item[at], by_draw[at]) for at in range(2))
    return PromptCurve(
        dataset=task.one.dataset.name,
        modality=task.modality,
        prompts_modality=prompts.modality,
        num_labels=num_labels,
        num_samples=len(chosen),
        num_draws=NUM_DRAWS,
        prior="uniform" if prompts.origin == "given" else "training",
        points=[
            ensembles.Point(num_prompts=num, cross_entropy=cross_entropy, error=error)
            for num, cross_entropy, error in zip(nums, cross_entropies, errors, strict=True)
        ],
        cross_entropy_fit=ensembles.fit(nums, by_item[0], by_draw[0]),
        error_fit=ensembles.fit(nums, by_item[1], by_draw[1]),
    )


def _prompts_for(
    scope: Scope, dataset: Dataset, modality: str, cache: dict[tuple[str, str], Prompts | str]
) -> Prompts | str:
    """Return the prompts for a modality, each kind embedded once; or why there are none."""
    loaded = scope.loaded
    partners = [name for name in sorted(loaded.recipe.towers) if loaded.model.is_trained(modality, name)]
    texts = [name for name in partners if loaded.recipe.towers[name].tokens.kind == "text"]
    if scope.args.prompts:
        if not texts:
            return "prompts are text, and no text was trained with it"
        key = ("", texts[0])
        if key not in cache:
            cache[key] = _given_prompts(scope, scope.args.prompts, texts[0])
        return cache[key]
    for through in (*texts, *partners):
        if through in dataset.samples.modalities:
            key = (dataset.name, through)
            if key not in cache:
                cache[key] = _training_prompts(scope, dataset, through)
            return cache[key]
    return "the data set has no modality that was trained with it, to draw prompts from"


def _training_prompts(scope: Scope, dataset: Dataset, modality: str) -> Prompts | str:
    """Embed what the training samples of each label say in one modality, as often as they say it."""
    samples = dataset.samples
    limit = scope.args.max_prompts or PROMPTS_PER_LABEL
    counts: Counter[str] = Counter()
    chosen: dict[str, list[int]] = {}
    for index in np.random.default_rng(scope.args.seed).permutation(samples.indices("train")).tolist():
        if label := samples.label(index):
            counts[label] += 1
            if counts[label] <= limit:
                chosen.setdefault(label, []).append(index)
    labels = sorted(chosen)
    if len(labels) < 2:
        return f"the training split has {len(labels)} labels to draw prompts of, two are needed"
    indices = np.array([index for label in labels for index in chosen[label]])
    return Prompts(
        modality=modality,
        origin="training",
        labels=labels,
        vectors=scope.encode(dataset, modality, indices),
        owners=_owners([len(chosen[label]) for label in labels]),
        log_prior=torch.tensor([counts[label] for label in labels]).double().log(),
    )


def _given_prompts(scope: Scope, prompts: dict[str, list[str]], modality: str) -> Prompts:
    tokeniser = scope.loaded.tokenisers[modality]
    vectors: list[Tensor] = []
    for label, texts in prompts.items():
        try:
            items = [tokeniser(TextRaw(text)) for text in texts]
        except IsthmusError as error:
            raise Permanent(f"prompts of {label!r}: {error.message}") from error
        vectors.append(scope.encoder.encode(modality, Ragged.from_sequences(items)))
    return Prompts(
        modality=modality,
        origin="given",
        labels=list(prompts),
        vectors=torch.cat(vectors),
        owners=_owners([len(texts) for texts in prompts.values()]),
        log_prior=torch.zeros(len(prompts), dtype=torch.float64),
    )


def _owners(counts: list[int]) -> Int64[Tensor, " prompt"]:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
