from __future__ import annotations

import argparse
from typing import get_args

from service.arguments import parser
from service.contract.experiments import EXPERIMENTS, PAPERS, ExperimentName, Paper

FROZEN = ("square-loss", "certificate", "completeness", "temperature-margin", "one-sided", "batch-size", "k-sample")
"""Append only: rows with these words are worked years from now."""


def test_names_are_for_ever() -> None:
    assert get_args(ExperimentName)[: len(FROZEN)] == FROZEN
    assert set(get_args(ExperimentName)) == set(FROZEN), "a new one is added to the end of FROZEN in the same change"


def test_every_name_has_an_experiment_and_every_paper_a_title() -> None:
    assert tuple(EXPERIMENTS) == get_args(ExperimentName)
    assert all(each.name == name for name, each in EXPERIMENTS.items())
    assert set(PAPERS) == set(get_args(Paper)) == {each.paper for each in EXPERIMENTS.values()}


def test_the_command_line_knows_the_papers_without_loading_the_contract() -> None:
    commands = next(each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    actions = next(
        each for each in commands.choices["experiments"]._actions if isinstance(each, argparse._SubParsersAction)
    )
    for action in ("list", "run"):
        paper = next(each for each in actions.choices[action]._actions if each.dest == "paper")
        assert tuple(paper.choices or ()) == get_args(Paper)
