from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from service.contract.errors import Cancelled
from service.contract.losses import Square
from worker.learning import losses
from worker.theory import encoders, generators, measures


def _pairs(num: int = 500) -> tuple[generators.Generator, generators.Pairs]:
    generator = generators.case_study(0, own_norm=2.0, num_classes=6)
    return generator, generator.draw(num, np.random.default_rng(0))


def test_the_one_sided_weight_is_the_papers() -> None:
    """The paper: the sum of both directions - lambda * mean f(positives)."""
    z_x, z_y = (functional.normalize(torch.randn(8, 4, dtype=torch.float64), dim=1) for _ in range(2))
    ours = losses.compute(encoders.contrastive(0.2, "cosine", one_sided=0.7), z_x, z_y, torch.tensor(5.0))
    logits = z_x @ z_y.T / 0.2
    both = sum(functional.cross_entropy(each, torch.arange(8)) for each in (logits, logits.T))
    assert torch.allclose(2 * ours, both - 0.7 * (z_x * z_y).sum(1).mean())


def test_training_lowers_the_loss_and_is_the_same_for_the_same_seed() -> None:
    generator, pairs = _pairs()
    plan = encoders.Plan(encoders.contrastive(1.0, "dot"), steps=200, dimensions=8)
    torch.manual_seed(1)
    first = encoders.train(pairs, plan, 0, lambda: None)
    torch.manual_seed(2)  # the process's own generator plays no part
    again = encoders.train(pairs, plan, 0, lambda: None)
    other = encoders.train(pairs, plan, 1, lambda: None)
    scores = first.scores(pairs.x, pairs.y)
    assert torch.equal(scores, again.scores(pairs.x, pairs.y))
    assert not torch.equal(scores, other.scores(pairs.x, pairs.y))
    untrained = encoders.train(pairs, encoders.Plan(plan.loss, steps=1, dimensions=8), 0, lambda: None)
    sizes = 32
    assert measures.excess(generator, first, sizes, 0, num_pairs=640) < 0.5 * measures.excess(
        generator, untrained, sizes, 0, num_pairs=640
    )


def test_the_trained_square_loss_comes_to_its_exact_solution() -> None:
    _, pairs = _pairs(2000)
    exact = encoders.regress(pairs)
    trained = encoders.train(pairs, encoders.Plan(Square(critic="dot"), steps=1500), 0, lambda: None)

    def cost(each: encoders.Encoders) -> float:
        return float((each.g(pairs.x.float()) - pairs.y.float()).square().sum(1).mean())

    assert cost(exact) <= cost(trained) <= 1.02 * cost(exact)


def test_the_exact_solution_has_no_gradient() -> None:
    _, pairs = _pairs()
    solved = encoders.regress(pairs, ridge=0.0)
    residual = solved.g(pairs.x.float()).double() - pairs.y
    assert float((pairs.x.T @ residual / len(pairs.x)).abs().max()) < 1e-4


def test_training_can_be_stopped() -> None:
    _, pairs = _pairs()

    def stop() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        encoders.train(pairs, encoders.Plan(encoders.contrastive(1.0, "dot"), steps=10), 0, stop)
