"""Bodies that stop coming: a caller who falls silent in the middle of a request is not waited for."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive


def unless_stalled(receive: Receive, timeout_s: float) -> Receive:
    """Bound the time in which the next piece of a body comes, and no other wait.

    What is returned raises HTTPException 408.
    """
    ended = False

    async def receive_in_time() -> Message:
        nonlocal ended
        if ended:
            return await receive()  # that the caller hangs up, whenever that may be
        try:
            async with asyncio.timeout(timeout_s):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, headers={"connection": "close"}) from None
        ended = not message.get("more_body", False)
        return message

    return receive_in_time
