from __future__ import annotations

import torch

from worker.learning.towers.pooling import AttentionPool


def pool() -> AttentionPool:
    torch.manual_seed(0)
    return AttentionPool(8, 2)


def test_it_starts_as_the_mean_of_the_values() -> None:
    attention, x = pool(), torch.randn(3, 5, 8)
    values = attention.key_value(x)[..., 8:]
    torch.testing.assert_close(attention(x, None), values.mean(1))


@torch.no_grad()
def test_it_looks_at_what_its_query_asks_for_head_by_head() -> None:
    attention, x = pool(), torch.randn(1, 5, 8)
    keys, values = attention.key_value(x)[0].split(8, dim=1)
    attention.query[:4] = 1e4 * (keys[2, :4] - keys[:, :4].mean(0))  # the first head points where token 2 stands out
    wanted = int((keys[:, :4] @ attention.query[:4]).argmax())
    torch.testing.assert_close(attention(x, None)[0, :4], values[wanted, :4])
    torch.testing.assert_close(attention(x, None)[0, 4:], values[:, 4:].mean(0))


@torch.no_grad()
def test_what_is_masked_has_no_part_in_it() -> None:
    attention, x = pool(), torch.randn(2, 5, 8)
    attention.query.normal_()
    allowed = (torch.arange(5) < torch.tensor([[5], [3]]))[:, None, None]
    pooled = attention(x, allowed)
    torch.testing.assert_close(pooled[1], attention(x[1:, :3], None)[0])
    x[1, 3:] = 1e3
    assert torch.equal(attention(x, allowed), pooled)
