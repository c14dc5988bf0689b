"""Measure a model on data: retrieval for every pair of modalities, trained or not, and zero-shot classification."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from service.contract.errors import Permanent
from service.contract.jobs import EvaluateArgs, EvaluateResult
from worker.jobs.evaluate_retrieval import across, within
from worker.jobs.evaluate_zero_shot import zero_shot
from worker.jobs.report import EvaluatedDataset, Report
from worker.learning.data import Dataset, Encoder, Evaluated, TokenSource, draw, open_dataset
from worker.learning.device import choose_device
from worker.learning.model import Loaded, load_model

if TYPE_CHECKING:
    import torch

    from worker.runner import Context

KS: Final = (1, 5, 10)


def run(args: EvaluateArgs, ctx: Context) -> EvaluateResult:
    """Evaluate and publish the report.

    Raises Permanent if the model learned from these samples and that was not allowed, or there is nothing to measure.
    """
    device = choose_device(ctx.device)
    given = ctx.inputs[args.model]
    loaded = load_model(ctx.store.local(given["artifact"]), device)
    datasets = [open_dataset(name, ctx) for name in dict.fromkeys(args.datasets)]
    learned_from = {entry["digest"] for entry in loaded.body.get("data", {}).values()}
    for dataset in datasets:
        _refuse_training_data(args, dataset, learned_from)
    evaluated = _embed(args, ctx, loaded, datasets, device)
    ks = args.ks or list(KS)
    report = Report(
        model=args.model,
        model_digest=given["digest"],
        split=args.split,
        seed=args.seed,
        datasets={
            one.dataset.name: EvaluatedDataset(
                digest=one.dataset.digest,
                num_samples=len(one.indices),
                learned_from=one.dataset.digest in learned_from,
            )
            for one in evaluated
        },
        retrieval=[*within(loaded, evaluated, ks, ctx.check), *across(loaded, evaluated, ks, ctx.check)],
        zero_shot=list(zero_shot(args, loaded, evaluated, Encoder(loaded.model, device, lambda _: ctx.check()))),
    )
    folder = ctx.scratch / "report"
    folder.mkdir()
    (folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    key = f"reports/{ctx.job}/{ctx.epoch}"
    summary = report.summary()
    ctx.store.publish(folder, key, kind="report", id=ctx.job, body={"summary": summary, "model": args.model})
    return EvaluateResult(artifact=key, summary=summary)


def _refuse_training_data(args: EvaluateArgs, dataset: Dataset, learned_from: set[str]) -> None:
    if dataset.digest in learned_from and args.split != "holdout" and not args.allow_training_data:
        raise Permanent(
            f"the model learned from data set {dataset.name}: evaluate split 'holdout', or say allow_training_data",
            code="training_data",
        )
    if not len(dataset.samples.indices(args.split)):
        raise Permanent(f"data set {dataset.name} has no samples in split {args.split!r}", code="empty_split")


def _embed(
    args: EvaluateArgs, ctx: Context, loaded: Loaded, datasets: list[Dataset], device: torch.device
) -> list[Evaluated]:
    """Embed the drawn samples of every data set in every modality that the model knows."""
    chosen = {dataset.name: draw(dataset.samples, args.split, args.max_samples, args.seed) for dataset in datasets}
    known = {dataset.name: sorted(set(dataset.samples.modalities) & set(loaded.recipe.towers)) for dataset in datasets}
    total = sum(len(chosen[dataset.name]) * len(known[dataset.name]) for dataset in datasets)
    if total == 0:
        raise Permanent("the model knows no modality of these data sets")
    done, started = 0, time.monotonic()

    def after_batch(num_items: int) -> None:
        nonlocal done
        done += num_items
        ctx.check()
        ctx.progress(done, total, (total - done) * (time.monotonic() - started) / done)

    encoder = Encoder(loaded.model, device, after_batch)
    evaluated: list[Evaluated] = []
    for dataset in datasets:
        indices = chosen[dataset.name]
        vectors = {
            modality: encoder(TokenSource(dataset, modality, loaded.tokenisers[modality]), indices)
            for modality in known[dataset.name]
        }
        labels = [dataset.samples.label(index) for index in indices.tolist()]
        evaluated.append(Evaluated(dataset, indices, labels, vectors))
    return evaluated
