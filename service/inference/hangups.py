"""Callers who hang up: what they asked for is dropped, so that no worker computes what nobody will read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from typing_extensions import override

from service.edge.bodies import read_strictly
from service.edge.problems import GONE

AFTER_S: Final = 0.2
"""Most answers are out by then, and listening costs a task."""

Handle = Callable[[Request], Coroutine[Any, Any, Response]]


@final
class InferenceRoute(APIRoute):
    """A route whose JSON body is read by `parse_json`, and whose work ends when its caller hangs up."""

    @override
    def get_route_handler(self) -> Handle:
        """Wrap the framework's handler."""
        handle = super().get_route_handler()

        async def handle_while_heard(request: Request) -> Response:
            return await _while_heard(await read_strictly(request), handle)

        return handle_while_heard


async def _while_heard(request: Request, handle: Handle) -> Response:
    task = asyncio.current_task()
    assert task is not None
    listening: list[asyncio.Task[None]] = []
    gone = False

    async def listen() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(AFTER_S, lambda: listening.append(asyncio.create_task(listen())))
    try:
        return await handle(request)
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        return Response(status_code=GONE)
    finally:
        timer.cancel()
        for each in listening:
            each.cancel()
