from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from worker.pages import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def dot(figure: Figure) -> None:
    axes = figure.add_subplot()
    axes.plot([1], [2], "o", label=drawing.plain("$x^{"))
    drawing.legend(axes)


def test_the_same_figure_gives_the_same_bytes_and_says_nothing_of_who_made_it() -> None:
    for save in (drawing.svg, drawing.png):
        image = save((2, 1), dot)
        assert save((2, 1), dot) == image
        assert b"atplotlib v" not in image
    assert drawing.png((2, 1), dot)[16:24] == (220).to_bytes(4, "big") + (110).to_bytes(4, "big")


def test_names_stay_text_that_is_not_mathematics() -> None:
    assert b">$x^{<" in drawing.svg((2, 1), dot)


def test_an_address_holds_the_image_and_says_what_it_is() -> None:
    for kind, image in (("png", drawing.png((2, 1), dot)), ("svg+xml", drawing.svg((2, 1), dot))):
        head, _, data = drawing.address(image).partition(",")
        assert head == f"data:image/{kind};base64"
        assert base64.b64decode(data) == image


def test_the_cache_goes_where_it_is_told_unless_somebody_chose_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", "/chosen")
    drawing.prepare(tmp_path)
    assert os.environ["MPLCONFIGDIR"] == "/chosen"
    monkeypatch.delenv("MPLCONFIGDIR")
    drawing.prepare(tmp_path)
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "matplotlib")
    monkeypatch.delenv("MPLCONFIGDIR")
