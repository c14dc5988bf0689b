"""The page of answers: one HTML file with everything inside, no script and no address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import Any, Final

from service.demo.client import data_uri
from service.demo.figures import Figure
from service.demo.pictures import spectrogram
from service.demo.specimens import MEDIA_TYPES, Collection, Specimen

IMAGES_SHOWN: Final = 8
SOUNDS_SHOWN: Final = 3
TAUGHT_SHOWN: Final = 6
TEMPLATE: Final = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Answers:
    """The questions and what the service answered; matches index the held-out specimens of the other medium."""

    images: Collection
    sounds: Collection
    to_images: list[dict[str, Any]]
    to_sounds: list[dict[str, Any]]
    figures: list[Figure]


def write_page(path: Path, answers: Answers, *, model: dict[str, Any], recipe: dict[str, Any]) -> Path:
    """Write the page and return its path."""
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        figures="".join(_figure(figure) for figure in answers.figures),
        images_source=escape(answers.images.source),
        sounds_source=escape(answers.sounds.source),
        pairs=_pairs(model),
        taught_images="".join(_taught(each, _image(each)) for each in _varied(answers.images.train)),
        taught_sounds="".join(_taught(each, _sound(each)) for each in _varied(answers.sounds.train)),
        heard="".join(_heard(at, answers) for at in _one_each(answers.sounds.holdout)),
        seen="".join(_seen(at, answers) for at in _one_each(answers.images.holdout)),
        diagnostics=_diagnostics(answers),
        steps=recipe["budget"]["steps"],
        towers=_towers(recipe),
        dimensions=recipe["dimensions"],
        model=escape(str(model["id"])),
    )
    path.write_text(page, encoding="utf-8")
    return path


def name_of(label: str, specimens: Sequence[Specimen]) -> str:
    """Return the shortest caption of a label: what a person would call it."""
    return min((each.caption for each in specimens if each.label == label), key=lambda text: (len(text), text))


def _one_each(specimens: Sequence[Specimen]) -> list[int]:
    """Pick the first specimen of every label: chosen before any answer is known."""
    first: dict[str, int] = {}
    for at, specimen in enumerate(specimens):
        first.setdefault(specimen.label, at)
    return [first[label] for label in sorted(first, key=lambda label: first[label])]


def _varied(specimens: Sequence[Specimen]) -> list[Specimen]:
    """Pick specimens of different labels and captions."""
    chosen: dict[str, Specimen] = {}
    captions: set[str] = set()
    for specimen in specimens:
        pattern = specimen.caption.replace(specimen.label, "")
        if specimen.label not in chosen and pattern not in captions:
            chosen[specimen.label] = specimen
            captions.add(pattern)
    return list(chosen.values())[:TAUGHT_SHOWN]


def _figure(figure: Figure) -> str:
    verdict = "good" if figure.value >= figure.bar else "short"
    return (
        f'<tr class="{verdict}"><th>{escape(figure.name)}<small>{escape(figure.meaning)}</small></th>'
        f'<td class="value">{figure.value:.3f}</td><td class="scale"><span class="track">'
        f'<i style="width:{100 * figure.value:.1f}%"></i><b style="left:{100 * figure.bar:.0f}%"></b>'
        f'<u style="left:{100 * figure.chance:.0f}%"></u></span></td>'
        f"<td>{figure.bar:.2f}</td><td>{figure.chance:.2f}</td></tr>"
    )


def _pairs(model: dict[str, Any]) -> str:
    return "".join(
        f"<li>{escape(' with '.join(pair.split('+')))} <small>logit scale {scale:.1f}</small></li>"
        for pair, scale in sorted(model["logit_scales"].items())
    )


def _towers(recipe: dict[str, Any]) -> str:
    tower = next(iter(recipe["towers"].values()))
    return f"{len(recipe['towers'])} transformers of {tower['depth']} blocks and width {tower['width']}"


def _image(specimen: Specimen) -> str:
    return f'<img class="scan" src="{data_uri(MEDIA_TYPES["image"], specimen.payload)}" alt="{escape(specimen.label)}">'


def _sound(specimen: Specimen) -> str:
    picture = data_uri("image/png", spectrogram(specimen.payload))
    return (
        f'<span class="sound"><img src="{picture}" alt="spectrogram">'
        f'<audio controls preload="none" src="{data_uri(MEDIA_TYPES["audio"], specimen.payload)}"></audio></span>'
    )


def _taught(specimen: Specimen, shown: str) -> str:
    return f"<figure>{shown}<figcaption>“{escape(specimen.caption)}”</figcaption></figure>"


def _match(match: dict[str, Any], found: Specimen, wanted: str, show: Callable[[Specimen], str]) -> str:
    verdict = "right" if found.label == wanted else "wrong"
    share = match["posterior"]
    number = f"{100 * share:.1f} %" if share is not None else f"{match['score']:.2f}"
    return (
        f'<figure class="{verdict}">{show(found)}<span class="share"><i style="width:{100 * (share or 0):.1f}%"></i></span>'
        f"<figcaption>{number}</figcaption></figure>"
    )


def _heard(at: int, answers: Answers) -> str:
    asked, answer = answers.sounds.holdout[at], answers.to_images[at]
    matches = [
        _match(match, answers.images.holdout[match["index"]], asked.label, _image)
        for match in answer["matches"][:IMAGES_SHOWN]
    ]
    return _answer(_sound(asked), asked, answers.sounds.train, matches)


def _seen(at: int, answers: Answers) -> str:
    asked, answer = answers.images.holdout[at], answers.to_sounds[at]
    matches = [
        _match(match, answers.sounds.holdout[match["index"]], asked.label, _sound)
        for match in answer["matches"][:SOUNDS_SHOWN]
    ]
    return _answer(_image(asked), asked, answers.images.train, matches)


def _answer(shown: str, asked: Specimen, known: Sequence[Specimen], matches: Sequence[str]) -> str:
    origin = f"<small>{escape(asked.origin)}</small>" if asked.origin else ""
    name = escape(name_of(asked.label, known))
    return (
        f'<div class="answer"><figure class="asked">{shown}<figcaption><strong>{name}</strong>{origin}</figcaption>'
        f'</figure><span class="arrow">→</span><div class="matches">{"".join(matches)}</div></div>'
    )


def _diagnostics(answers: Answers) -> str:
    rows: list[str] = []
    for title, composed in (("sound to images", answers.to_images), ("image to sounds", answers.to_sounds)):
        every = [answer["diagnostics"] for answer in composed]
        first = every[0]
        trusted = sum(bool(each["value_trusted"]) for each in every)
        warnings = sorted({warning for each in every for warning in each["warnings"]})[:4]
        cells = (
            title,
            f"{first['method']} through {first['through'] or '–'}",
            _number(first["bridge_size"]),
            _middle(every, "effective_sample_size", ".0f"),
            _middle(every, "bridge_resultant", ".2f"),
            _middle(every, "direct_marginal_spearman", ".2f"),
            f"{trusted} of {len(every)}",
        )
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        notes = [str(first["reason"]), *map(str, warnings)]
        rows.append(f'<tr class="notes"><td colspan="7">{escape("; ".join(notes))}</td></tr>')
    return "".join(rows)


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _middle(every: Sequence[dict[str, Any]], key: str, form: str) -> str:
    values = [each[key] for each in every if each[key] is not None]
    return format(median(values), form) if values else "–"
