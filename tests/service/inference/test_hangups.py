from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract.dialects import now
from service.contract.host import boot_id
from service.contract.tables import worker
from service.edge.problems import GONE
from service.inference.hangups import AFTER_S

pytestmark = pytest.mark.anyio


async def test_what_a_caller_asked_for_is_dropped_when_they_hang_up(
    small: Any, publish_model: Any, tmp_path: Any
) -> None:
    small.add_model("model_a", publish_model(small.service.store, "models/model_a/1"))
    row = {"id": "w", "lanes": ["serve"], "kinds": [], "host": "h", "boot": boot_id(), "pid": 1, "version": "0"}
    with small.service.database.engine.begin() as conn:
        silent = f"unix:{tmp_path / 'nobody'}"
        conn.execute(sa.insert(worker).values(**row, endpoint=silent, last_seen=now()))
    gateway = small.service.gateway
    gateway._workers.look_again()
    await _until(gateway._workers.any_known)

    hung_up = asyncio.Event()
    body = json.dumps({"model": "model_a", "input": "a"}).encode()
    sent: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if sent:
            return sent.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    answers: list[Any] = []

    async def send(message: Any) -> None:
        answers.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/embeddings", "raw_path": b""}
    scope |= {"query_string": b"", "headers": headers, "root_path": "", "scheme": "http", "server": ("localhost", 80)}
    asked = asyncio.create_task(small.client._transport.app(scope, receive, send))
    await _until(gateway._line.all)
    await asyncio.sleep(2 * AFTER_S)
    assert gateway._line.all()
    hung_up.set()
    async with asyncio.timeout(5):  # its deadline is a minute
        await asked
    assert gateway._line.head() is None
    assert gateway._num_items == 0
    assert answers[0]["status"] == GONE


async def _until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not happen in time")
