from __future__ import annotations

from html.parser import HTMLParser

from worker.pages import elements


class Read(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


NASTY = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>&amp;"""


def read(html: str) -> Read:
    found = Read()
    found.feed(html)
    return found


def test_whatever_comes_from_outside_stays_text() -> None:
    columns: dict[str, str | None] = {NASTY: None, NASTY + " ": NASTY}
    found = read(
        elements.page(
            NASTY,
            elements.join(elements.paragraph(NASTY), elements.plot("data:," + NASTY, NASTY), elements.bullets([NASTY])),
            {"one": (NASTY, elements.section("one", NASTY, elements.table(columns, [[NASTY, NASTY]])))},
        )
        + elements.definitions({NASTY: NASTY})
        + elements.text(NASTY)
    )
    assert "script" not in found.tags
    assert found.tags.count("img") == 1, "the plot"
    assert "".join(found.words).count("<script>alert(1)</script>") == 14, "as often as it was said"


def test_a_long_table_is_cut_and_says_so() -> None:
    html = elements.table({"a": None}, [[str(row)] for row in range(elements.MAX_ROWS + 7)])
    assert read(html).tags.count("tr") == elements.MAX_ROWS + 1
    assert "7 more rows are in report.json" in html


def test_titles_lead_to_definitions() -> None:
    assert f'href="#{elements.anchor("relevant: label")}"' in elements.table({"a": "relevant: label"}, [])
    assert f'id="{elements.anchor("relevant: label")}"' in elements.definitions({"relevant: label": "..."})
    assert elements.plots([]) == ""
    assert "3 more plots" in elements.plots([elements.text("x")], 3)


def test_a_cell_that_says_just_a_verdict_looks_like_it() -> None:
    html = elements.table({"a": None, "b": None}, [["fails", "it fails"]], tones={"fails": "bad"})
    assert '<td class="bad">fails</td><td>it fails</td>' in html
    assert 'class="large"' in elements.plot("data:,", "x", large=True)
