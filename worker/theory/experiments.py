"""Runs an experiment by its name: one match, no registry."""

from __future__ import annotations

from typing import Protocol, assert_never

from service.contract.experiments import ExperimentName
from worker.theory import (
    assumption_a1,
    batch_size,
    certificate,
    closed_forms,
    completeness,
    concentration,
    discrete_exact,
    dropped_scale,
    estimator_honesty,
    gaussian_table,
    k_sample,
    mazes,
    one_sided,
    separate_models,
    square_loss,
    temperature_margin,
)
from worker.theory.findings import Outcome, Setting


class _Module(Protocol):
    def run(self, setting: Setting) -> Outcome: ...

    def num_runs(self, num_seeds: int) -> int: ...


def run(name: ExperimentName, setting: Setting) -> Outcome:
    """Run it; `setting.step` is called `num_runs` times."""
    return _module(name).run(setting)


def num_runs(name: ExperimentName, num_seeds: int) -> int:
    """Return how many runs it has."""
    return _module(name).num_runs(num_seeds)


def _module(name: ExperimentName) -> _Module:  # noqa: C901 - one case for each
    match name:
        case "square-loss":
            return square_loss
        case "certificate":
            return certificate
        case "completeness":
            return completeness
        case "temperature-margin":
            return temperature_margin
        case "one-sided":
            return one_sided
        case "batch-size":
            return batch_size
        case "k-sample":
            return k_sample
        case "mazes":
            return mazes
        case "closed-forms":
            return closed_forms
        case "discrete-exact":
            return discrete_exact
        case "concentration":
            return concentration
        case "separate-models":
            return separate_models
        case "dropped-scale":
            return dropped_scale
        case "assumption-a1":
            return assumption_a1
        case "estimator-honesty":
            return estimator_honesty
        case "gaussian-table":
            return gaussian_table
        case _:
            assert_never(name)
