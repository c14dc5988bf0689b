"""How a worker comes to life in the database: its row, and the end of neighbours that died without a word."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import sqlalchemy as sa

from service.contract import leases
from service.contract.host import boot_id, host_name
from service.contract.jobs import KINDS, State
from service.contract.leases import WorkerInfo
from service.contract.settings import Settings


def describe(settings: Settings, worker_id: str, endpoint: str | None) -> WorkerInfo:
    """Return what this process says about itself under an id."""
    return WorkerInfo(
        id=worker_id,
        lanes=sorted(settings.lane_set()),
        kinds=list(KINDS),
        host=host_name(),
        boot=boot_id(),
        pid=os.getpid(),
        endpoint=endpoint,
        device=settings.device,
        version=_version(),
    )


def bury_neighbours(engine: sa.Engine, info: WorkerInfo, scratch: Path) -> list[tuple[str, State]]:
    """Remove the workers of this boot whose process is gone, with their folders in `scratch`.

    They need not be waited for. Returns what they ran, and what became of it.
    """
    found = leases.neighbours(engine, host=info.host, boot=info.boot)
    dead = [worker_id for worker_id, pid in found.items() if pid == info.pid or not _is_alive(pid)]
    for worker_id in dead:
        shutil.rmtree(scratch / worker_id, ignore_errors=True)
    return leases.forget(engine, dead) if dead else []


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _version() -> str:
    try:
        return version("isthmus")
    except PackageNotFoundError:
        return "0"
