"""Plots of an experiment, as PNG."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from service.contract.experiments import Curve

COLOURS: Final = ("#0b6e99", "#c2410c", "#15803d", "#7c3aed")
DASHES: Final = ("-", "--", ":")  # when the colours come round again


def draw(curve: Curve) -> bytes:
    """Draw the mean of every series, and the range over the seeds behind it."""
    # A figure of its own, without pyplot, needs no display and leaves no state.
    from matplotlib.figure import Figure  # noqa: PLC0415  # reads MPLCONFIGDIR now

    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for at, (name, rows) in enumerate(curve.series.items()):
        colour, dashes = COLOURS[at % len(COLOURS)], DASHES[at // len(COLOURS) % len(DASHES)]
        columns = list(zip(*rows, strict=True))
        mean = [math.fsum(column) / len(column) for column in columns]
        axes.plot(curve.x, mean, color=colour, linestyle=dashes, marker="o", markersize=4, linewidth=1.6, label=name)
        if len(rows) > 1:
            axes.fill_between(
                curve.x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, linewidth=0
            )
    for name, x in curve.marks.items():
        axes.axvline(x, color="#64748b", linestyle="--", linewidth=1, label=name)
    if curve.log_x:
        axes.set_xscale("log")
        axes.set_xticks(curve.x, [f"{x:g}" for x in curve.x])
        axes.minorticks_off()
    if curve.log_y:
        axes.set_yscale("log")
    axes.set_title(curve.title, fontsize=11)
    axes.set_xlabel(curve.x_label)
    axes.set_ylabel(curve.y_label)
    axes.grid(visible=True, color="#e2e8f0", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curve.series) + len(curve.marks) > 1:
        axes.legend(fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
