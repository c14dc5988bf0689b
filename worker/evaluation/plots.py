"""Plots of an evaluation, each as the address of an SVG image for a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from worker.pages import drawing
from worker.pages.drawing import BLUE, GREY, RED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure

    from worker.evaluation.calibration import Bin
    from worker.evaluation.certificate import Certificate
    from worker.evaluation.ensembles import Fit, Point
    from worker.evaluation.margins import Direction, Histogram, Softened

SIZE_INCHES: Final = (4.2, 2.9)
AXES: Final = (0.17, 0.16, 0.8, 0.68)  # fixed: fitting them to their labels takes three times as long


def prompt_curve(points: Sequence[Point], fit: Fit | None, figure: str) -> str:
    """Draw a figure (`cross_entropy` or `error`) over the prompts per label, with its fit."""
    nums = [point.num_prompts for point in points]
    found = [getattr(point, figure) for point in points]

    def paint(axes: Any) -> None:
        axes.errorbar(
            nums,
            [each.value for each in found],
            yerr=[2 * (each.standard_error or 0) for each in found],
            fmt="o",
            color=BLUE,
            markersize=4,
            capsize=2,
            label="measured, ± 2 standard errors",
        )
        if fit is not None:
            a, b = fit.a.value, fit.b.value
            axes.plot(nums, [a + b / num for num in nums], color=RED, linewidth=1, label=f"{a:.3g} + {b:.3g} / M")
            axes.axhline(a, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_xticks(nums, [str(num) for num in nums])
        axes.minorticks_off()
        axes.set_xlabel("prompts per label, M")
        axes.set_ylabel("cross-entropy, nats" if figure == "cross_entropy" else "error")
        drawing.legend(axes)

    return _draw(paint)


def certificates(found: Sequence[Certificate]) -> str:
    """Draw bounds beside the errors that they bound."""

    def paint(axes: Any) -> None:
        at = range(len(found))
        axes.bar([x - 0.2 for x in at], [each.shown for each in found], 0.38, color=GREY, label="bound, at most 1")
        axes.bar([x + 0.2 for x in at], [each.error.value for each in found], 0.38, color=BLUE, label="measured")
        axes.set_xticks(list(at), [f"top-{each.r}" for each in found])
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("error")
        drawing.legend(axes)

    return _draw(paint)


def reliability(bins: Sequence[Bin]) -> str:
    """Draw accuracy over confidence, and where the samples are."""
    filled = [each for each in bins if each.accuracy is not None]
    total = sum(each.num_samples for each in bins)

    def paint(axes: Any) -> None:
        axes.bar(
            [each.lower for each in bins],
            [each.num_samples / total for each in bins],
            width=[each.upper - each.lower for each in bins],
            align="edge",
            color="#e5e7eb",
            label="share of the samples",
        )
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        axes.errorbar(
            [each.confidence for each in filled],
            [each.accuracy.value for each in filled if each.accuracy],
            yerr=[2 * (each.accuracy.standard_error or 0) for each in filled if each.accuracy],
            fmt="o-",
            color=BLUE,
            markersize=4,
            linewidth=1,
            capsize=2,
            label="accuracy, ± 2 standard errors",
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("confidence")
        drawing.legend(axes)

    return _draw(paint)


def margins(directions: Sequence[Direction]) -> str:
    """Draw the distribution of the hardest margin in both directions."""

    def paint(axes: Any) -> None:
        for direction, colour in zip(directions, (BLUE, RED), strict=False):
            histogram: Histogram = direction.histogram
            total = max(1, sum(histogram.counts))
            label = drawing.plain(f"{direction.source} to {direction.target}")
            shares = [count / total for count in histogram.counts]
            axes.stairs(shares, histogram.edges, fill=True, alpha=0.35, color=colour, label=label)
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_xlabel("margin to the hardest negative")
        axes.set_ylabel("share of the queries")
        drawing.legend(axes)

    return _draw(paint)


def by_temperature(points: Sequence[Softened], trained: float) -> str:
    """Draw the cross-entropy of the same vectors over the temperature, and the trained one."""

    def paint(axes: Any) -> None:
        xs = [point.temperature for point in points]
        axes.plot(xs, [point.cross_entropy.value for point in points], "o-", color=BLUE, markersize=4, linewidth=1)
        axes.axvline(trained, color=RED, linewidth=1, label="trained")
        axes.set_xscale("log")
        axes.set_xlabel("temperature")
        axes.set_ylabel("cross-entropy in the batch, nats")
        drawing.legend(axes)

    return _draw(paint)


def alpha_by_gamma(points: Sequence[tuple[float, float]]) -> str:
    """Draw the share of pairs that do not keep a margin."""

    def paint(axes: Any) -> None:
        axes.plot([gamma for gamma, _ in points], [alpha for _, alpha in points], color=BLUE, linewidth=1.2)
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("margin γ")
        axes.set_ylabel("share of pairs below it, α")

    return _draw(paint)


def _draw(paint: Callable[[Any], None]) -> str:
    """Return the address of a plot; `paint` fills its axes."""

    def fill(figure: Figure) -> None:
        paint(figure.add_axes(AXES))

    return drawing.address(drawing.svg(SIZE_INCHES, fill))
