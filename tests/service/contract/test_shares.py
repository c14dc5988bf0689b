from __future__ import annotations

from typing import Any

import pytest

from service.contract import shares
from service.contract.errors import Invalid


def _set(world: Any, tenant: str, **share: Any) -> None:
    given: dict[str, Any] = {"lane": "bulk", "weight": 1, "max_running": None, "max_queued": None}
    shares.set_share(world.engine, tenant=tenant, **{**given, **share})


def test_a_share_is_set_and_shown_with_what_the_tenant_has(world: Any) -> None:
    world.worker()
    world.ingest("a")
    world.ingest("a")
    world.take()
    _set(world, "b", lane="train", weight=3, max_running=2, max_queued=7)
    found = {(share.tenant, share.lane): share for share in shares.shares(world.engine)}
    assert found["a", "bulk"] == shares.Share("a", "bulk", 1, None, None, running=1, waiting=1)
    assert found["b", "train"] == shares.Share("b", "train", 3, 2, 7, running=0, waiting=0)
    _set(world, "b", lane="train")
    assert tuple(
        next((s.tenant, s.lane, s.weight, s.max_running) for s in shares.shares(world.engine) if s.tenant == "b")
    ) == ("b", "train", 1, None)


def test_a_share_does_not_take_a_tenants_place_from_it(world: Any) -> None:
    world.worker()
    for _ in range(5):
        world.ingest("a")
    _set(world, "a", weight=2)
    world.ingest("b")
    assert [claim.tenant_id for claim in world.claim(limit=2)] == ["a", "b"]


@pytest.mark.parametrize("share", [{"weight": 0}, {"max_running": -1}, {"max_queued": 10**9}])
def test_a_number_out_of_range_is_refused_by_name(world: Any, share: dict[str, int]) -> None:
    with pytest.raises(Invalid, match=next(iter(share))):
        _set(world, "a", **share)
    assert shares.shares(world.engine) == []
