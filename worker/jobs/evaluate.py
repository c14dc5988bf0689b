"""Measure a model on data, part by part, and publish what was found: for programs as JSON, for people as one page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, assert_never, get_args

from service.contract.errors import Permanent
from service.contract.jobs import EvaluateArgs, EvaluateResult, Part
from worker.jobs import (
    evaluate_composition,
    evaluate_pairs,
    evaluate_probe,
    evaluate_retrieval,
    evaluate_zero_shot,
    report_page,
)
from worker.jobs.evaluate_scope import Progress, Scope
from worker.jobs.report import EvaluatedDataset, Report
from worker.learning.data import Dataset, Encoder, Evaluated, draw, open_dataset
from worker.learning.device import choose_device
from worker.learning.model import load_model

if TYPE_CHECKING:
    from worker.runner import Context

KS: Final = (1, 5, 10)


def run(args: EvaluateArgs, ctx: Context) -> EvaluateResult:
    """Evaluate and publish the report.

    Raises Permanent if the model learned from these samples and that was not allowed, if there is nothing to measure,
    or if the data have nothing for a part that was asked for by name.
    """
    device = choose_device(ctx.device)
    given = ctx.inputs[args.model]
    loaded = load_model(ctx.store.local(given["artifact"]), device)
    datasets = [open_dataset(name, ctx) for name in dict.fromkeys(args.datasets)]
    learned_from = {entry["digest"] for entry in loaded.body.get("data", {}).values()}
    for dataset in datasets:
        _refuse_training_data(args, dataset, learned_from)
    progress = Progress(ctx)
    encoder = Encoder(loaded.model, device, progress)
    scope = Scope(args, list(args.ks or KS), loaded, ctx, encoder, progress, evaluated=[])
    _embed(scope, datasets)
    report = Report.model_validate(
        {
            "model": args.model,
            "model_digest": given["digest"],
            "critic": loaded.recipe.critic,
            "split": args.split,
            "seed": args.seed,
            "parts": args.parts,
            "datasets": {
                one.dataset.name: EvaluatedDataset(
                    digest=one.dataset.digest,
                    num_samples=len(one.indices),
                    learned_from=one.dataset.digest in learned_from,
                )
                for one in scope.evaluated
            },
            "retrieval": [],
            "zero_shot": [],
            **_measure(scope),
            "left_out": scope.left_out,
        }
    )
    ctx.check()
    folder = ctx.scratch / "report"
    folder.mkdir()
    (folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    (folder / "report.html").write_text(report_page.render(report, ctx.scratch), encoding="utf-8")
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


def _embed(scope: Scope, datasets: list[Dataset]) -> None:
    """Embed the drawn samples of every data set in every modality that the model knows."""
    args, loaded = scope.args, scope.loaded
    chosen = {dataset.name: draw(dataset.samples, args.split, args.max_samples, args.seed) for dataset in datasets}
    known = {dataset.name: sorted(set(dataset.samples.modalities) & set(loaded.recipe.towers)) for dataset in datasets}
    if not any(known.values()):
        raise Permanent("the model knows no modality of these data sets")
    for dataset in datasets:
        indices = chosen[dataset.name]
        vectors = {modality: scope.encode(dataset, modality, indices) for modality in known[dataset.name]}
        labels = [dataset.samples.label(index) for index in indices.tolist()]
        scope.evaluated.append(Evaluated(dataset, indices, labels, vectors))


def _measure(scope: Scope) -> dict[str, Any]:
    """Measure the parts that are wanted, cheap ones first; return the lists of the report by their names.

    Raises Permanent as soon as a part that was asked for by name has nothing to say.
    """
    found: dict[str, Any] = {}
    wanted = [part for part in get_args(Part) if scope.wants(part)]
    for at, part in enumerate(wanted):
        scope.ctx.check()
        if part not in found:
            scope.ctx.event("evaluating", {"part": part, "number": at + 1, "of": len(wanted)})
            found |= _entries(scope, part)
        if scope.args.parts and not found[part]:
            reasons = dict.fromkeys(each.reason for each in scope.left_out if each.part == part)
            said = "; ".join(reasons) or "no data set holds two modalities that the model knows"
            raise Permanent(f"parts: {part} cannot be measured: {said}", code="nothing_to_measure")
    return found


def _entries(scope: Scope, part: Part) -> dict[str, Any]:
    match part:
        case "retrieval":
            return {"retrieval": [*evaluate_retrieval.within(scope), *evaluate_retrieval.across(scope)]}
        case "zero_shot" | "prompt_curve" | "certificate" | "calibration":
            return dict(vars(evaluate_zero_shot.measure(scope)))  # one pass over the prompts serves all four
        case "linear_probe":
            return {part: list(evaluate_probe.probes(scope))}
        case "geometry":
            return {part: list(evaluate_pairs.geometries(scope))}
        case "margins":
            return {part: list(evaluate_pairs.all_margins(scope))}
        case "completeness":
            return {part: list(evaluate_pairs.all_completeness(scope))}
        case "composition":
            return {part: list(evaluate_composition.measure(scope))}
        case _:
            assert_never(part)
