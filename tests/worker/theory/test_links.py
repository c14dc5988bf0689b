from __future__ import annotations

import numpy as np
import pytest
import torch

from service.contract.errors import Cancelled
from worker.theory import bridges, links


def _trained(seed: int, *, steps: int, dimensions: int = 8) -> tuple[bridges.Alphabets, links.Trained]:
    law = bridges.alphabets(0, (6, 8, 6))
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(seed)
    trained = links.train(
        [links.Pairs(("a", "b"), *law.draw_first(4000, rng)), links.Pairs(("b", "c"), *law.draw_second(4000, rng))],
        {name: links.table(size, dimensions, generator) for name, size in zip("abc", (6, 8, 6), strict=True)},
        links.Plan("dot", steps, dimensions, batch_size=128, learning_rate=0.1),
        seed,
        lambda: None,
    )
    return law, trained


def test_training_comes_to_the_log_ratio_and_is_the_same_for_the_same_seed() -> None:
    law, trained = _trained(0, steps=60)
    torch.manual_seed(5)  # the process's own generator plays no part
    _, again = _trained(0, steps=60)
    every = {name: torch.arange(size) for name, size in zip("abc", (6, 8, 6), strict=True)}
    scores = trained.link("a", "b").scores(trained.embed("a", every["a"]), trained.embed("b", every["b"]))
    assert torch.equal(scores, again.link("a", "b").scores(*(again.embed(name, every[name]) for name in "ab")))
    likely = (law.of_a[:, None] * law.of_b) * law.first_leg.exp() > 0.01
    found, wanted = scores[likely].double(), law.first_leg[likely]
    assert float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.9
    assert trained.scales[("a", "b")] != trained.scales[("b", "c")]


def test_what_is_trained_has_no_gradient_and_a_scale_can_be_put_in_its_place() -> None:
    _, trained = _trained(0, steps=10)
    assert not any(each.requires_grad for each in trained.modules.parameters())
    z_a, z_b = trained.embed("a", torch.arange(6)), trained.embed("b", torch.arange(8))
    plain = trained.link("a", "b", scale=1.0).scores(z_a, z_b)
    assert torch.allclose(plain * trained.scales["a", "b"], trained.link("a", "b").scores(z_a, z_b))


def test_cosine_models_start_from_their_usual_scale_and_embed_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    modules = {name: links.perceptron(3, 8, 4, generator) for name in "xy"}
    plan = links.Plan("cosine", 1, 4, batch_size=16)
    trained = links.train([links.Pairs(("x", "y"), x, x)], modules, plan, 0, lambda: None)
    assert trained.scales["x", "y"] == pytest.approx(1 / 0.07, rel=0.02)
    assert torch.allclose(trained.embed("x", x).norm(dim=1), torch.ones(64))
    one, many = trained.embed("x", x[:1]), trained.embed("x", x)
    assert torch.allclose(one, many[:1], atol=1e-6), "an item's vector does not depend on what it is encoded with"


def test_training_can_be_stopped() -> None:
    def stop() -> None:
        raise Cancelled

    generator = torch.Generator().manual_seed(0)
    x = torch.arange(4)
    with pytest.raises(Cancelled):
        links.train(
            [links.Pairs(("x", "y"), x, x)],
            {name: links.table(4, 2, generator) for name in "xy"},
            links.Plan("dot", 5, 2, batch_size=2),
            0,
            stop,
        )
