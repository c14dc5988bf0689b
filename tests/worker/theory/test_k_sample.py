from __future__ import annotations

import numpy as np
import pytest

from worker.theory import jghm, k_sample
from worker.theory.findings import Setting


def best_score(joint: np.ndarray) -> np.ndarray:
    return np.log(joint / np.outer(joint.sum(1), joint.sum(0)))


def test_the_joint_is_a_distribution_with_the_information_that_was_measured_before() -> None:
    joint = jghm.joint_table(jghm.Shape(), k_sample.KERNELS)
    assert joint.shape == (81, 81)
    assert joint.sum() == pytest.approx(1)
    assert float((joint * best_score(joint)).sum()) == pytest.approx(0.449368, abs=1e-6)


def test_leaves_follow_from_their_parents_in_every_tree() -> None:
    levels = jghm.kernels(jghm.Shape(states=2, depth=2, branching=2), np.random.RandomState(0))
    by_hand = np.zeros((2, 16))
    for root in range(2):
        for at, leaves in enumerate(np.ndindex(2, 2, 2, 2)):
            for one, other in np.ndindex(2, 2):
                by_hand[root, at] += (
                    levels[0][0][root, one]
                    * levels[0][1][root, other]
                    * np.prod([levels[1][child][one, leaves[child]] for child in (0, 1)])
                    * np.prod([levels[1][child][other, leaves[2 + child]] for child in (0, 1)])
                )
    np.testing.assert_allclose(jghm.leaf_table(levels), by_hand)


def test_nothing_is_missing_from_the_best_score_and_from_no_other() -> None:
    joint = jghm.joint_table(jghm.Shape(), k_sample.KERNELS)
    best = best_score(joint)
    assert k_sample.suff(joint, best + 3.0) == pytest.approx(0, abs=1e-12)
    assert k_sample.suff(joint, best + np.random.default_rng(0).normal(size=best.shape)) > 0.5
    # Of a score that knows nothing all is missing, in both directions.
    assert k_sample.suff(joint, np.zeros_like(best)) == pytest.approx(2 * 0.449368, abs=1e-5)


def test_few_negatives_under_report_and_many_do_not() -> None:
    def nothing() -> None: ...

    outcome = k_sample.run(Setting((0, 1), quick=True, step=nothing, check=nothing))
    ratios = {each.name: each.mean for each in outcome.findings if each.name.startswith("insufficiency")}
    falling = [ratios[f"insufficiency over excess risk, K = {size}"] for size in k_sample.SIZES]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > 2
    assert falling[-1] == pytest.approx(1, abs=0.25)
    assert outcome.findings[0].per_seed[0] < 1e-12
