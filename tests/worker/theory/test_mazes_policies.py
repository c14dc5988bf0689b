from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from service.contract.errors import Cancelled
from worker.composition import estimators
from worker.learning import critics
from worker.theory import mazes_policies as policies
from worker.theory.mazes_ground import BLANK, ISLAND, STEP, draw_walks, state_actions

RIGHT, DOWN = 0, 2  # places in HEADINGS


def nothing() -> None:
    """Stop nothing."""


def agent(seed: int = 0, steps: int = 20) -> policies.Agent:
    walks = draw_walks(BLANK, 200, np.random.default_rng(seed), nothing)
    return policies.train(BLANK, walks, steps, seed, nothing)


def tasks(starts: list[list[float]], labels: list[int], shortest: list[float], steps: int) -> policies.Tasks:
    return policies.Tasks(np.array(starts), np.array(labels), np.array(shortest), np.zeros((steps, len(starts))))


def always(heading: int) -> policies.Policy:
    return lambda positions, _: np.full(len(positions), heading)


def test_success_weighted_by_path_length_is_as_it_is_defined() -> None:
    """Three episodes downwards: a short way, a way twice as long as it need be, and one that never comes there."""
    asked = tasks([[0.5, 0.5], [0.5, 1.5], [0.5, 2.5]], [2, 4, 19], [2.0, 2.0, 7.0], steps=10)
    done = policies.run(BLANK, asked, always(DOWN), nothing)
    assert done.reached.tolist() == [True, True, False]
    assert done.steps.tolist() == [3, 7, 10]  # a step is half a cell, and 2.0 is in row 2 already
    assert done.success == pytest.approx(2 / 3)
    assert done.spl(asked) == pytest.approx((1 + 2 / 3.5 + 0) / 3)
    assert np.allclose(done.paths[3, 0], [2.0, 0.5])
    assert np.allclose(done.paths[7:, 1], done.paths[7, 1]), "who has arrived stays"


def test_the_noise_turns_the_heading() -> None:
    asked = tasks([[5.5, 5.5]], [0], [5.0], steps=1)
    turned = policies.Tasks(asked.starts, asked.labels, asked.shortest, np.full((1, 1), math.pi / 2))
    assert np.allclose(policies.run(BLANK, turned, always(RIGHT), nothing).paths[-1], [[5.5 + STEP, 5.5]])


def test_tasks_are_never_done_at_the_start_and_always_can_be() -> None:
    drawn = policies.draw_tasks(ISLAND, 500, 7, np.random.default_rng(0), noise=0.3)
    assert not ISLAND.satisfies(drawn.starts, drawn.labels).any()
    assert ISLAND.is_free(drawn.starts).all()
    assert ((drawn.shortest >= 1) & (drawn.shortest < 25)).all()
    assert drawn.noise.shape == (7, 500)
    assert drawn.noise.std() == pytest.approx(0.3, rel=0.05)


def test_scores_are_the_estimators_of_composition_with_the_trained_scales() -> None:
    trained = agent()
    rng = np.random.default_rng(3)
    places, bridge = BLANK.draw_free(5, rng), BLANK.draw_free(40, rng)
    acting = state_actions(np.repeat(places, 8, 0), np.tile(policies.HEADINGS, 5))
    with torch.no_grad():
        z_a, z_b = (
            module(policies.inputs(BLANK, points))
            for module, points in ((trained.state_action, acting), (trained.state, bridge))
        )
        z_c = trained.label(torch.arange(20))
    by_hand = torch.logsumexp(
        (
            -trained.scales[0] * torch.cdist(z_a.double(), z_b.double())[:, :, None] ** 2 / 2
            - trained.scales[1] * torch.cdist(z_b.double(), z_c.double())[None] ** 2 / 2
        ),
        1,
    ) - math.log(40)
    assert torch.allclose(trained.scores(places, "marginal", bridge).flatten(0, 1), by_hand, atol=1e-4)
    direct = trained.scores(places, "direct", bridge)
    assert torch.allclose(direct.flatten(0, 1), -(torch.cdist(z_a, z_c) ** 2) / 2, atol=1e-4)
    assert not torch.allclose(
        trained.scores(places, "normalised", bridge), trained.scores(places, "marginal", bridge), atol=1e-2
    )
    assert policies.LOSS.critic == "squared_distance"
    assert estimators.direct("squared_distance", z_a, z_c).shape == critics.scores("squared_distance", z_a, z_c).shape


def test_a_policy_takes_the_best_heading_for_each_walkers_own_label() -> None:
    trained = agent()
    rng = np.random.default_rng(4)
    places, labels, bridge = BLANK.draw_free(9, rng), rng.integers(20, size=9), BLANK.draw_free(30, rng)
    chosen = trained.policy("marginal", bridge)(places, labels)
    for place, label, heading in zip(places, labels, chosen, strict=True):
        scores = trained.scores(place[None], "marginal", bridge)[0, :, label]
        assert heading == int(scores.argmax())


def test_training_learns_the_way_and_is_the_same_for_the_same_seed() -> None:
    first, again, other = agent(0), agent(0), agent(1)
    places = BLANK.draw_free(4, np.random.default_rng(5))
    scores = [each.scores(places, "marginal", places) for each in (first, again, other)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    assert all(not parameter.requires_grad for parameter in first.state.parameters())

    rng = np.random.default_rng(6)
    asked = policies.draw_tasks(BLANK, 100, 40, rng, noise=0.3)
    learned = policies.run(BLANK, asked, agent(0, 400).policy("marginal", BLANK.draw_free(200, rng)), nothing)
    lost = policies.run(BLANK, asked, policies.walk_at_random(rng), nothing)
    assert learned.success > lost.success + 0.2
    for is_asked in (asked.labels < 10, asked.labels >= 10):
        assert learned.reached[is_asked].mean() > lost.reached[is_asked].mean() + 0.1, "rows and columns"


def test_training_and_walking_can_be_stopped() -> None:
    def stop() -> None:
        raise Cancelled

    walks = draw_walks(BLANK, 10, np.random.default_rng(0), nothing)
    with pytest.raises(Cancelled):
        policies.train(BLANK, walks, 10, 0, stop)
    asked = policies.draw_tasks(BLANK, 5, 5, np.random.default_rng(0), noise=0.3)
    with pytest.raises(Cancelled):
        policies.run(BLANK, asked, always(RIGHT), stop)
