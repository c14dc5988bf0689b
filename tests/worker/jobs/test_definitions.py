from __future__ import annotations

import re
import typing
from collections.abc import Iterator

from service.contract.word import Word
from worker.evaluation.estimates import Estimate
from worker.jobs.definitions import DEFINITIONS
from worker.jobs.report import Report

SAME = re.compile(r"^(chance)_.*|(.*?)_(?:standard_error|before|after)$")
NO_FIGURES = {"lower", "upper", "edges", "counts", "seed", "format"}
"""Ends of bins, and what the caller said."""


def figures(word: type[Word], seen: set[type[Word]]) -> Iterator[str]:
    """Yield the names of the fields of a word and of the words in it that hold numbers which were measured."""
    seen.add(word)
    for name, field in word.model_fields.items():
        parts = list(flat(field.annotation))
        if {float, Estimate} & set(parts):
            yield name
        for part in parts:
            if isinstance(part, type) and issubclass(part, Word) and part not in seen:
                yield from figures(part, seen)


def flat(annotation: object) -> Iterator[object]:
    yield annotation
    for part in typing.get_args(annotation):
        yield from flat(part)


def test_every_figure_of_a_report_is_defined() -> None:
    found = set(figures(Report, set()))
    assert {"recall", "bound", "beta", "gap", "temperature", "hardest"} <= found
    for name in sorted(found - NO_FIGURES - set(Estimate.model_fields)):
        match = SAME.match(name)
        meant = next(filter(None, match.groups())) if match else name
        assert meant in DEFINITIONS, name
    assert {"standard_error", "interval"} <= DEFINITIONS.keys()


def test_no_definition_is_given_twice() -> None:
    from worker.jobs import definitions

    parts = [value for name, value in vars(definitions).items() if name.isupper() and name != "DEFINITIONS"]
    assert sum(len(part) for part in parts if isinstance(part, dict)) == len(DEFINITIONS)
