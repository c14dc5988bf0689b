from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from service.contract.wire import unpack
from service.inference.line import CALL_COST, Line, Request, write


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


def request(loop: asyncio.AbstractEventLoop, lengths: list[int], group: str = "a", **values: Any) -> Request:
    items = [[np.arange(length, dtype=np.int32)] for length in lengths]
    done = loop.create_future()
    return Request((group,), "model", {"op": "embed"}, items, {}, deadline=1e9, done=done, **values)


def test_small_requests_of_one_group_leave_together(loop: asyncio.AbstractEventLoop) -> None:
    line = Line()
    requests = [request(loop, [5, 6]) for _ in range(10)]
    for each in requests:
        line.add(each)
    assert line.take() == [(each, (0, 2)) for each in requests]
    assert line.take() == []


def test_a_request_larger_than_a_call_lets_others_go_before_its_rest(loop: asyncio.AbstractEventLoop) -> None:
    line = Line()
    big, small = request(loop, [CALL_COST // 2 + 1] * 4), request(loop, [3])
    line.add(big)
    line.add(small)
    assert line.take() == [(big, (0, 1)), (small, (0, 1))]
    assert line.take() == [(big, (1, 2))]
    small = request(loop, [CALL_COST])
    line.add(small)
    assert [part for each, part in line.take() if each is big] == [(2, 3)]
    assert line.take() == [(small, (0, 1))]
    assert line.take() == [(big, (3, 4))]


def test_groups_take_turns(loop: asyncio.AbstractEventLoop) -> None:
    line = Line()
    images, text = request(loop, [CALL_COST] * 3, "images"), request(loop, [3], "text")
    line.add(images)
    line.add(text)
    assert [parts[0][0] for parts in (line.take(), line.take(), line.take())] == [images, text, images]


def test_bytes_count_where_tokens_are_few(loop: asyncio.AbstractEventLoop) -> None:
    patches = [np.zeros((49, 3072), np.uint8)]
    done = loop.create_future()
    wide = Request(("a",), "model", {}, [patches] * 500, {}, deadline=1e9, done=done)
    line = Line()
    line.add(wide)
    ((_, (begin, end)),) = line.take()
    assert (end - begin) * 49 * 3 <= CALL_COST
    assert end > begin


def test_what_was_not_answered_goes_first_again(loop: asyncio.AbstractEventLoop) -> None:
    line = Line()
    first, second = request(loop, [3, 3]), request(loop, [4], "b")
    line.add(first)
    line.add(second)
    ((taken, part),) = line.take()
    line.put_back(taken, part)
    assert line.take() == [(first, (0, 2))]
    assert line.take() == [(second, (0, 1))]


def test_a_request_that_failed_once_shares_no_call(loop: asyncio.AbstractEventLoop) -> None:
    line = Line()
    requests = [request(loop, [1], is_alone=at == 1) for at in range(4)]
    for each in requests:
        line.add(each)
    assert [[each for each, _ in line.take()] for _ in range(3)] == [
        [requests[0], requests[2], requests[3]],
        [requests[1]],
        [],
    ]


def test_requests_that_nobody_waits_for_are_dropped(loop: asyncio.AbstractEventLoop) -> None:
    line = Line()
    gone, wanted = request(loop, [1]), request(loop, [1])
    line.add(gone)
    line.add(wanted)
    gone.done.cancel()
    assert line.head() is wanted
    assert line.take() == [(wanted, (0, 1))]
    assert line.head() is None


def test_the_body_of_a_call_lays_items_end_to_end(loop: asyncio.AbstractEventLoop) -> None:
    left, right = request(loop, [2, 3]), request(loop, [1])
    right.items[0] = [np.array([7], np.int32), np.array([8, 9], np.int32)]
    document, arrays = unpack(write([(left, (1, 2)), (right, (0, 1))]))
    assert document == {"op": "embed"}
    assert arrays["values"].tolist() == [0, 1, 2, 7, 8, 9]
    assert arrays["lengths"].tolist() == [3, 1, 2]
    assert arrays["owners"].tolist() == [0, 1, 1]


def test_a_request_ends_with_its_last_answer(loop: asyncio.AbstractEventLoop) -> None:
    each = request(loop, [1, 1, 1])
    each.take((2, 3), {}, {})
    assert each.is_open
    each.take((0, 2), {}, {})
    assert not each.is_open
