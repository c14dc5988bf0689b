"""The sweeper: removes the rows that were kept long enough, and the files that no row refers to any more.

A deletion is a mark on a row; the files go when they are an hour old at least. What an unfinished job may still be
about to record is left alone whatever its age.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final, final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from service.contract import queue
from service.contract.artifacts import open_store
from service.contract.errors import IsthmusError, NotFound
from service.contract.tables import checkpoint, dataset, embedding_set, job, job_result, model
from service.contract.transact import read

if TYPE_CHECKING:
    from service.contract.artifacts import Store

_log = logging.getLogger(__name__)
OLDER_THAN_S: Final = 3600.0
DAY_S: Final = 86_400.0
UPLOAD: Final = "store:"  # a data set's source that was uploaded

_UNFINISHED: Final = sa.select(job.c.public_id).where(sa.text("job.state IN ('scheduled','queued','running')"))
_INGESTING: Final = sa.select(dataset.c.id).where(dataset.c.state == "ingesting", dataset.c.deleted_at.is_(None))
# A failed ingest can be retried, so its upload stays; a data set that is ready has its own copy.
_UPLOADS: Final = sa.select(dataset.c.source).where(dataset.c.state != "ready", dataset.c.deleted_at.is_(None))
_ARTIFACTS: Final = (
    *(sa.select(table.c.artifact).where(table.c.deleted_at.is_(None)) for table in (dataset, model, embedding_set)),
    sa.select(checkpoint.c.artifact),
    sa.select(job_result.c.body["artifact"].as_string())
    .join(job, job.c.id == job_result.c.job_id)
    .where(job.c.kind.in_(("evaluate", "experiment", "compose"))),
)


def sweep(engine: sa.Engine, store: Store, *, older_than_s: float = OLDER_THAN_S) -> list[str]:
    """Delete the artifacts and uploads that nothing refers to; return their keys."""
    # The files first: what appears after this list was made is not judged by rows that are older than it.
    keys = [
        key
        for prefix in ("uploads", "datasets", "models", "embeddings", "reports", "checkpoints")
        for key in store.list(prefix)
    ]
    kept, busy = read(engine, _look)
    removed: list[str] = []
    for key in keys:
        owner = key.split("/")[1]
        if key in kept or owner in busy or owner.partition("_")[2] in busy or not _is_old(store, key, older_than_s):
            continue
        store.delete(key)
        removed.append(key)
    store.sweep_temporary(max(older_than_s, OLDER_THAN_S))
    return removed


def _look(conn: sa.Connection) -> tuple[set[str], set[str]]:
    """Return the keys that rows refer to, and the ids (without their prefix) whose jobs are unfinished."""
    kept = {key for query in _ARTIFACTS for key in conn.execute(query).scalars() if key is not None}
    kept |= {source.removeprefix(UPLOAD) for source in conn.execute(_UPLOADS).scalars()}
    busy = {public_id.partition("_")[2] for public_id in conn.execute(_UNFINISHED).scalars()}
    return kept, busy | set(conn.execute(_INGESTING).scalars())


def _is_old(store: Store, key: str, older_than_s: float) -> bool:
    try:
        return store.modified_at(key) < time.time() - older_than_s
    except NotFound:
        return False  # another worker was faster


@final
class Sweeper:
    """Sweeps in a thread of its own, so that a slow store holds up no job."""

    def __init__(self, engine: sa.Engine, store_url: str, *, job_retention_days: float) -> None:
        self._engine = engine
        self._store_url = store_url
        self._job_retention_days = job_retention_days
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Sweep once, unless the last time still runs."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Wait until the sweep that was started is over."""
        if self._thread is not None:
            self._thread.join()

    def _sweep(self) -> None:
        num_jobs = 0
        try:
            queue.prune_idempotency(self._engine)
            if self._job_retention_days:
                num_jobs = queue.prune(self._engine, older_than_s=self._job_retention_days * DAY_S)
            removed = sweep(self._engine, open_store(self._store_url))
        except (SQLAlchemyError, IsthmusError, OSError) as error:
            _log.warning("nothing was swept: %s", error)
            return
        if removed or num_jobs:
            first = removed[0] if removed else None
            _log.info("swept", extra={"fields": {"jobs": num_jobs, "artifacts": len(removed), "first": first}})
