"""The page of answers: one HTML file with everything inside, no script and no address."""

from __future__ import annotations

from collections.abc import Sequence
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
SHARES_SHOWN: Final = 3
TAUGHT_SHOWN: Final = 6
TEMPLATE: Final = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Answers:
    """The questions and what the service answered; matches index the held-out specimens of the other medium."""

    images: Collection
    sounds: Collection
    heard: dict[int, dict[str, Any]]  # position of a held-out sound -> its composition with all held-out images
    seen: dict[int, dict[str, Any]]  # position of a held-out image -> its composition with all held-out sounds
    diagnostics: dict[str, list[dict[str, Any]]]  # direction -> of every answer that the figures count
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
        heard="".join(_heard(at, answers) for at in answers.heard),
        seen="".join(_seen(at, answers) for at in answers.seen),
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


def one_each(specimens: Sequence[Specimen]) -> list[int]:
    """Pick the first specimen of every label: chosen before any answer is known."""
    first: dict[str, int] = {}
    for at, specimen in enumerate(specimens):
        first.setdefault(specimen.label, at)
    return [first[label] for label in sorted(first, key=lambda label: first[label])]


def _varied(specimens: Sequence[Specimen]) -> list[Specimen]:
    """Pick specimens of different labels and captions."""
    chosen: dict[str, Specimen] = {}
    patterns: set[str] = set()
    for different in (True, False):  # first another way of saying it each time, then whatever label is left
        for specimen in specimens:
            pattern = specimen.caption.replace(specimen.label, "")
            if specimen.label not in chosen and (pattern not in patterns or not different):
                chosen[specimen.label] = specimen
                patterns.add(pattern)
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


def _match(found: Specimen, wanted: str, shown: str) -> str:
    return f'<figure class="{"right" if found.label == wanted else "wrong"}">{shown}</figure>'


def _heard(at: int, answers: Answers) -> str:
    asked, found = answers.sounds.holdout[at], answers.images.holdout
    best = _best(answers.heard[at], found, IMAGES_SHOWN)
    matches = [_match(each, asked.label, _image(each)) for each in best]
    return _answer(_sound(asked), asked, matches, _shares(answers.heard[at], found), answers.images.train)


def _seen(at: int, answers: Answers) -> str:
    asked, found = answers.images.holdout[at], answers.sounds.holdout
    best = _best(answers.seen[at], found, SOUNDS_SHOWN)
    matches = [_match(each, asked.label, _sound(each)) for each in best]
    return _answer(_image(asked), asked, matches, _shares(answers.seen[at], found), answers.sounds.train)


def _best(answer: dict[str, Any], found: Sequence[Specimen], count: int) -> list[Specimen]:
    return [found[int(match["index"])] for match in answer["matches"][:count]]


def _shares(answer: dict[str, Any], found: Sequence[Specimen]) -> list[tuple[str, float]]:
    """Add the posterior up over the targets of each label, largest first; empty where the method states none."""
    shares: dict[str, float] = {}
    for match in answer["matches"]:
        if match["posterior"] is not None:
            label = found[int(match["index"])].label
            shares[label] = shares.get(label, 0.0) + match["posterior"]
    return sorted(shares.items(), key=lambda pair: -pair[1])[:SHARES_SHOWN]


def _answer(
    shown: str, asked: Specimen, matches: Sequence[str], shares: list[tuple[str, float]], known: Sequence[Specimen]
) -> str:
    origin = f"<small>{escape(asked.origin)}</small>" if asked.origin else ""
    bars = "".join(
        f"<span>{escape(name_of(label, known))}</span>"
        f'<span class="share"><i style="width:{100 * share:.1f}%"></i></span><span>{100 * share:.0f} %</span>'
        for label, share in shares
    )
    return (
        f'<div class="answer"><figure class="asked">{shown}<figcaption><strong>{escape(asked.caption)}</strong>{origin}'
        f'</figcaption></figure><span class="arrow">→</span><div class="matches">{"".join(matches)}</div>'
        f'<div class="shares">{bars}</div></div>'
    )


def _diagnostics(answers: Answers) -> str:
    rows: list[str] = []
    for title, every in answers.diagnostics.items():
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
