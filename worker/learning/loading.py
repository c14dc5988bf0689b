"""Batches ahead of the step that needs them: by a thread of this process, or by processes of their own.

Text, ids and vectors are a matter of microseconds and stay in memory once read: a thread does. Decoding pictures and
sounds takes the interpreter for itself, and alterations of every epoch cannot be kept: `recipe.compute.loaders`
processes share each batch, piece by piece, so that memory holds two batches however many they are. Who prepares a batch
changes nothing in it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from service.contract.errors import Permanent, Transient
from service.contract.modality import AudioTokens, ImageTokens
from worker.child import ending
from worker.learning import handover
from worker.learning.ragged import Ragged
from worker.learning.reading import CACHE_BYTES, Packed, PairData, next_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

BATCHES_AHEAD: Final = 2
MOST_BY_DEFAULT: Final = 8
LEAST_CORES: Final = 4  # with fewer, processes only take turns
_LOOK_UP_S: Final = 0.5


def num_loaders(pairs: Sequence[PairData], num_cores: int) -> int:
    """Return how many processes prepare batches if the recipe does not say: none where a thread keeps up."""
    if num_cores < LEAST_CORES:
        return 0
    num_bytes = 0
    for source in {source for pair in pairs for source in pair.sources}:
        match source.tokeniser.config:
            case ImageTokens() as tokens:
                each = tokens.max_length * tokens.dim
            case AudioTokens() as tokens:
                each = tokens.max_length * tokens.dim * tokens.windows * 4
            case _:
                continue
        if source.is_changed:
            return min(num_cores - 1, MOST_BY_DEFAULT)
        num_bytes += each * len(source.dataset.samples)
    return min(num_cores - 1, MOST_BY_DEFAULT) if num_bytes > CACHE_BYTES else 0


def batches(
    pairs: Sequence[PairData],
    drawn: Sequence[int],
    *,
    loaders: Sequence[dict[str, Any]] = (),
    check: Callable[[], None] | None = None,
) -> Generator[tuple[int, Ragged, Ragged]]:
    """Yield (pair, first, second) for ever, from the position `drawn` on; the next ones are prepared meanwhile.

    A process does that for each of `loaders`, which says how to open the pairs (`worker.loader.describe`), or else a
    thread. `check` is called now and then while a batch is not ready, and may raise. Start it in a thread that lives as
    long as it: loaders end with it.
    """
    ahead: deque[tuple[int, Future[tuple[Ragged, Ragged]]]] = deque()
    position = list(drawn)
    weights = [pair.weight for pair in pairs]
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        stack.callback(pool.shutdown, cancel_futures=True)
        processes = [stack.enter_context(closing(Loader(described))) for described in loaders]
        while True:
            while len(ahead) < BATCHES_AHEAD:
                at = next_pair(position, weights)
                ahead.append((at, _prepare(pool, processes, pairs[at], at, position[at])))
                position[at] += 1
            at, future = ahead.popleft()
            first, second = _wait(future, check)
            yield at, first, second


def _prepare(
    pool: ThreadPoolExecutor, processes: Sequence[Loader], pair: PairData, at: int, visit: int
) -> Future[tuple[Ragged, Ragged]]:
    if not processes:
        return pool.submit(_read, pair, visit)
    asked = processes[: pair.num_rows]
    for piece, process in enumerate(asked):
        process.ask({"pair": at, "visit": visit, "piece": [piece, len(asked)]})
    return pool.submit(_collect, asked)


def _read(pair: PairData, visit: int) -> tuple[Ragged, Ragged]:
    first, second = pair.batch(visit)
    return Ragged.from_packed(first), Ragged.from_packed(second)


def _collect(asked: Sequence[Loader]) -> tuple[Ragged, Ragged]:
    first, second = zip(*(process.answer() for process in asked), strict=True)
    return Ragged.from_packed(_joined(first)), Ragged.from_packed(_joined(second))


def _wait(future: Future[tuple[Ragged, Ragged]], check: Callable[[], None] | None) -> tuple[Ragged, Ragged]:
    while not wait([future], _LOOK_UP_S).done:
        if check is not None:
            check()
    return future.result()


def _joined(parts: Sequence[Packed]) -> Packed:
    """Put the pieces of one side of a batch end to end."""
    if len(parts) == 1:
        return parts[0]
    counts = None
    if any(part.counts is not None for part in parts):
        counts = np.concatenate([_counts(part) for part in parts])
    return Packed(
        np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts]), counts
    )


def _counts(part: Packed) -> np.ndarray:
    return np.ones_like(part.lengths) if part.counts is None else part.counts


@final
class Loader:
    """A process that prepares pieces of batches, as the runner sees it."""

    def __init__(self, description: dict[str, Any]) -> None:
        """Start it; it ends with the thread that does so."""
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "worker.loader"]
        command += ["--socket", str(theirs.fileno()), "--parent", str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints is no result of the runner's
                pass_fds=(theirs.fileno(),),
                # One thread each: there are as many of them as there is to do.
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
            )
        self.ask(description)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ask(self, message: dict[str, Any]) -> None:
        """Ask for a piece; answers come in the order of the questions.

        Raises Transient if the process is gone.
        """
        try:
            handover.send(self._socket, message)
        except (BrokenPipeError, ConnectionError) as error:
            raise self._gone() from error

    def answer(self) -> tuple[Packed, Packed]:
        """Wait for the next piece.

        Raises Permanent as the reading would in this process, Transient if the process is gone or out of memory.
        """
        try:
            message, file = handover.receive(self._socket)
        except (EOFError, ConnectionError) as error:
            raise self._gone() from error
        match message:
            case {"failed": {"message": text, "code": code}}:
                raise Permanent(text, code=code)
            case {"out_of_memory": True}:
                raise Transient("out of memory: a loader process has no more", code="out_of_memory")
            case _:
                assert file is not None
                first, second = handover.batch_of(message, file)
                return first, second

    def close(self) -> None:
        """Kill it; a thread that waits for its answer then hears that it is gone."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _gone(self) -> Transient | RuntimeError:
        status = self._process.wait()
        message = f"a loader process {ending(status)}"
        # By a signal: somebody else's doing, for want of memory most of the time. Any other end is a bug of ours.
        return Transient(message, code="loader_died") if status < 0 else RuntimeError(message)
