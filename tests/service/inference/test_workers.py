from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from service.contract.dialects import after, now
from service.contract.tables import worker
from service.inference.workers import find_endpoints


def add(engine: sa.Engine, name: str, **values: Any) -> None:
    row = {
        "id": name,
        "lanes": ["serve"],
        "kinds": [],
        "host": "here",
        "boot": "this boot",
        "pid": 1,
        "endpoint": f"unix:/{name}",
        "version": "0",
        "last_seen": now(),
    }
    with engine.begin() as connection:
        connection.execute(sa.insert(worker).values(row | values))


def test_only_live_workers_that_serve_and_can_be_reached_are_found(engine: sa.Engine) -> None:
    add(engine, "here")
    add(engine, "over_tcp", endpoint="http://10.0.0.1:9000", boot="another")
    add(engine, "elsewhere", boot="another")
    add(engine, "draining", draining=True)
    add(engine, "silent", last_seen=after(sa.literal(-60.0, sa.Double)))
    add(engine, "trains", endpoint=None)
    found = find_endpoints(engine, ttl_s=20.0, boot="this boot")
    assert found == {"here": "unix:/here", "over_tcp": "http://10.0.0.1:9000"}


@pytest.mark.parametrize("ttl_s", [0.001, 120.0])
def test_the_database_clock_decides_who_is_alive(engine: sa.Engine, ttl_s: float) -> None:
    add(engine, "old", last_seen=after(sa.literal(-60.0, sa.Double)))
    assert bool(find_endpoints(engine, ttl_s=ttl_s, boot="this boot")) == (ttl_s > 60)
