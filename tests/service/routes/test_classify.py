from __future__ import annotations

import numpy as np
import pytest

from service.routes.classify import Prompts, _alone


@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_a_label_is_judged_against_the_prompts_of_all_others(scale: float) -> None:
    rng = np.random.default_rng(0)
    counts = np.array([1, 3, 2, 1])
    f = scale * rng.normal(size=(5, 7))
    owners = np.repeat(np.arange(4), counts)
    prompts = Prompts(list("abcd"), [], [], counts)
    log_sums = np.logaddexp.reduceat(f, prompts.starts, axis=1)
    logits = log_sums - np.log(counts)
    expected = np.empty((5, 4))
    for label in range(4):
        rest = f[:, owners != label]
        top = rest.max(axis=1)
        expected[:, label] = logits[:, label] - top - np.log(np.exp(rest - top[:, None]).mean(axis=1))
    found = _alone(logits, log_sums, prompts, None)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-expected)), rtol=1e-9, atol=1e-300)


def test_a_thousand_labels_for_a_thousand_items_are_judged_at_once() -> None:
    counts = np.ones(1000, np.int64)
    log_sums = np.zeros((1000, 1000))
    found = _alone(log_sums, log_sums, Prompts([], [], [], counts), None)  # pairwise it would take minutes
    np.testing.assert_allclose(found, 0.5)
