from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from service.contract.errors import Invalid
from service.inference.answers import LARGE, check_matches, respond
from service.inference.inputs import Timings

pytestmark = pytest.mark.anyio


def rows(num: int, width: int) -> Iterator[dict[str, Any]]:
    yield from ({"index": at, "values": [0.1 + at] * width} for at in range(num))


@pytest.mark.parametrize("num_values", [1, LARGE])
async def test_an_answer_is_a_list_with_its_other_fields(shared: Any, num_values: int) -> None:
    rest = {"model": "ü", "usage": {"total_tokens": 3}}
    response = await respond(shared.service, lambda: rows(3, 2), rest, Timings(1.0), num_values=num_values)
    assert json.loads(bytes(response.body)) == {"object": "list", "data": list(rows(3, 2)), **rest}
    assert response.headers["x-tokenise-time"] == "1.00"


async def test_others_go_on_while_a_large_answer_is_written(shared: Any) -> None:
    longest, started = 0.0, time.perf_counter()
    writing = asyncio.create_task(
        respond(shared.service, lambda: rows(1000, 500), {"model": "m"}, Timings(), num_values=500_000)
    )
    while not writing.done():
        began = time.perf_counter()
        await asyncio.sleep(0)
        longest = max(longest, time.perf_counter() - began)
    assert len((await writing).body) > 1_000_000
    assert longest < (time.perf_counter() - started) / 3  # written in one piece it is nearly all of it


async def test_what_is_wrong_with_an_entry_is_raised(shared: Any) -> None:
    def entries() -> Iterator[dict[str, Any]]:
        raise Invalid("not so")
        yield {}

    with pytest.raises(Invalid, match="not so"):
        await respond(shared.service, entries, {}, Timings(), num_values=LARGE)


def test_an_answer_holds_a_million_matches_and_no_more() -> None:
    check_matches(1000, 1000)
    with pytest.raises(Invalid, match="1,001,000"):
        check_matches(1001, 1000)
