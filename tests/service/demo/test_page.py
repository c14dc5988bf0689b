from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from service.demo.figures import Figure
from service.demo.page import Answers, one_each, write_page
from service.demo.pictures import HEIGHT, WIDTH, spectrogram
from service.demo.recipes import recipe
from service.demo.specimens import Collection, Specimen

VOID = {"meta", "img"}


class Tags(HTMLParser):
    """Checks that tags close in order, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def wav(frequency: float) -> bytes:
    t = np.arange(8000) / 16_000
    out = io.BytesIO()
    soundfile.write(out, (0.5 * np.sin(2 * np.pi * frequency * t)).astype(np.float32), 16_000, format="WAV")
    return out.getvalue()


def png(level: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), level).save(out, format="PNG")
    return out.getvalue()


def diagnostics() -> dict[str, Any]:
    return {
        "method": "marginal",
        "reason": "audio and image were not trained together",
        "through": "text",
        "bridge_size": 2048,
        "effective_sample_size": 40.0,
        "bridge_resultant": 0.2,
        "direct_marginal_spearman": None,
        "value_trusted": True,
        "warnings": ["a <warning>"],
    }


def composition(*matches: tuple[int, float | None]) -> dict[str, Any]:
    return {
        "matches": [{"index": index, "posterior": posterior, "score": 1.0} for index, posterior in matches],
        "diagnostics": diagnostics(),
    }


@pytest.fixture
def page(tmp_path: Path) -> str:
    images = tuple(Specimen(f"i{at}", png(80 * at), f"a <{word}>", word) for at, word in enumerate(["one", "two"]))
    sounds = tuple(
        Specimen(f"s{at}", wav(300 + 200 * at), word, word, "en+f1") for at, word in enumerate(["one", "two"])
    )
    collections = Collection("image", "scans", images, images), Collection("audio", "voices", sounds, sounds)
    answers = Answers(
        images=collections[0],
        sounds=collections[1],
        heard={0: composition((0, 0.75), (1, 0.25)), 1: composition((0, 0.6), (1, 0.4))},
        seen={0: composition((0, None), (1, None)), 1: composition((1, 0.9), (0, 0.1))},
        diagnostics={"sound to images": [diagnostics()], "image to sounds": [diagnostics()]},
        figures=[Figure("image_accuracy", "image, zero-shot", "named right", 0.95, 0.93, 0.1)],
    )
    model = {"id": "model_x", "logit_scales": {"audio+text": 15.0, "image+text": 14.0}}
    wanted = recipe(*collections, datasets={"image": "ds_a", "audio": "ds_b"}, steps=600, seed=0)
    path = write_page(tmp_path / "page.html", answers, model=model, recipe=wanted)
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not re.search(r"https?://", page)
    assert "$" not in page
    sources = [attributes["src"] for _, attributes in tags.seen if "src" in attributes]
    assert sources
    assert all(source and source.startswith("data:") for source in sources)


def test_the_page_plays_the_sounds_and_marks_right_and_wrong_answers(page: str) -> None:
    assert page.count("<audio controls") == 2 + 2 + 4  # taught, asked, found
    assert page.count('class="right"') == 4
    assert page.count('class="wrong"') == 4
    assert "75 %" in page
    assert "0.950" in page
    assert "audio with text" in page
    assert "through text" in page


def test_what_comes_from_data_is_escaped(page: str) -> None:
    assert "a &lt;one&gt;" in page
    assert "<warning>" not in page
    assert "<one>" not in page


def test_the_first_of_every_label_is_asked() -> None:
    specimens = [Specimen(str(at), b"", "", label) for at, label in enumerate(["b", "a", "b", "c", "a"])]
    assert one_each(specimens) == [0, 1, 3]


def test_a_high_tone_is_drawn_above_a_low_one() -> None:
    rows: list[int] = []
    for frequency in (400.0, 4000.0):
        with Image.open(io.BytesIO(spectrogram(wav(frequency)))) as image:
            assert image.size == (WIDTH, HEIGHT)
            rows.append(int(np.asarray(image.convert("L"), np.float64).mean(axis=1).argmin()))
    assert rows[1] < rows[0] - 20
