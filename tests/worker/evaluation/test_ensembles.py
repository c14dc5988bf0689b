from __future__ import annotations

import math

import pytest
import torch

from worker.evaluation import ensembles


def test_the_mean_of_exponentials_is_taken_label_by_label_however_large_they_are() -> None:
    f = torch.tensor([[1.0, 2.0, 800.0, 900.0, 3.0], [0.0, 0.0, -900.0, -900.0, -2.0]])
    owners = torch.tensor([0, 0, 1, 1, 2])
    found = ensembles.log_evidence(f, owners, 3)
    assert found[0].tolist() == pytest.approx([math.log((math.e + math.e**2) / 2), 900 - math.log(2), 3])
    assert found[1].tolist() == pytest.approx([0, -900, -2])


def test_all_prompts_of_an_order_are_the_whole_ensemble() -> None:
    f = 10 * torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    owners = torch.arange(3).repeat_interleave(4)
    order = ensembles.draw_order(owners, 3, seed=5)
    assert [sorted(row) for row in order.tolist()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    found = ensembles.by_num_prompts(f, order, [1, 3, 4])
    torch.testing.assert_close(found[2], ensembles.log_evidence(f, owners, 3))
    torch.testing.assert_close(found[0], f.double()[:, order[:, 0]])


@pytest.mark.parametrize(
    ("largest", "steps"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (50, [1, 2, 5, 10, 20, 50]), (7, [1, 2, 5, 7])]
)
def test_steps_end_with_all_there_are(largest: int, steps: list[int]) -> None:
    assert ensembles.steps_to(largest) == steps


def test_the_fit_recovers_a_and_b_and_says_how_well() -> None:
    nums = [1, 2, 5, 10, 20, 50, 100]
    generator = torch.Generator().manual_seed(0)
    law = torch.tensor([0.4 + 1.3 / num for num in nums], dtype=torch.float64)
    law[:2] += 3  # where the law does not hold yet
    by_item = law[:, None] + 0.5 * torch.randn(1, 400, generator=generator, dtype=torch.float64)
    by_item -= by_item.mean(1, keepdim=True) - law[:, None]
    found = ensembles.fit(nums, by_item, by_item.mean(1).expand(10, -1))
    assert found is not None
    assert found.num_prompts == [5, 10, 20, 50, 100]
    assert (found.a.value, found.b.value, found.r_squared) == pytest.approx((0.4, 1.3, 1.0))
    assert found.a.standard_error == pytest.approx(0.5 / 20, rel=0.1)  # the noise is the same for every M
    assert found.b.standard_error == pytest.approx(0, abs=1e-9)


def test_the_error_of_a_fit_is_the_spread_of_fits() -> None:
    nums = [5, 10, 20, 50]
    generator = torch.Generator().manual_seed(1)
    values: list[float] = []
    errors: list[float] = []
    for _ in range(200):
        by_item = torch.tensor([1 + 2 / num for num in nums], dtype=torch.float64)[:, None] + torch.randn(
            4, 50, generator=generator, dtype=torch.float64
        )
        found = ensembles.fit(nums, by_item, by_item.mean(1).expand(4, -1))
        assert found is not None
        assert found.a.standard_error is not None
        values.append(found.a.value)
        errors.append(found.a.standard_error)
    assert sum(errors) / len(errors) == pytest.approx(float(torch.tensor(values).std()), rel=0.15)


def test_few_steps_are_all_fitted_and_two_are_not() -> None:
    flat = torch.ones(3, 4, dtype=torch.float64)
    found = ensembles.fit([1, 2, 5], flat, torch.ones(10, 3, dtype=torch.float64))
    assert found is not None
    assert found.num_prompts == [1, 2, 5]
    assert (found.a.value, found.b.value, found.r_squared) == (pytest.approx(1), pytest.approx(0, abs=1e-9), None)
    assert ensembles.fit([1, 2], flat[:2], torch.ones(10, 2, dtype=torch.float64)) is None
