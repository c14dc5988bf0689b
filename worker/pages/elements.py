"""Pieces of an HTML page. Whatever comes from outside passes `escape` here, and nowhere else is HTML put together."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final, Literal, NewType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Html = NewType("Html", str)
"""Text that is HTML already."""

Tone = Literal["good", "bad", "note"]

MAX_ROWS: Final = 200
STYLE: Final = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem; color: #1f2937; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #e5e7eb; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; }
a { color: #2563a8; text-decoration: none; } a:hover, a:focus { text-decoration: underline; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; border-bottom: 1px solid #f0f1f3; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td { max-width: 30rem; overflow-wrap: break-word; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 22rem; max-width: 100%; }
figure.large { width: 40rem; }
figure img { width: 100%; height: auto; } figcaption, .note { color: #6b7280; font-size: .87rem; }
td.good { color: #15803d; } td.bad { color: #b91c1c; font-weight: 600; } td.note { color: #6b7280; }
details { margin: .8rem 0; font-size: .87rem; }
dl { display: grid; grid-template-columns: minmax(8rem, 14rem) 1fr; gap: .2rem 1rem; margin: .4rem 0; }
dt { font-weight: 600; overflow-wrap: anywhere; } dd { margin: 0; }
dt:target { background: #fef3c7; }
"""
POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(words: str) -> Html:
    """Escape text."""
    return Html(escape(words))


def join(*parts: Html) -> Html:
    """Put pieces one after the other."""
    return Html("\n".join(parts))


def paragraph(words: str, *, note: bool = False) -> Html:
    """Return a paragraph of plain text."""
    return Html(f'<p class="note">{escape(words)}</p>' if note else f"<p>{escape(words)}</p>")


def bullets(lines: Sequence[str]) -> Html:
    """Return a list of plain text."""
    return Html("<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>")


def table(
    columns: Mapping[str, str | None],
    rows: Sequence[Sequence[str]],
    *,
    tones: Mapping[str, Tone] | None = None,
) -> Html:
    """Return a table of plain text; a column's title leads to the definition that it names.

    `tones`: how cells look that say just this, such as verdicts.
    """
    head = "".join(
        f"<th>{escape(title)}</th>" if meaning is None else f'<th><a href="#{anchor(meaning)}">{escape(title)}</a></th>'
        for title, meaning in columns.items()
    )
    looks = {said: f' class="{tone}"' for said, tone in (tones or {}).items()}
    body = "\n".join(
        "<tr>" + "".join(f"<td{looks.get(cell, '')}>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[:MAX_ROWS]
    )
    found = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    if len(rows) > MAX_ROWS:
        found += paragraph(f"{len(rows) - MAX_ROWS} more rows are in report.json.", note=True)
    return Html(found)


def plot(address: str, caption: str, *, large: bool = False) -> Html:
    """Return an image with its caption."""
    said = escape(caption)
    size = ' class="large"' if large else ""
    return Html(f'<figure{size}><img src="{escape(address)}" alt="{said}"><figcaption>{said}</figcaption></figure>')


def plots(images: Sequence[Html], num_left_out: int = 0) -> Html:
    """Return images side by side."""
    if not images:
        return Html("")
    rest = paragraph(f"{num_left_out} more plots were left out; their numbers are in report.json.", note=True)
    return Html(f'<div class="plots">{"".join(images)}</div>' + (rest if num_left_out else ""))


def definitions(meanings: Mapping[str, str]) -> Html:
    """Return a list of definitions that the titles of tables lead to."""
    rows = "\n".join(
        f'<dt id="{anchor(name)}">{escape(name)}</dt><dd>{escape(meaning)}</dd>' for name, meaning in meanings.items()
    )
    return Html(f"<details open><summary>Definitions</summary><dl>\n{rows}\n</dl></details>")


def section(name: str, title: str, *content: Html) -> Html:
    """Return a section that the table of contents leads to."""
    return Html(f'<section id="{name}"><h2>{escape(title)}</h2>\n{join(*content)}\n</section>')


def page(title: str, lead: Html, sections: Mapping[str, tuple[str, Html]]) -> str:
    """Return a whole document: no script, nothing from elsewhere; `sections` are (title, section) by name."""
    contents = "".join(f'<li><a href="#{name}">{escape(each)}</a></li>' for name, (each, _) in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{escape(title)}</h1>\n{lead}\n<nav aria-label="Contents"><ul>{contents}</ul></nav>\n'
        f"{join(*(each for _, each in sections.values()))}\n</body></html>\n"
    )


def anchor(name: str) -> str:
    """Return the id of a definition."""
    return "d-" + "".join(letter if letter.isalnum() else "-" for letter in name)
