"""Writing the answers of online operations: entry by entry, and large ones in a thread, so that others go on meanwhile.

The encoder of the standard library holds the interpreter until it is done, a second and more for thousands of vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final

import anyio.to_thread
from fastapi import Response

from service.contract.errors import Invalid
from service.deps import Service
from service.inference.inputs import Timings

LARGE: Final = 20_000
"""Values of an answer from which on writing it takes long enough for a thread: some 20 ms."""

MAX_MATCHES: Final = 1_000_000
"""Of an answer: items times top_k."""


def check_matches(num_items: int, top_k: int) -> None:
    """Raise Invalid for more matches than one answer holds."""
    if num_items * top_k > MAX_MATCHES:
        raise Invalid(f"items times top_k is at most {MAX_MATCHES:,}, not {num_items * top_k:,}", param="top_k")


async def respond(
    service: Service,
    entries: Callable[[], Iterable[dict[str, Any]]],
    rest: dict[str, Any],
    timings: Timings,
    *,
    num_values: int,
) -> Response:
    """Answer with the list of `entries` and the fields of `rest`; `num_values` says how much there is to write.

    Raises what `entries` raises.
    """

    def write() -> bytes:
        data = ",".join(map(_dump, entries()))
        return f'{{"object":"list","data":[{data}],{_dump(rest)[1:]}'.encode()

    large = num_values >= LARGE
    body = await anyio.to_thread.run_sync(write, limiter=service.token_threads) if large else write()
    response = Response(body, media_type="application/json")
    timings.write(response)
    return response


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
