"""The batcher: one thread that does the arithmetic, fed from the event loop.

Greedy: whatever waits when the thread is free goes out at once, merged per group (the same work on the same model); no
timer ever holds a request back. Items are the unit, not calls: a long call is cut into steps of about `STEP_S`, and
groups, and the calls of a group, take turns, so that one text never waits for five hundred images.

It knows nothing of torch or of operations. It is one of the few places that catch every exception: what fails is halved
until the item that fails alone is found, and the thread goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from service.contract.errors import Invalid, IsthmusError, Unavailable

log = logging.getLogger(__name__)

STEP_S: Final = 0.1  # a step aims at this long: batches are long enough to be efficient, short enough to take turns
STALLED_S: Final = 60.0  # a step that takes longer means that the thread is lost
FLOOR_TOKENS: Final = 256  # a slow first step must not starve the next ones
SLACK_TOKENS: Final = 2048  # below this, a second launch costs more than the padding it saves
MAX_PACES: Final = 1024


@dataclass(frozen=True)
class Entry:
    """One item: its longest sequence and how many sequences it has, in tokens, and what `run` takes."""

    item: Any
    length: int
    num_sequences: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens, padded within the item."""
        return self.length * self.num_sequences


@dataclass(eq=False)
class Ticket:
    """A call in the line: entries that wait, results that are there, and whether anybody still wants them."""

    group: Hashable  # tickets of one group are merged
    pace: Hashable  # groups of one pace run equally fast
    run: Callable[[list[Any]], Sequence[Any]]  # items -> a result, or an IsthmusError, for each
    entries: list[Entry]
    deadline: float  # on time.monotonic's clock
    results: list[Any] = field(default_factory=list[Any])
    order: deque[int] = field(default_factory=deque[int])
    num_left: int = 0
    queued_at: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    error: IsthmusError | None = None
    abandoned: bool = False
    settle: Callable[[], None] = lambda: None

    @property
    def queue_ms(self) -> float:
        """Milliseconds until the first item was started."""
        return 1000 * (self.started_at - self.queued_at)

    @property
    def inference_ms(self) -> float:
        """Milliseconds from the start of the first item to the end of the last."""
        return 1000 * (self.ended_at - self.started_at)

    def wanted(self, now: float) -> bool:
        """Tell whether starting another of its items is of use to anybody."""
        return not (self.abandoned or self.error is not None or now > self.deadline)


@dataclass
class Stats:
    """Counters since the start."""

    tickets: int = 0
    items: int = 0
    batches: int = 0
    failed: int = 0
    dropped: int = 0


Batch = list[tuple[Ticket, int]]


class Batcher:
    """The line in front of the engine thread, and the thread."""

    def __init__(
        self, *, max_tokens: int, max_waiting: int, fatal: tuple[type[Exception], ...] = (), step_s: float = STEP_S
    ) -> None:
        self.stats = Stats()
        self._max_tokens = max_tokens
        self._max_waiting = max_waiting
        self._fatal = fatal
        self._step_s = step_s
        self._lock = threading.Condition()
        self._groups: OrderedDict[Hashable, deque[Ticket]] = OrderedDict()  # least recently served first
        self._chores: deque[Callable[[], None]] = deque()
        self._paces: dict[Hashable, float] = {}  # pace -> tokens a second
        self._num_waiting = 0
        self._busy_since: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the engine thread after its present step."""
        with self._lock:
            self._stopped = True
            self._lock.notify()

    def alive(self) -> bool:
        """Tell whether the thread is there and not stuck in a step."""
        busy_since = self._busy_since
        return self._thread.is_alive() and (busy_since is None or time.monotonic() - busy_since < STALLED_S)

    @property
    def num_waiting(self) -> int:
        """Items that have not been started."""
        return self._num_waiting

    def chore(self, run: Callable[[], None]) -> None:
        """Run something in the engine thread, between two steps (thread counts belong to the thread that sets them)."""
        with self._lock:
            self._chores.append(run)
            self._lock.notify()

    async def submit(self, ticket: Ticket) -> list[Any]:
        """Wait for the results of a ticket, one for each entry.

        Raises what its first bad item raised, or Unavailable if the line is full or the deadline passes.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not done.done():
                done.set_result(None)

        ticket.settle = lambda: _tell(loop, settle)
        self._enqueue(ticket)
        try:
            async with asyncio.timeout(max(0.0, ticket.deadline - time.monotonic())):
                await done
        except TimeoutError:
            raise Unavailable("the request was not served before its deadline", code="deadline") from None
        finally:
            ticket.abandoned = True  # answered or given up: either way nobody wants more of it
        if ticket.error is not None:
            raise ticket.error
        return ticket.results

    def _enqueue(self, ticket: Ticket) -> None:
        num = len(ticket.entries)
        ticket.results = [None] * num
        # In order of length: what leaves together is of similar length, so little of a batch is padding.
        ticket.order = deque(sorted(range(num), key=lambda at: ticket.entries[at].length))
        ticket.num_left = num
        ticket.queued_at = time.monotonic()
        with self._lock:
            if self._num_waiting and self._num_waiting + num > self._max_waiting:
                raise Unavailable(f"{self._num_waiting} items wait for inference already", code="full")
            self.stats.tickets += 1
            self._num_waiting += num
            self._groups.setdefault(ticket.group, deque()).append(ticket)
            self._lock.notify()

    # --- the engine thread ---

    def _work(self) -> None:
        while True:
            with self._lock:
                self._busy_since = None
                while not (self._groups or self._chores or self._stopped):
                    self._lock.wait()
                if self._stopped:
                    return
                self._busy_since = time.monotonic()
                chore = self._chores.popleft() if self._chores else None
                batch = self._take() if chore is None else []
            if chore is not None:
                self._attempt(lambda _, chore=chore: [chore()], [None])
            elif batch:
                self._step(batch)

    def _take(self) -> Batch:
        """Take the next step's items: of the group that was served longest ago, its calls in turns."""
        now = time.monotonic()
        key, tickets = next(iter(self._groups.items()))
        rate = self._paces.get(tickets[0].pace, self._max_tokens)
        budget = min(self._max_tokens, max(FLOOR_TOKENS, round(rate * self._step_s)))
        batch: Batch = []
        unfinished: list[Ticket] = []
        while tickets:
            ticket = tickets.popleft()
            if not ticket.wanted(now):
                self._num_waiting -= len(ticket.order)
                self.stats.dropped += len(ticket.order)
                continue
            if batch and budget < ticket.entries[ticket.order[0]].num_tokens:
                tickets.appendleft(ticket)  # first in the next step
                break
            while ticket.order and (not batch or budget >= ticket.entries[ticket.order[0]].num_tokens):
                at = ticket.order.popleft()
                budget -= ticket.entries[at].num_tokens
                batch.append((ticket, at))
            if ticket.order:
                unfinished.append(ticket)
        tickets.extend(unfinished)  # behind those that had nothing yet
        self._num_waiting -= len(batch)
        if tickets:
            self._groups.move_to_end(key)
        else:
            del self._groups[key]
        return batch

    def _step(self, batch: Batch) -> None:
        batch.sort(key=lambda taken: taken[0].entries[taken[1]].length)
        for cut in self._cuts(batch):
            started_at = time.monotonic()
            results = self._attempt(cut[0][0].run, [ticket.entries[at].item for ticket, at in cut])
            ended_at = time.monotonic()
            self._learn_pace(cut, ended_at - started_at)
            self.stats.batches += 1
            self.stats.items += len(cut)
            for (ticket, at), result in zip(cut, results, strict=True):
                ticket.started_at = ticket.started_at or started_at
                ticket.ended_at = ended_at
                ticket.num_left -= 1
                if isinstance(result, IsthmusError):
                    self.stats.failed += 1
                    ticket.error = ticket.error or result.at("items", at)
                    ticket.settle()
                else:
                    ticket.results[at] = result
                    if ticket.num_left == 0:
                        ticket.settle()

    def _cuts(self, batch: Batch) -> list[Batch]:
        """Cut a batch, sorted by length, where padding would cost more than a second launch."""
        cuts: list[Batch] = [[]]
        num_sequences = num_tokens = 0
        for ticket, at in batch:
            entry = ticket.entries[at]
            num_sequences += entry.num_sequences
            num_tokens += entry.num_tokens
            num_padded = num_sequences * entry.length
            if cuts[-1] and (num_padded > self._max_tokens or num_padded > max(SLACK_TOKENS, 2 * num_tokens)):
                cuts.append([])
                num_sequences, num_tokens = entry.num_sequences, entry.num_tokens
            cuts[-1].append((ticket, at))
        return cuts

    def _learn_pace(self, cut: Batch, seconds: float) -> None:
        num_padded = max(t.entries[at].length for t, at in cut) * sum(t.entries[at].num_sequences for t, at in cut)
        rate = num_padded / max(seconds, 1e-6)
        pace = cut[0][0].pace
        if len(self._paces) >= MAX_PACES and pace not in self._paces:
            self._paces.clear()
        self._paces[pace] = (self._paces.get(pace, rate) + rate) / 2

    def _attempt(self, run: Callable[[list[Any]], Sequence[Any]], items: list[Any]) -> Sequence[Any]:
        """Run items together; if that fails, in halves, until only what fails alone has failed."""
        try:
            return run(items)
        except self._fatal:
            # The device's context is lost for good: a new process is the only way back, and the supervisor starts it.
            log.exception("the device is lost")
            os._exit(70)
        except Exception as error:  # noqa: BLE001  # one bad item never harms its batch mates
            if len(items) == 1:
                return [error if isinstance(error, IsthmusError) else _blame(error)]
        half = len(items) // 2
        return [*self._attempt(run, items[:half]), *self._attempt(run, items[half:])]


def _blame(error: Exception) -> IsthmusError:
    log.error("an item or a chore failed on its own", exc_info=error)
    return Invalid("the model failed on this item", code="item_failed")


def _tell(loop: asyncio.AbstractEventLoop, settle: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody listens any more
        log.debug("a result came after the end")
