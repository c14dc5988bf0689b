from __future__ import annotations

import pytest

from service.client.text import as_json, plain, span, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain Größe 数字", "plain Größe 数字"),
        ("two\nlines\tand\x85more\u2029\n", "two lines and more"),
        ("\x1b[31mred\x07\x7f\x9b", "�[31mred���"),
        ("\u202eright\u200b\ud800", "�right��"),
        (7, "7"),
    ],
)
def test_what_is_shown_is_one_printable_line(text: object, shown: str) -> None:
    assert plain(text) == shown


def test_what_is_too_long_is_cut_and_says_so() -> None:
    assert plain("abcdef", longest=6) == "abcdef"
    assert plain("abcdefg", longest=6) == "abcde…"


def test_columns_are_aligned_and_lines_are_cut_to_the_terminal() -> None:
    rows = [["ID", "NAME", "ERROR"], ["1", "longer", "why it failed"]]
    assert table(rows, width=None) == ["ID  NAME    ERROR", "1   longer  why it failed"]
    assert table(rows, width=16) == ["ID  NAME    ERR…", "1   longer  why…"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-5, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7_199, "120 min"), (7_200, "2 h"), (200_000, "2 d")],
)
def test_a_time_is_written_in_the_largest_unit_of_which_there_are_two(seconds: float, shown: str) -> None:
    assert span(seconds) == shown


def test_json_for_programs_holds_nothing_but_printable_ascii() -> None:
    assert as_json({"name": "\x7f\x1bö"}) == '{\n  "name": "\\u007f\\u001b\\u00f6"\n}'
