"""The report of an evaluation for people: `report.html`, one page with every number beside its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from worker.evaluation import plots
from worker.jobs import definitions, report_composition
from worker.pages import drawing, elements
from worker.pages.elements import Html

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from worker.evaluation.ensembles import Fit
    from worker.evaluation.estimates import Estimate
    from worker.jobs.report import OfPair, Report

MAX_PLOTS: Final = 12  # of one sort; a model of many modalities has hundreds of pairs

Section = tuple[str, Html]


def render(report: Report, folder: Path) -> str:
    """Return the page; matplotlib keeps its cache in `folder`."""
    drawing.prepare(folder)
    made: dict[str, tuple[str, Mapping[str, str], list[Html]]] = {
        "retrieval": ("Retrieval", definitions.RETRIEVAL, _retrieval(report)),
        "zero_shot": ("Zero-shot classification", definitions.ZERO_SHOT, _zero_shot(report)),
        "prompt_curve": ("Prompts per label", definitions.PROMPT_CURVE, _prompt_curve(report)),
        "certificate": ("Certificate of the zero-shot error", definitions.CERTIFICATE, _certificate(report)),
        "calibration": ("Calibration", definitions.CALIBRATION, _calibration(report)),
        "linear_probe": ("Linear probe", definitions.PROBE, _linear_probe(report)),
        "geometry": ("Geometry", definitions.GEOMETRY, _geometry(report)),
        "margins": ("Margins", definitions.MARGINS, _margins(report)),
        "completeness": ("Completeness", definitions.COMPLETENESS, _completeness(report)),
        "composition": (
            "Composition",
            definitions.COMPOSITION,
            report_composition.tables(report.composition, _estimate),
        ),
    }
    sections: dict[str, Section] = {
        name: (title, elements.section(name, title, *content, elements.definitions(meanings)))
        for name, (title, meanings, content) in made.items()
        if content
    }
    if report.left_out:
        title = "What was not measured"
        sections["left_out"] = (title, elements.section("left_out", title, _left_out(report)))
    title = "Errors and intervals"
    sections["errors"] = (title, elements.section("errors", title, elements.definitions(definitions.ERRORS)))
    return elements.page(f"Evaluation of {report.model}", _lead(report), sections)


def _lead(report: Report) -> Html:
    rows = [
        [name, each.digest[:16], str(each.num_samples), "its training split" if each.learned_from else "no"]
        for name, each in report.datasets.items()
    ]
    columns = {"data set": None, "digest": None, "samples evaluated": None, "the model learned from it": None}
    said = (
        f"Model digest {report.model_digest[:16]}, critic {report.critic}, split {report.split}, seed {report.seed}. "
        "After ± stands one standard error, in brackets a 95 % interval. Titles of columns lead to their definitions."
    )
    return elements.join(elements.paragraph(said), elements.table(columns, rows))


def _retrieval(report: Report) -> list[Html]:
    if not report.retrieval:
        return []
    ks = sorted(report.retrieval[0].recall)
    columns: dict[str, str | None] = {
        "from": None,
        "to": None,
        "trained": None,
        "method": "direct",
        "data set": None,
        "relevant": "relevant: partner",
        "queries": None,
        "targets": None,
    }
    for k in ks:
        columns |= {f"recall@{k}": "recall", f"precision@{k}": "precision", f"chance@{k}": "chance"}
    columns["effective samples"] = "effective_sample_size"
    columns["trusted"] = "trusted_fraction"
    rows: list[list[str]] = []
    for entry in report.retrieval:
        row = [
            entry.source,
            entry.target,
            "yes" if entry.trained else "no",
            entry.method if entry.through is None else f"marginal over {entry.through}",
            entry.dataset or "pooled",
            entry.relevant,
            str(entry.num_queries),
            str(entry.num_targets),
        ]
        for k in ks:
            recall_error, precision_error = (
                (errors or {}).get(k) for errors in (entry.recall_standard_error, entry.precision_standard_error)
            )
            row += [
                _with_error(entry.recall[k], recall_error),
                _with_error(entry.precision[k], precision_error),
                f"{_number(entry.chance_recall[k])} / {_number(entry.chance_precision[k])}",
            ]
        rows.append([*row, _or_nothing(entry.effective_sample_size), _or_nothing(entry.trusted_fraction)])
    return [elements.table(columns, rows)]


def _zero_shot(report: Report) -> list[Html]:
    if not report.zero_shot:
        return []
    ks = sorted(report.zero_shot[0].top or {})
    columns: dict[str, str | None] = {
        "modality": None,
        "data set": None,
        "prompts from": "prior",
        "prompts": "num_prompts",
        "labels": None,
        "samples": None,
        "left out": None,
        "accuracy": "accuracy",
    }
    columns |= {f"top-{k}": "top" for k in ks} | {"chance": "chance"} | {"cross-entropy": "cross_entropy"}
    rows = [
        [
            entry.modality,
            entry.dataset,
            f"{entry.prompts_modality} ({entry.prompts})" + (", overlapping" if entry.prompts_overlap else ""),
            str(entry.num_prompts),
            str(entry.num_labels),
            str(entry.num_samples),
            str(entry.num_left_out),
            _with_error(entry.accuracy, entry.accuracy_standard_error),
            *(_estimate((entry.top or {}).get(k)) for k in ks),
            _number(entry.chance),
            _with_error(entry.cross_entropy, entry.cross_entropy_standard_error),
        ]
        for entry in report.zero_shot
    ]
    return [elements.table(columns, rows)]


def _prompt_curve(report: Report) -> list[Html]:
    if not report.prompt_curve:
        return []
    columns = {
        "modality": None,
        "data set": None,
        "prompts from": None,
        "labels": None,
        "samples": None,
        "draws": "points",
        "log prior added": "prior",
        "cross-entropy: a": "cross_entropy_fit",
        "b": "b",
        "R²": "r_squared",
        "error: a": "error_fit",
        "b ": "b",
        "R² ": "r_squared",
    }
    rows = [
        [
            entry.modality,
            entry.dataset,
            entry.prompts_modality,
            str(entry.num_labels),
            str(entry.num_samples),
            str(entry.num_draws),
            "uniform: 0" if entry.prior == "uniform" else "of the training split",
            *_fit(entry.cross_entropy_fit),
            *_fit(entry.error_fit),
        ]
        for entry in report.prompt_curve
    ]
    images = [
        elements.plot(plots.prompt_curve(entry.points, fit, figure), f"{entry.modality} of {entry.dataset}")
        for entry in report.prompt_curve[:MAX_PLOTS]
        for figure, fit in (("cross_entropy", entry.cross_entropy_fit), ("error", entry.error_fit))
    ]
    return [elements.table(columns, rows), elements.plots(images, _rest(report.prompt_curve))]


def _certificate(report: Report) -> list[Html]:
    if not report.certificate:
        return []
    columns = {
        "modality": None,
        "data set": None,
        "samples": None,
        "r": "r",
        "measured top-r error": "error",
        "bound": "bound",
        "shown": "shown",
    }
    rows = [
        [
            entry.modality,
            entry.dataset,
            str(entry.num_samples),
            str(each.r),
            _estimate(each.error),
            _estimate(each.bound),
            _number(each.shown),
        ]
        for entry in report.certificate
        for each in entry.certificates
    ]
    images = [
        elements.plot(plots.certificates(entry.certificates), f"{entry.modality} of {entry.dataset}")
        for entry in report.certificate[:MAX_PLOTS]
    ]
    return [elements.table(columns, rows), elements.plots(images, _rest(report.certificate))]


def _calibration(report: Report) -> list[Html]:
    if not report.calibration:
        return []
    columns = {
        "modality": None,
        "data set": None,
        "samples": None,
        "calibration error": "expected_calibration_error",
        "cross-entropy": "cross_entropy",
        "temperature": "temperature",
        "other half": None,
        "calibration error before": "expected_calibration_error",
        "after": "expected_calibration_error",
        "cross-entropy before": "cross_entropy",
        "after ": "cross_entropy",
    }
    rows = [
        [
            entry.modality,
            entry.dataset,
            str(found.num_samples),
            _estimate(found.expected_calibration_error),
            _estimate(found.cross_entropy),
            _number(found.temperature) + (" (at the limit)" if found.temperature_at_limit else ""),
            str(found.num_measured),
            _estimate(found.expected_calibration_error_before),
            _estimate(found.expected_calibration_error_after),
            _estimate(found.cross_entropy_before),
            _estimate(found.cross_entropy_after),
        ]
        for entry in report.calibration
        for found in [entry.calibration]
    ]
    images = [
        elements.plot(
            plots.reliability(entry.calibration.reliability),
            f"{entry.modality} of {entry.dataset}: {len(entry.calibration.reliability)} bins",
        )
        for entry in report.calibration[:MAX_PLOTS]
    ]
    return [elements.table(columns, rows), elements.plots(images, _rest(report.calibration))]


def _linear_probe(report: Report) -> list[Html]:
    if not report.linear_probe:
        return []
    columns = {
        "modality": "linear_probe",
        "data set": None,
        "learned from": None,
        "labels": None,
        "samples": None,
        "left out": None,
        "accuracy": "accuracy",
        "chance": "chance of the probe",
        "cross-entropy": "cross_entropy",
        "C": "inverse_penalty",
        "converged": None,
    }
    rows = [
        [
            entry.modality,
            entry.dataset,
            str(found.num_train),
            str(found.num_labels),
            str(found.num_samples),
            str(found.num_left_out),
            _estimate(found.accuracy),
            _number(found.chance),
            _estimate(found.cross_entropy),
            _number(found.inverse_penalty),
            "yes" if found.converged else "no",
        ]
        for entry in report.linear_probe
        for found in [entry.probe]
    ]
    return [elements.table(columns, rows)]


def _geometry(report: Report) -> list[Html]:
    if not report.geometry:
        return []
    columns = {
        **_PAIR,
        "samples": None,
        "alignment": "alignment",
        "uniformity": "uniformity",
        "modality gap": "gap",
        "by chance": "gap_by_chance",
        "told apart": "separable",
    }
    rows = [
        [
            *_pair(entry),
            str(found.num_samples),
            _estimate(found.alignment),
            ", ".join(f"{modality} {_estimate(value)}" for modality, value in found.uniformity.items()),
            _estimate(found.gap),
            _number(found.gap_by_chance),
            _estimate(found.separable),
        ]
        for entry in report.geometry
        for found in [entry.geometry]
    ]
    return [elements.table(columns, rows)]


def _margins(report: Report) -> list[Html]:
    if not report.margins:
        return []
    columns = {
        "from": None,
        "to": None,
        "data set": None,
        "trained": None,
        "negatives by": "margins",
        "batches": "margins",
        "partners' score": "positive_score",
        "hardest margin": "hardest",
        "above 0": "positive_share",
        "5 %": "quantiles",
        "50 %": "quantiles",
        "95 %": "quantiles",
        "margin to the mean": "mean_negative",
        "scale": "scale",
        "temperature": "temperature",
    }
    rows = [
        [
            direction.source,
            direction.target,
            entry.dataset,
            "yes" if entry.trained else "no",
            found.classes,
            f"{found.num_batches} of {found.batch_size}",
            _estimate(found.positive_score),
            _estimate(direction.hardest),
            _estimate(direction.positive_share),
            *(_number(direction.quantiles[level]) for level in ("0.05", "0.50", "0.95")),
            _estimate(direction.mean_negative),
            _or_nothing(found.scale),
            _or_nothing(found.temperature),
        ]
        for entry in report.margins
        for found in [entry.margins]
        for direction in found.directions
    ]
    images: list[Html] = []
    for entry in report.margins[:MAX_PLOTS]:
        name = f"{entry.first} and {entry.second} of {entry.dataset}"
        images.append(elements.plot(plots.margins(entry.margins.directions), name))
        if entry.margins.temperature is not None:
            address = plots.by_temperature(entry.margins.by_temperature, entry.margins.temperature)
            images.append(elements.plot(address, f"{name}: the same vectors at other temperatures"))
    return [elements.table(columns, rows), elements.plots(images, _rest(report.margins))]


def _completeness(report: Report) -> list[Html]:
    if not report.completeness:
        return []
    levels = list(report.completeness[0].completeness.gammas)
    columns: dict[str, str | None] = {
        **_PAIR,
        "samples": "completeness",
        "classes": None,
        "score over": "of_bound",
        "alpha": "alpha",
        "beta": "beta",
    }
    columns |= {f"gamma at alpha {level}": "gammas" for level in levels}
    rows = [
        [
            *_pair(entry),
            str(found.num_samples),
            str(found.num_classes),
            _number(found.of_bound),
            _estimate(found.alpha),
            _estimate(found.beta),
            *(_estimate(found.gammas[level]) for level in levels),
        ]
        for entry in report.completeness
        for found in [entry.completeness]
    ]
    images = [
        elements.plot(
            plots.alpha_by_gamma(entry.completeness.alpha_by_gamma),
            f"{entry.first} and {entry.second} of {entry.dataset}",
        )
        for entry in report.completeness[:MAX_PLOTS]
    ]
    return [elements.table(columns, rows), elements.plots(images, _rest(report.completeness))]


def _left_out(report: Report) -> Html:
    rows = [[each.part, each.dataset or "all", each.of or "all", each.reason] for each in report.left_out]
    return elements.table({"part": None, "data set": None, "of": None, "reason": None}, rows)


_PAIR: Final[dict[str, str | None]] = {"first": None, "second": None, "data set": None, "trained": None}


def _pair(entry: OfPair) -> list[str]:
    return [entry.first, entry.second, entry.dataset, "yes" if entry.trained else "no"]


def _fit(fit: Fit | None) -> list[str]:
    if fit is None:
        return ["", "", ""]
    return [_estimate(fit.a), _estimate(fit.b), _or_nothing(fit.r_squared)]


def _rest(entries: Sequence[object]) -> int:
    return max(0, len(entries) - MAX_PLOTS)


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.interval is not None:
        low, high = estimate.interval
        return f"{_number(estimate.value)} [{_number(low)}, {_number(high)}]"
    return _with_error(estimate.value, estimate.standard_error)


def _with_error(value: float, error: float | None) -> str:
    return _number(value) if error is None else f"{_number(value)}\u00a0±\u00a0{error:.2g}"


def _or_nothing(value: float | None) -> str:
    return "" if value is None else _number(value)


def _number(value: float) -> str:
    return f"{value:.4g}"
