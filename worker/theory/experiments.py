"""Runs an experiment by its name: one match, no registry."""

from __future__ import annotations

from typing import assert_never

from service.contract.experiments import ExperimentName
from worker.theory import (
    batch_size,
    certificate,
    completeness,
    k_sample,
    one_sided,
    square_loss,
    temperature_margin,
)
from worker.theory.findings import Outcome, Setting


def run(name: ExperimentName, setting: Setting) -> Outcome:
    """Run it; `setting.step` is called `num_runs` times."""
    match name:
        case "square-loss":
            return square_loss.run(setting)
        case "certificate":
            return certificate.run(setting)
        case "completeness":
            return completeness.run(setting)
        case "temperature-margin":
            return temperature_margin.run(setting)
        case "one-sided":
            return one_sided.run(setting)
        case "batch-size":
            return batch_size.run(setting)
        case "k-sample":
            return k_sample.run(setting)
        case _:
            assert_never(name)


def num_runs(name: ExperimentName, num_seeds: int) -> int:
    """Return how many runs it has."""
    match name:
        case "square-loss":
            return square_loss.num_runs(num_seeds)
        case "certificate":
            return certificate.num_runs(num_seeds)
        case "completeness":
            return completeness.num_runs(num_seeds)
        case "temperature-margin":
            return temperature_margin.num_runs(num_seeds)
        case "one-sided":
            return one_sided.num_runs(num_seeds)
        case "batch-size":
            return batch_size.num_runs(num_seeds)
        case "k-sample":
            return k_sample.num_runs(num_seeds)
        case _:
            assert_never(name)
