from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.contract.errors import Invalid, IsthmusError, Unavailable
from worker.serving.batcher import Batcher, Entry, Ticket

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """Something to run, which remembers its batches and waits while it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.go = threading.Event()
        self.go.set()

    def run(self, items: list[Any]) -> Sequence[Any]:
        self.go.wait(10)
        self.batches.append(items)
        if any(isinstance(item, Exception) for item in items):
            raise next(item for item in items if isinstance(item, Exception))
        return [f"<{item}>" for item in items]


@asynccontextmanager
async def batching(max_tokens: int = 1000, max_waiting: int = 1000, step_s: float = 1e9) -> AsyncGenerator[Batcher]:
    # An endless step by default: the budget is then max_tokens, however fast this machine is.
    batcher = Batcher(max_tokens=max_tokens, max_waiting=max_waiting, step_s=step_s)
    batcher.start()
    try:
        yield batcher
    finally:
        batcher.stop()


def ticket(engine: Engine, items: Sequence[Any], group: str = "a", length: int = 10, timeout_s: float = 10.0) -> Ticket:
    entries = [Entry(item, length) for item in items]
    return Ticket(group=group, pace=group, run=engine.run, entries=entries, deadline=time.monotonic() + timeout_s)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it never came to be")


async def held(batcher: Batcher, engine: Engine, group: asyncio.TaskGroup) -> None:
    """Let the engine start on something and hold it there."""
    engine.go.clear()
    group.create_task(batcher.submit(ticket(engine, ["first"], "held")))
    await until(lambda: batcher.stats.tickets > 0 and batcher.num_waiting == 0)


async def test_what_waits_leaves_together_as_soon_as_the_engine_is_free() -> None:
    engine = Engine()
    async with batching() as batcher, asyncio.TaskGroup() as group:
        await held(batcher, engine, group)
        tasks = [group.create_task(batcher.submit(ticket(engine, [at, at + 100]))) for at in range(5)]
        await asyncio.sleep(0)
        engine.go.set()
        assert [await task for task in tasks] == [[f"<{at}>", f"<{at + 100}>"] for at in range(5)]
    assert [len(batch) for batch in engine.batches] == [1, 10]


async def test_groups_take_turns() -> None:
    engine = Engine()
    async with batching(max_tokens=256) as batcher, asyncio.TaskGroup() as group:
        await held(batcher, engine, group)
        group.create_task(batcher.submit(ticket(engine, ["big"] * 100, "a")))
        await asyncio.sleep(0)
        group.create_task(batcher.submit(ticket(engine, ["small"], "b")))
        await asyncio.sleep(0)
        engine.go.set()
    assert [batch[0] for batch in engine.batches[:4]] == ["first", "big", "small", "big"]


async def test_calls_of_one_group_take_turns() -> None:
    engine = Engine()
    async with batching(max_tokens=256) as batcher, asyncio.TaskGroup() as group:
        await held(batcher, engine, group)
        group.create_task(batcher.submit(ticket(engine, ["big"] * 100)))
        await asyncio.sleep(0)
        group.create_task(batcher.submit(ticket(engine, ["small"])))
        await asyncio.sleep(0)
        engine.go.set()
    assert "small" not in engine.batches[1]
    assert "small" in engine.batches[2]


async def test_a_batch_stays_within_its_padded_tokens() -> None:
    engine = Engine()
    async with batching(max_tokens=300) as batcher:
        entries = [Entry(length, length) for length in (100, 1, 99, 2, 98, 3, 97)]
        call = Ticket("a", "a", engine.run, entries, time.monotonic() + 10)
        assert await batcher.submit(call) == ["<100>", "<1>", "<99>", "<2>", "<98>", "<3>", "<97>"]
    assert all(len(batch) * max(batch) <= 300 for batch in engine.batches)
    # In order of length: what shares a batch is alike.
    assert [item for batch in engine.batches for item in batch] == [1, 2, 3, 97, 98, 99, 100]


async def test_an_item_larger_than_a_batch_goes_alone() -> None:
    engine = Engine()
    async with batching(max_tokens=300) as batcher:
        assert await batcher.submit(ticket(engine, ["huge"], length=10_000)) == ["<huge>"]


async def test_steps_grow_as_short_as_the_engine_is_slow() -> None:
    engine = Engine()

    def slowly(items: list[Any]) -> Sequence[Any]:
        time.sleep(0.001 * len(items))  # 10,000 tokens a second
        return engine.run(items)

    async with batching(max_tokens=100_000, step_s=0.05) as batcher:
        call = ticket(engine, range(400))
        call.run = slowly
        await batcher.submit(call)
        call = ticket(engine, range(400))
        call.run = slowly
        await batcher.submit(call)
    # A step of 50 ms holds 50 items; the first one could not know.
    assert max(len(batch) for batch in engine.batches[2:]) <= 60


@pytest.mark.parametrize("bad", [RuntimeError("broken"), ValueError("odd"), MemoryError(), Invalid("no", code="mine")])
async def test_only_the_bad_item_fails_and_the_thread_goes_on(bad: Exception) -> None:
    engine = Engine()
    async with batching() as batcher, asyncio.TaskGroup() as group:
        await held(batcher, engine, group)
        good = [group.create_task(batcher.submit(ticket(engine, [at] * 5))) for at in range(8)]
        failing = asyncio.gather(batcher.submit(ticket(engine, ["x", "y", bad, "z"])), return_exceptions=True)
        await asyncio.sleep(0)
        engine.go.set()
        (error,) = await failing
        assert isinstance(error, Invalid)
        assert error.item == 2
        assert error.code == ("mine" if isinstance(bad, IsthmusError) else "item_failed")
        assert [await task for task in good] == [[f"<{at}>"] * 5 for at in range(8)]
        assert await batcher.submit(ticket(engine, ["after"])) == ["<after>"]
        assert batcher.alive()
    assert batcher.stats.failed == 1


async def test_items_of_an_abandoned_call_are_never_started() -> None:
    engine = Engine()
    async with batching() as batcher, asyncio.TaskGroup() as group:
        await held(batcher, engine, group)
        given_up = group.create_task(batcher.submit(ticket(engine, ["given up"])))
        await asyncio.sleep(0)
        given_up.cancel()
        late = asyncio.gather(batcher.submit(ticket(engine, ["late"], timeout_s=0.01)), return_exceptions=True)
        (error,) = await late
        assert isinstance(error, Unavailable)
        assert error.code == "deadline"
        engine.go.set()
        assert await batcher.submit(ticket(engine, ["wanted"])) == ["<wanted>"]
    assert engine.batches == [["first"], ["wanted"]]
    assert batcher.stats.dropped == 2
    assert batcher.num_waiting == 0


async def test_a_full_line_refuses_and_an_empty_one_takes_any_call() -> None:
    engine = Engine()
    async with batching(max_waiting=10) as batcher, asyncio.TaskGroup() as group:
        assert len(await batcher.submit(ticket(engine, range(50)))) == 50
        batcher.stats.tickets = 0
        await held(batcher, engine, group)
        waiting = group.create_task(batcher.submit(ticket(engine, range(8))))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="8 items wait"):
            await batcher.submit(ticket(engine, range(3)))
        engine.go.set()
        assert len(await waiting) == 8


async def test_a_chore_runs_in_the_engine_thread_and_its_failure_harms_nothing() -> None:
    engine = Engine()
    names: list[str] = []

    def fail() -> None:
        raise RuntimeError

    async with batching() as batcher:
        batcher.chore(lambda: names.append(threading.current_thread().name))
        batcher.chore(fail)
        assert await batcher.submit(ticket(engine, ["after"])) == ["<after>"]
    assert names == ["engine"]


async def test_a_stuck_engine_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    monkeypatch.setattr("worker.serving.batcher.STALLED_S", 0.05)
    async with batching() as batcher, asyncio.TaskGroup() as group:
        await held(batcher, engine, group)
        await until(lambda: not batcher.alive())
        engine.go.set()
        await until(batcher.alive)
    await until(lambda: not batcher.alive())


async def test_times_say_how_long_a_call_waited_and_ran() -> None:
    engine = Engine()

    def slowly(items: list[Any]) -> Sequence[Any]:
        time.sleep(0.02)
        return items

    async with batching() as batcher, asyncio.TaskGroup() as group:
        await held(batcher, engine, group)
        call = ticket(engine, [1])
        call.run = slowly
        task = group.create_task(batcher.submit(call))
        await asyncio.sleep(0.03)
        engine.go.set()
        await task
    assert call.queue_ms >= 25
    assert 20 <= call.inference_ms < 2000


def test_a_lost_device_ends_the_process() -> None:
    program = """
import asyncio, time
from worker.serving.batcher import Batcher, Entry, Ticket
def run(items): raise ArithmeticError
async def main():
    batcher = Batcher(max_tokens=10, max_waiting=10, fatal=(ArithmeticError,))
    batcher.start()
    await batcher.submit(Ticket("a", "a", run, [Entry(1, 1)], time.monotonic() + 10))
asyncio.run(main())
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, check=False, timeout=60)
    assert done.returncode == 70
    assert b"ArithmeticError" in done.stderr
