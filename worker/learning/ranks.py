"""The processes of a group: rank 0 is the runner of the job, and starts a runner for each of the others.

They live and die together. The others end with rank 0, whatever ends it, and rank 0 does not survive one of them: what
it was waiting for will never come, so the attempt fails, with the reason of the one that failed first.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import distributed

from service.contract.errors import IsthmusError, Permanent, Transient
from worker.child import BrokenChannel, Child, ending
from worker.learning.device import choose_device
from worker.learning.group import ALONE, LOST, Group
from worker.task import Rank

if TYPE_CHECKING:
    from collections.abc import Generator

    from service.contract.jobs import TrainArgs
    from worker.runner import Context

_LOOK_S: Final = 0.1
_GRACE_S: Final = 5.0  # from the end of a rank to that of the attempt, if its runner hangs in a collective
_FOR_EVER: Final = timedelta(days=30)  # a rank that dies is seen by the one that started it, and jobs have deadlines


@contextmanager
def together(args: TrainArgs, ctx: Context, num_ranks: int) -> Generator[tuple[Group, torch.device]]:
    """Start the other ranks of a job, or join those that started this one; return this rank's device too.

    Raises Permanent if there are fewer GPUs than ranks, Transient if a rank is lost.
    """
    device = choose_device(ctx.device)
    if num_ranks == 1:
        yield ALONE, device
        return
    with ExitStack() as stack:
        if ctx.rank is None:
            device = _first(device, num_ranks)
            others = _Others(args, ctx, num_ranks, device)
            stack.callback(others.close)
            rank = others.ranks[0]
            others.wait(rank)
        else:
            others, rank = None, ctx.rank
        torch.set_num_threads(rank.threads)
        group = _meet(rank, device)
        stack.callback(distributed.destroy_process_group)
        try:
            yield group, device
        except Transient as error:
            if others is None or error.code != LOST:
                raise
            raise others.reason() from error


def _first(device: torch.device, num_ranks: int) -> torch.device:
    if device.type != "cuda":
        return device
    first = device.index or 0
    num_gpus = torch.cuda.device_count() - first
    if num_gpus < num_ranks:
        raise Permanent(
            f"compute.devices is {num_ranks} and this worker has {num_gpus} GPU{'s' * (num_gpus != 1)}",
            code="too_few_devices",
        )
    return torch.device("cuda", first)


def _meet(rank: Rank, device: torch.device) -> Group:
    # All ranks are on this machine, and nobody else is to reach them.
    loopback = "lo" if os.path.exists("/sys/class/net/lo") else "lo0"  # noqa: PTH110
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, loopback)
    store = distributed.FileStore(str(rank.store), rank.size)  # pyright: ignore[reportPrivateImportUsage]
    store.set_timeout(_FOR_EVER)
    store.set(f"arrived-{rank.rank}", "")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=distributed.PrefixStore("group", store),  # pyright: ignore[reportPrivateImportUsage]
        rank=rank.rank,
        world_size=rank.size,
        timeout=_FOR_EVER,
    )
    return Group(rank.rank, rank.size, store)


@final
class _Others:
    """The ranks beside rank 0, as it sees them."""

    def __init__(self, args: TrainArgs, ctx: Context, num_ranks: int, device: torch.device) -> None:
        threads = max(1, torch.get_num_threads() // num_ranks)
        store = ctx.scratch / "ranks"
        store.unlink(missing_ok=True)
        self.ranks = [Rank(rank=at, size=num_ranks, store=store, threads=threads) for at in range(num_ranks)]
        self._ctx = ctx
        self._failed: dict[int, dict[str, Any]] = {}
        self._ended: dict[int, int] = {}
        self._children: dict[int, Child] = {}
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        try:
            for rank in self.ranks[1:]:
                self._children[rank.rank] = Child(preload=True, environment=dict(os.environ))
                own = str(device) if device.type != "cuda" else f"cuda:{(device.index or 0) + rank.rank}"
                task = ctx.task.model_copy(
                    update={"args": args, "device": own, "threads": threads, "rank": rank, "resume": []}
                )
                self._children[rank.rank].send(task.model_dump(mode="json"))
        except OSError:
            self.close()
            raise
        self._watcher.start()
        ctx.event("ranks", {"processes": [child.pid for child in self._children.values()], "device": device.type})

    def wait(self, own: Rank) -> None:
        """Wait until all ranks are there, so that meeting them takes no time.

        Raises Cancelled or Interrupted if somebody asks for it, and what keeps a rank from coming.
        """
        store = distributed.FileStore(str(own.store), own.size)  # pyright: ignore[reportPrivateImportUsage]
        while not store.check([f"arrived-{rank.rank}" for rank in self.ranks[1:]]):
            self._ctx.check()
            if self._ended:
                raise self.reason()
            time.sleep(_LOOK_S)

    def reason(self) -> IsthmusError:
        """Say why the ranks do not go on: what the first of them that failed said, or how it ended."""
        give_up_at = time.monotonic() + _GRACE_S
        while not self._ended and not self._failed and time.monotonic() < give_up_at:
            time.sleep(_LOOK_S)
        for rank, status in self._ended.items():
            if status < 0 and rank not in self._failed:
                return Transient(f"rank {rank} of {len(self.ranks)} {ending(status)}", code="rank_died")
        told = [one for one in self._failed.values() if one.get("code") != LOST]
        for one in told or self._failed.values():
            kind = Permanent if one["permanent"] else Transient
            return kind(one["message"], code=one.get("code"))
        for rank, status in self._ended.items():
            return Transient(f"rank {rank} of {len(self.ranks)} {ending(status)}", code="rank_died")
        return Transient("the ranks lost touch with each other, and all of them are there", code=LOST)

    def close(self) -> None:
        """Kill what is left of them."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for child in self._children.values():
            child.close()

    def _watch(self) -> None:
        """Read what they say, so that no pipe fills up, and see whether one ends before its time."""
        lost_at: float | None = None
        while not self._closing.wait(_LOOK_S):
            for rank, child in self._children.items():
                if rank in self._ended:
                    continue
                status = child.exit_status()
                self._read(rank, child)
                if status is not None:
                    self._ended[rank] = status
                    lost_at = lost_at or time.monotonic()
            if lost_at is not None and self._is_bad() and time.monotonic() - lost_at > _GRACE_S:
                # The runner waits within a collective, where no exception reaches it.
                self._ctx.give_up(self.reason())

    def _is_bad(self) -> bool:
        return bool(self._failed) or any(status != 0 for status in self._ended.values())

    def _read(self, rank: int, child: Child) -> None:
        try:
            for message in child.messages():
                if "failed" in message:
                    self._failed.setdefault(rank, message["failed"])
        except BrokenChannel as error:
            self._failed.setdefault(rank, {"message": str(error), "permanent": False, "code": "rank_died"})
