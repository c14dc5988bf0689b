from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.composition.diagnostics import spearman
from worker.composition.estimators import as_log_shares, direct, marginal


def scores(sources: int, bridge: int, targets: int, size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    f_source = size * torch.randn(sources, bridge, generator=generator)
    return f_source, size * torch.randn(bridge, targets, generator=generator)


def unit(rows: int, dim: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_direct_is_the_cosine() -> None:
    a, b = unit(3, 5, 0), unit(4, 5, 1)
    torch.testing.assert_close(direct("cosine", a, b), functional.cosine_similarity(a[:, None], b[None], dim=2))


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_it_agrees_with_a_plain_loop(size: float, normalise: bool) -> None:
    """Also where the legs peak at different items, so that the products underflow even in double precision."""
    f_source, f_target = scores(5, 40, 7, size)
    found = marginal(f_source, f_target, normalise=normalise)
    u, v = f_source.double(), f_target.double()
    for a in range(5):
        for c in range(7):
            terms = u[a] + v[:, c]
            expected = torch.logsumexp(terms, 0) - math.log(40)
            if normalise:
                expected -= torch.logsumexp(u[a], 0) - math.log(40) + torch.logsumexp(v[:, c], 0) - math.log(40)
            weights = (terms - terms.max()).exp()
            size_of_sample = float(weights.sum() ** 2 / weights.square().sum())
            assert float(found.log_ratio[a, c]) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)
            assert float(found.effective_sample_size[a, c]) == pytest.approx(size_of_sample, rel=1e-9)
            change = weights / weights.sum() - 1 / 40
            if normalise:
                change = weights / weights.sum() - u[a].softmax(0) - v[:, c].softmax(0) + 1 / 40
            error = float(change.square().sum().sqrt())
            assert float(found.standard_error[a, c]) == pytest.approx(error, rel=1e-6, abs=1e-7)
            if not normalise:
                assert error == pytest.approx(math.sqrt(max(0.0, 1 / size_of_sample - 1 / 40)), abs=1e-7)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_exact_sum_over_a_discrete_bridge_is_the_exact_ratio(normalise: bool) -> None:
    """Lemma 1 of Che & Eysenbach 2025: with exact critics and each b as often as p(b) says it holds to rounding."""
    generator = torch.Generator().manual_seed(1)
    often = (torch.rand(60, generator=generator, dtype=torch.float64) ** 3 * 50).ceil()
    p_b = often / often.sum()
    a_given_b = torch.rand(40, 60, generator=generator, dtype=torch.float64)
    a_given_b /= a_given_b.sum(0)
    c_given_b = torch.rand(30, 60, generator=generator, dtype=torch.float64)
    c_given_b /= c_given_b.sum(0)
    p_a, p_c = a_given_b @ p_b, c_given_b @ p_b
    f_source = (a_given_b / p_a[:, None]).log()  # log p(a, b) / (p(a) p(b))
    f_target = (c_given_b / p_c[:, None]).log().T
    joint = (a_given_b * p_b) @ c_given_b.T
    exact = (joint / (p_a[:, None] * p_c)).log()
    bank = torch.repeat_interleave(torch.arange(60), often.long())
    found = marginal(f_source[:, bank], f_target[bank], normalise=normalise)
    assert float((found.log_ratio - exact).abs().max()) <= 1e-10


@pytest.mark.parametrize(
    ("dim", "scale", "cosine", "expected"),
    [(6, 1.0, 0.5, 0.242669), (6, 1.0, -0.5, 0.082484), (3, 1.0, 0.5, 0.457796), (16, 5.0, 0.0, 1.449217)],
)
def test_over_a_uniform_bridge_it_reaches_the_closed_form(
    dim: int, scale: float, cosine: float, expected: float
) -> None:
    """Lemma 2: log Gamma(d/2) (2/k)^(d/2-1) I_(d/2-1)(k), k = scale * sqrt(2 + 2 cosine)."""
    bridge = unit(200_000, dim, 2)
    source, target = torch.zeros(1, dim), torch.zeros(1, dim)
    source[0, 0] = 1.0
    target[0, 0], target[0, 1] = cosine, math.sqrt(1 - cosine**2)
    found = marginal(scale * source @ bridge.T, scale * bridge @ target.T, normalise=False)
    assert float(found.log_ratio) == pytest.approx(expected, abs=4 * float(found.standard_error))
    assert float(found.log_ratio) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_offsets_of_ten_thousand_change_nothing_but_themselves(shift: float) -> None:
    f_source, f_target = (f.double() for f in scores(4, 50, 6, 3.0))
    plain = marginal(f_source, f_target, normalise=False)
    shifted = marginal(f_source + shift, f_target - shift / 2, normalise=False)
    torch.testing.assert_close(shifted.log_ratio, plain.log_ratio + shift / 2, atol=1e-8, rtol=0)
    torch.testing.assert_close(shifted.effective_sample_size, plain.effective_sample_size)


def test_normalising_removes_the_offset_of_every_row_and_column() -> None:
    f_source, f_target = (f.double() for f in scores(4, 50, 6, 2.0))
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(4, 1, generator=generator, dtype=torch.float64) * 100
    columns = torch.randn(1, 6, generator=generator, dtype=torch.float64) * 100
    plain = marginal(f_source, f_target, normalise=True)
    moved = marginal(f_source + rows, f_target + columns, normalise=True)
    torch.testing.assert_close(moved.log_ratio, plain.log_ratio, atol=1e-9, rtol=0)


def test_the_order_of_the_bridge_does_not_matter_as_long_as_it_is_one_order() -> None:
    f_source, f_target = scores(4, 50, 6, 2.0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    plain = marginal(f_source, f_target, normalise=True)
    moved = marginal(f_source[:, order], f_target[order], normalise=True)
    torch.testing.assert_close(moved.log_ratio, plain.log_ratio)
    crossed = marginal(f_source[:, order], f_target, normalise=True)
    assert float((crossed.log_ratio - plain.log_ratio).abs().max()) > 0.1


@pytest.mark.parametrize("size", [0.0, 1.0, 10.0, 1000.0])
def test_the_effective_sample_size_lies_between_one_and_all(size: float) -> None:
    found = marginal(*scores(6, 64, 6, size), normalise=True)
    assert float(found.effective_sample_size.min()) >= 1.0
    assert float(found.effective_sample_size.max()) <= 64.0
    assert bool(torch.isfinite(found.log_ratio).all())
    if size == 0.0:
        torch.testing.assert_close(found.effective_sample_size, torch.full((6, 6), 64.0, dtype=torch.float64))
        assert float(found.standard_error.max()) < 1e-7


def test_values_are_trusted_only_where_many_bridge_items_carry_them() -> None:
    assert bool(marginal(*scores(6, 4096, 6, 0.5), normalise=True).trusted.all())
    assert not bool(marginal(*scores(6, 4096, 6, 20.0), normalise=True).trusted.any())


def test_the_standard_error_covers_the_draw_of_the_bridge() -> None:
    """Two standard errors hold the truth (one huge bridge) for most of many small bridges."""
    source, target = unit(1, 4, 5), unit(1, 4, 6)
    everything = unit(200_000, 4, 7)
    truth = marginal(2 * source @ everything.T, 2 * everything @ target.T, normalise=False).log_ratio
    covered = 0
    for part in everything.split(1000):
        found = marginal(2 * source @ part.T, 2 * part @ target.T, normalise=False)
        covered += bool((found.log_ratio - truth).abs() <= 2 * found.standard_error)
    assert covered / 200 >= 0.9


def test_leaving_out_the_scale_spoils_the_order() -> None:
    """The bug of the published code: without the trained scale, the sum flattens to the mean of the bridge."""
    generator = torch.Generator().manual_seed(8)
    b = functional.normalize(torch.randn(2000, 8, generator=generator) + 1, dim=1)  # a concentrated bridge
    source = functional.normalize(b[:32] + 0.05 * torch.randn(32, 8, generator=generator), dim=1)
    target = functional.normalize(b[:32] + 0.05 * torch.randn(32, 8, generator=generator), dim=1)
    bridge = b[32:]

    def recall(scale: float) -> float:
        ratio = marginal(scale * source @ bridge.T, scale * bridge @ target.T, normalise=False).log_ratio
        return float((ratio.argmax(1) == torch.arange(32)).double().mean())

    assert recall(40.0) >= recall(1.0) + 0.5


def test_over_a_concentrated_bridge_it_ranks_better_than_comparing_vectors() -> None:
    """Papers' acceptance: against a large bridge as truth, marginal >= .98 where direct is <= .8."""
    generator = torch.Generator().manual_seed(9)
    centres = functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
    bridge = centres[torch.randint(3, (42_000,), generator=generator)] * 8
    bridge = functional.normalize(bridge + torch.randn(42_000, 8, generator=generator), dim=1)
    source, target = unit(20, 8, 10), unit(200, 8, 11)

    def over(b: Tensor) -> Tensor:
        return marginal(4 * source @ b.T, 4 * b @ target.T, normalise=False).log_ratio

    truth = over(bridge[2000:])
    assert float(spearman(over(bridge[:2000]), truth).mean()) >= 0.98
    assert float(spearman(direct("cosine", source, target), truth).mean()) <= 0.8


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_weights_count_an_item_as_often_as_it_would_have_been_drawn(precise: bool, normalise: bool) -> None:
    """Whole weights are repetitions, weights of zero are absences, and a factor of all of them is nothing."""
    f_source, f_target = scores(4, 30, 6, 2.0)
    often = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(1))
    drawn = torch.repeat_interleave(torch.arange(30), often)
    weighed = marginal(f_source, f_target, normalise=normalise, weights=0.37 * often, precise=precise)
    repeated = marginal(f_source[:, drawn], f_target[drawn], normalise=normalise)
    torch.testing.assert_close(weighed.log_ratio, repeated.log_ratio, atol=1e-5, rtol=0)


def test_weights_recover_from_a_tilted_bridge_what_an_even_one_gives() -> None:
    """The items are drawn from q(b), as a list of captions may be; p / q puts them right, and the error covers it."""
    generator = torch.Generator().manual_seed(2)
    source, target = 2 * unit(5, 4, 5), unit(6, 4, 6)
    truth = marginal(source @ (b := unit(200_000, 4, 7)).T, 2 * b @ target.T, normalise=True, precise=False).log_ratio
    covered: list[Tensor] = []
    off: list[Tensor] = []
    for seed in range(20):
        even = unit(4000, 4, 100 + seed)
        tilt = (1.5 * even[:, 0]).exp()  # q / p, but for a factor
        bridge = even[torch.rand(4000, generator=generator) < tilt / tilt.max()]
        f_source, f_target = source @ bridge.T, 2 * bridge @ target.T
        found = marginal(f_source, f_target, normalise=True, weights=(-1.5 * bridge[:, 0]).exp())
        covered.append((found.log_ratio - truth).abs() <= 2 * found.standard_error)
        off.append(marginal(f_source, f_target, normalise=True).log_ratio - truth)
    assert float(torch.stack(covered).double().mean()) >= 0.9
    assert float(torch.stack(off).mean(0).abs().max()) >= 0.15


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 3"),
        ([1.0, -1.0, 1.0], "not negative"),
        ([0.0] * 3, "above zero"),
        ([1, 1, math.nan], "finite"),
    ],
)
def test_weights_that_are_none_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_log_shares(3, torch.tensor(weights))


@pytest.mark.parametrize("size", [0.1, 3.0, 40.0, 300.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_single_precision_gives_the_same_answer(size: float, normalise: bool) -> None:
    """Underflow included: what float32 cannot hold is summed in float64."""
    exact = marginal(*scores(6, 50, 5, size), normalise=normalise)
    quick = marginal(*scores(6, 50, 5, size), normalise=normalise, precise=False)
    torch.testing.assert_close(quick.log_ratio, exact.log_ratio, atol=1e-5 * max(1.0, size), rtol=0)
    torch.testing.assert_close(quick.effective_sample_size, exact.effective_sample_size, rtol=1e-3, atol=0)
    torch.testing.assert_close(quick.standard_error, exact.standard_error, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(quick.bias, exact.bias, rtol=1e-3, atol=1e-3)


def gaussian_question(dim: int, noise: float, num_bridge: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact scores for b ~ N(0, 1), a and c = b + noise: with sources and targets of 20 draws, and the exact answer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64)

    b = draw(20)
    a, c, bridge = b + noise * draw(20), b + noise * draw(20), draw(num_bridge)
    square = noise**2
    posterior, marginal_variance = square / (1 + square), 1 + square

    def f(x: Tensor) -> Tensor:
        """Return log p(b | x) - log p(b)."""
        apart = torch.cdist(x / marginal_variance, bridge).square()
        return -apart / posterior / 2 - dim * math.log(posterior) / 2 + bridge.square().sum(1) / 2

    variance = posterior + square
    exact = -torch.cdist(a / marginal_variance, c).square() / variance / 2 - dim * math.log(variance) / 2
    exact += c.square().sum(1) / marginal_variance / 2 + dim * math.log(marginal_variance) / 2
    return f(a), f(c).T, exact


@pytest.mark.parametrize(("dim", "noise", "num"), [(2, 1.0, 1000), (4, 1.0, 2000), (8, 2.0, 2000)])
@pytest.mark.parametrize("normalise", [False, True])
def test_two_standard_errors_cover_the_exact_answer_where_the_sum_is_healthy(
    dim: int, noise: float, num: int, normalise: bool
) -> None:
    """Acceptance: at a median sample size of 30 and more, coverage at least .80 and errors of at most .25 nats."""
    covered: list[Tensor] = []
    squares: list[Tensor] = []
    for seed in range(20):
        f_source, f_target, exact = gaussian_question(dim, noise, num, seed)
        found = marginal(f_source, f_target, normalise=normalise)
        assert bool(found.trusted.any())
        error = found.log_ratio - exact
        covered.append(error.abs() <= 2 * found.standard_error)
        squares.append(error.square())
    assert float(torch.stack(covered).double().mean()) >= 0.88
    assert float(torch.stack(squares).mean().sqrt()) <= 0.25


@pytest.mark.parametrize(("dim", "noise"), [(16, 1.0), (16, 0.5)])
def test_on_a_hard_bridge_the_values_are_not_trusted(dim: int, noise: float) -> None:
    """Where every draw misses the items that matter, the sum is nats too low, and it says so."""
    f_source, f_target, exact = gaussian_question(dim, noise, 5000, 0)
    found = marginal(f_source, f_target, normalise=True)
    assert not bool(found.trusted.any())
    assert float((found.log_ratio - exact).diagonal().mean()) < -0.5


def test_the_bias_is_what_the_sum_is_off_by_on_average() -> None:
    """Of the second order: told, it halves what is left at least."""
    left: list[Tensor] = []
    told: list[Tensor] = []
    for seed in range(300):
        f_source, f_target, exact = gaussian_question(2, 0.7, 60, seed)
        found = marginal(f_source[:3], f_target[:, :3], normalise=False)
        left.append(found.log_ratio - exact[:3, :3])
        told.append(found.bias)
    assert float(torch.stack(left).mean()) < -0.05
    assert float(torch.stack(told).mean()) == pytest.approx(float(torch.stack(left).mean()), rel=0.5)


def test_one_bridge_item_has_an_answer_and_no_claim() -> None:
    found = marginal(torch.tensor([[3.0]]), torch.tensor([[2.0, -1.0]]), normalise=False)
    assert found.log_ratio.tolist() == [[5.0, 2.0]]
    assert found.effective_sample_size.tolist() == [[1.0, 1.0]]
    assert not bool(found.trusted.any())
