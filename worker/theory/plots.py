"""Plots of an experiment, as PNG: files of their own beside the report, and part of its page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from worker.pages import drawing
from worker.pages.drawing import BLUE, GREEN, RED, VIOLET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from service.contract.experiments import Curve, Map

COLOURS: Final = (BLUE, RED, GREEN, VIOLET)
DASHES: Final = ("-", "--", ":")  # when the colours come round again
INK: Final = "#0f172a"
GOAL: Final = "#dcfce7"
WALL: Final = "#334155"
CURVE_INCHES: Final = (6.4, 4.0)
PANELS_INCHES: Final = (6.8, 3.6)  # two side by side


def draw(curve: Curve) -> bytes:
    """Draw the mean of every series, and the range over the seeds behind it."""

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        for at, (name, rows) in enumerate(curve.series.items()):
            colour, dashes = COLOURS[at % len(COLOURS)], DASHES[at // len(COLOURS) % len(DASHES)]
            columns = list(zip(*rows, strict=True))
            mean = [math.fsum(column) / len(column) for column in columns]
            axes.plot(
                curve.x, mean, color=colour, linestyle=dashes, marker="o", markersize=4, linewidth=1.6, label=name
            )
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
        if len(curve.series) + len(curve.marks) > 1:
            axes.legend()

    return drawing.png(CURVE_INCHES, paint)


def draw_map(plan: Map) -> bytes:
    """Draw each panel's paths from a dot on: green to the goal, which is shaded; the others red, to a cross."""
    num_rows, num_columns = len(plan.walls), len(plan.walls[0])
    walls = [(row, column) for row, line in enumerate(plan.walls) for column, is_wall in enumerate(line) if is_wall]
    down = -(-len(plan.panels) // 2)

    def paint(figure: Figure) -> None:
        from matplotlib.patches import Rectangle  # noqa: PLC0415  # after the figure that was asked for has loaded it

        figure.set_layout_engine("constrained")
        figure.suptitle(plan.title, fontsize=11)
        for at, panel in enumerate(plan.panels, start=1):
            axes = figure.add_subplot(down, 2, at)
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(True)
            for cells, colour in ((panel.goal, GOAL), (walls, WALL)):
                for row, column in cells:
                    axes.add_patch(Rectangle((column, row), 1, 1, color=colour, linewidth=0))
            for path, is_there in zip(panel.paths, panel.reached, strict=True):
                rows, columns = zip(*path, strict=True)
                axes.plot(columns, rows, color=GREEN if is_there else RED, linewidth=1.2)
                axes.plot(columns[0], rows[0], color=INK, marker="o", markersize=3)
                if not is_there:
                    axes.plot(columns[-1], rows[-1], color=INK, marker="x", markersize=6, zorder=3, clip_on=False)
            axes.set_title(f"{panel.title}: {sum(panel.reached)} of {len(panel.reached)}", fontsize=9)
            axes.set(xlim=(0, num_columns), ylim=(num_rows, 0), aspect="equal", xlabel="column", ylabel="row")
            # A cell's number stands at its middle.
            axes.set_xticks([at + 0.5 for at in range(0, num_columns, 2)], [str(at) for at in range(0, num_columns, 2)])
            axes.set_yticks([at + 0.5 for at in range(0, num_rows, 2)], [str(at) for at in range(0, num_rows, 2)])
            axes.tick_params(length=0, labelsize=7)

    width, height = PANELS_INCHES
    return drawing.png((width, height * down), paint)
