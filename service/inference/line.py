"""The line in front of the workers: requests, cut into parts and merged into calls.

Requests for one (model, operation, modality) form a group. Groups take turns, and so do the requests of a group, so
that one text never waits for five hundred images, nor for five thousand other texts of one caller.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from service.contract.wire import pack

if TYPE_CHECKING:
    from service.contract.errors import IsthmusError
    from service.contract.wire import Arrays

CALL_COST: Final = 16_384  # tokens, or KiB where that is more, in one call
Range = tuple[int, int]  # of items


@final
@dataclass(eq=False)
class Request:
    """A request: what it asks, which of its items are still to be sent, and what came back.

    `items` are those of an embed request; any other has `arrays`, and counts as one item.
    """

    group: tuple[str, ...]
    model: str  # what its worker is chosen by
    document: dict[str, Any]
    items: list[list[np.ndarray]]
    arrays: Arrays
    deadline: float
    done: asyncio.Future[None]
    costs: list[int] = field(default_factory=list[int])
    todo: deque[Range] = field(default_factory=deque[Range])
    answers: dict[Range, tuple[dict[str, Any], Arrays]] = field(
        default_factory=dict[Range, tuple[dict[str, Any], "Arrays"]]
    )
    avoid: set[str] = field(default_factory=set[str])  # ids of workers that failed it
    is_alone: bool = False  # something failed: from then on it shares no call with others
    lost_at: float = 0.0
    queued_at: float = field(default_factory=time.monotonic)
    queue_ms: float = 0.0
    inference_ms: float = 0.0

    def __post_init__(self) -> None:
        self.costs = [_cost(item) for item in self.items] or [_cost(list(self.arrays.values()))]
        self.todo.append((0, self.num_items))

    @property
    def num_items(self) -> int:
        """Items of the request."""
        return len(self.costs)

    @property
    def is_open(self) -> bool:
        """Tell whether somebody waits for it."""
        return not self.done.done()

    def fail(self, error: IsthmusError) -> None:
        """End it with an error."""
        if self.is_open:
            self.done.set_exception(error)

    def take(self, part: Range, document: dict[str, Any], arrays: Arrays) -> None:
        """Keep the answer to some of the items; the last one ends the request."""
        self.answers[part] = (document, arrays)
        if self.is_open and sum(end - begin for begin, end in self.answers) == self.num_items:
            self.done.set_result(None)


Part = tuple[Request, Range]


@final
class Line:
    """The requests that wait."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, ...], deque[Request]] = OrderedDict()  # least recently served first

    def add(self, request: Request) -> None:
        """Put a request at the end of its group."""
        self._groups.setdefault(request.group, deque()).append(request)

    def put_back(self, request: Request, part: Range) -> None:
        """Put a part that was not answered at the head of the line."""
        if not request.todo:
            self._groups.setdefault(request.group, deque()).appendleft(request)
            self._groups.move_to_end(request.group, last=False)
        request.todo.appendleft(part)

    def all(self) -> list[Request]:
        """Return every request that waits."""
        return [request for group in self._groups.values() for request in group]

    def head(self) -> Request | None:
        """Return the request whose turn it is, dropping those that nobody waits for."""
        while self._groups:
            key, group = next(iter(self._groups.items()))
            while group and not group[0].is_open:
                group.popleft()
            if group:
                return group[0]
            del self._groups[key]
        return None

    def take(self) -> list[Part]:
        """Take what the next call carries: of the group whose turn it is, what fits into the budget."""
        first = self.head()
        if first is None:
            return []
        group = self._groups[first.group]
        parts: list[Part] = []
        skipped: list[Request] = []
        unfinished: list[Request] = []
        budget = CALL_COST
        while group and budget > 0:
            request = group.popleft()
            if not request.is_open:
                continue
            taken = None
            if not parts or not (request.is_alone or first.is_alone):
                taken = _fit(request, budget, at_least_one=not parts)
            if taken is None:
                skipped.append(request)
                continue
            parts.append((request, taken))
            budget -= sum(request.costs[slice(*taken)])
            if request.todo:
                unfinished.append(request)
        group.extendleft(reversed(skipped))
        group.extend(unfinished)  # behind those that had nothing yet
        if group:
            self._groups.move_to_end(first.group)
        else:
            del self._groups[first.group]
        return parts


def _fit(request: Request, budget: int, *, at_least_one: bool) -> Range | None:
    begin, limit = request.todo[0]
    end = begin
    while end < limit and (budget >= request.costs[end] or (at_least_one and end == begin)):
        budget -= request.costs[end]
        end += 1
    if end == begin:
        return None
    request.todo.popleft()
    if end < limit:
        request.todo.appendleft((end, limit))
    return begin, end


def _cost(arrays: list[np.ndarray]) -> int:
    return max(sum(map(len, arrays)), sum(array.nbytes for array in arrays) >> 10, 1)


def write(parts: list[Part]) -> bytes:
    """Write the body of a call."""
    first = parts[0][0]
    if not first.items:
        return pack(first.document, first.arrays)
    return pack(first.document, as_arrays([item for request, part in parts for item in request.items[slice(*part)]]))


def as_arrays(items: list[list[np.ndarray]]) -> Arrays:
    """Lay the token sequences of items end to end, as an EmbedCall has them."""
    sequences = [sequence for item in items for sequence in item]
    return {
        "values": np.concatenate(sequences),
        "lengths": np.array([len(sequence) for sequence in sequences], np.int32),
        "owners": np.repeat(np.arange(len(items), dtype=np.int32), [len(item) for item in items]),
    }
