"""Figures as bytes: drawn without a display, without pyplot's global state, all in one style."""

from __future__ import annotations

import base64
import io
import os
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

BLUE: Final = "#2563a8"
RED: Final = "#c2410c"
GREEN: Final = "#15803d"
VIOLET: Final = "#7c3aed"
GREY: Final = "#9ca3af"
PIXELS_PER_INCH: Final = 110
_STYLE: Final[Any] = {
    "svg.fonttype": "none",  # text stays text: a third of the size
    "svg.hashsalt": "report",  # the same numbers give the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}


def prepare(folder: Path) -> None:
    """Let matplotlib keep its cache in a folder that can be written; call it before the first figure."""
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))


def svg(size_inches: tuple[float, float], paint: Callable[[Figure], None]) -> bytes:
    """Return a figure that `paint` fills, as SVG."""
    return _saved(size_inches, paint, "svg", ("Date", "Creator", "Format", "Type"))


def png(size_inches: tuple[float, float], paint: Callable[[Figure], None]) -> bytes:
    """Return a figure that `paint` fills, as PNG."""
    return _saved(size_inches, paint, "png", ("Software",))


def address(image: bytes) -> str:
    """Return an image as an address that holds all of it."""
    kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def legend(axes: Any) -> None:
    """Put a legend above the axes, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def plain(text: str) -> str:
    """Keep matplotlib from reading mathematics into a name."""
    return text.replace("$", r"\$")


def _saved(
    size_inches: tuple[float, float],
    paint: Callable[[Figure], None],
    kind: Literal["png", "svg"],
    unsaid: Sequence[str],
) -> bytes:
    """`unsaid`: what matplotlib would write into the file beside the figure, so that equal figures are equal bytes."""
    import matplotlib as mpl  # noqa: PLC0415  # half a second, for reports only; reads MPLCONFIGDIR now
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size_inches, dpi=PIXELS_PER_INCH)
        paint(figure)
        out = io.BytesIO()
        figure.savefig(out, format=kind, metadata=dict.fromkeys(unsaid))
    return out.getvalue()
