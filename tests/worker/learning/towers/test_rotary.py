from __future__ import annotations

import torch

from worker.learning.towers.rotary import BASE, rotate, turn_of


def places(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_score_depends_on_the_distance_of_two_tokens_and_not_on_where_they_are() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    near = turn_of(places(0, 1, 2, 3, 4), 8)
    far = turn_of(places(1000, 1001, 1002, 1003, 1004), 8)
    scores = rotate(q, near) @ rotate(k, near).mT
    torch.testing.assert_close(rotate(q, far) @ rotate(k, far).mT, scores)
    assert not torch.allclose(scores, q @ k.mT)


def test_before_and_after_are_not_the_same() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)
    origin, ahead, behind = (turn_of(places(at), 8) for at in (0, 3, -3))
    scores = [float(rotate(q, origin) @ rotate(k, turn).mT) for turn in (ahead, behind)]
    assert abs(scores[0] - scores[1]) > 1e-3


def test_pairs_of_values_turn_as_complex_numbers_do() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 6, dtype=torch.float64)
    angles = places(0, 1, 2, 3)[:, None] * BASE ** (-torch.arange(3) * 2 / 6)
    expected = torch.complex(x[:, :3], x[:, 3:]) * torch.polar(torch.ones_like(angles), angles)
    turned = rotate(x, turn_of(places(0, 1, 2, 3), 6))
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], dim=1))
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))


def test_halves_are_turned_in_full_precision_and_come_back_as_halves() -> None:
    x = torch.randn(2000, 8, dtype=torch.bfloat16)
    turn = turn_of(torch.arange(2000, dtype=torch.float32), 8)
    assert rotate(x, turn).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, turn).float(), rotate(x.float(), turn), atol=0.02, rtol=0.01)
