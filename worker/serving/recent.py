"""What was asked for lately, in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
class Recent(Generic[T]):
    """The values that were asked for last, so many bytes of them. For any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._known: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return self._num_bytes

    def get(self, key: Hashable) -> T | None:
        """Return a value, if it is still here."""
        with self._lock:
            if (found := self._known.get(key)) is None:
                return None
            self._known.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: T, num_bytes: int) -> None:
        """Keep a value in place of the key's former one, unless it is too large; old ones leave to make room."""
        with self._lock:
            if key in self._known:
                self._num_bytes -= self._known.pop(key)[1]
            if num_bytes > self._max_bytes:
                return
            self._known[key] = (value, num_bytes)
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes:
                _, (_, dropped) = self._known.popitem(last=False)
                self._num_bytes -= dropped
