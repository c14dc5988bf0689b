from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from worker.learning.grouping import CPU_TOKENS, CUDA_TOKENS, LEAST_SHARE, Lengths, padded_tokens, plan
from worker.learning.ragged import Ragged


def lengths(values: list[int], owners: list[int] | None = None) -> Lengths:
    ids = torch.zeros(sum(values), dtype=torch.int64)
    return Lengths(Ragged(ids, torch.tensor(values), None if owners is None else torch.tensor(owners)))


def captions(num: int, longest: int) -> list[int]:
    """Many short ones and a few long ones."""
    drawn = np.random.default_rng(0).geometric(0.08, num)
    return np.minimum(drawn + 2, longest).tolist()


@pytest.mark.parametrize("values", [[7] * 4000, [60, 64] * 2000, captions(64, 64), [3]])
def test_equal_nearly_equal_and_few_sequences_are_encoded_as_they_are(values: list[int]) -> None:
    assert plan(lengths(values), None) == []
    assert plan(lengths(values), len(values)) == []


def test_uneven_sequences_are_grouped_where_that_saves_more_than_the_calls_cost() -> None:
    values = captions(4096, 256)
    found = lengths(values)
    parts = plan(found, None)
    assert 2 <= len(parts) <= 8
    assert sorted(torch.cat(parts).tolist()) == list(range(4096))
    whole = len(values) * max(values)
    saved = whole - padded_tokens(found, parts)
    assert saved >= LEAST_SHARE * whole
    assert saved >= CPU_TOKENS * (len(parts) - 1)
    assert padded_tokens(found, []) == whole
    assert len(plan(found, None, CUDA_TOKENS)) < len(parts)
    assert max(values[at] for at in parts[0]) <= min(values[at] for at in parts[1])


def test_no_cut_into_two_at_the_same_places_is_cheaper() -> None:
    values = captions(4096, 256)
    found = lengths(values)
    cost = padded_tokens(found, plan(found, None)) + CPU_TOKENS * len(plan(found, None))
    order = np.argsort(values, kind="stable")
    for place in range(128, 4096, 128):
        two = [torch.from_numpy(order[:place]), torch.from_numpy(order[place:])]
        assert cost <= padded_tokens(found, two) + CPU_TOKENS * 2


def test_micro_batches_hold_no_more_than_asked_and_are_sorted_only_where_that_pays() -> None:
    for values, is_sorted in ((captions(500, 64), True), ([9] * 500, False)):
        parts = plan(lengths(values), 64)
        assert [len(part) for part in parts] == [64] * 7 + [52]
        everything = torch.cat(parts).tolist()
        assert sorted(everything) == list(range(500))
        assert (everything != list(range(500))) == is_sorted
        if is_sorted:
            assert all(values[one] <= values[other] for one, other in pairwise(everything))


def test_an_item_of_several_sequences_counts_with_its_longest() -> None:
    found = lengths([2, 9, 4, 1, 1], owners=[0, 0, 1, 2, 2])
    assert found.counts.tolist() == [2, 1, 2]
    assert found.longest.tolist() == [9, 4, 1]
    assert found.num_tokens == 17
    assert padded_tokens(found, []) == 5 * 9
    assert padded_tokens(found, [torch.tensor([2, 1]), torch.tensor([0])]) == 3 * 4 + 2 * 9


def test_a_plan_follows_from_the_lengths_alone() -> None:
    values = captions(3000, 128)
    first, again = plan(lengths(values), None), plan(lengths(values), None)
    assert len(first) > 1
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert first[0].dtype == torch.int64
