"""A worker that does nothing at all: the real leases, outcomes and heartbeat around a line in a ledger.

`python -P tests/faults/noop_worker.py --database URL --ledger PATH`; SIGTERM ends it between two jobs.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.contract import leases, outcomes
from service.contract.dialects import open_engine
from service.contract.host import boot_id, host_name
from service.contract.jobs import KINDS, IngestResult
from service.contract.leases import Claim, WorkerInfo
from service.contract.word import new_id
from tests.faults.ledger import Ledger
from worker.heartbeat import Heartbeat

_IDLE_S = 0.02


class Worker:
    """One worker of the bulk lane."""

    def __init__(self, engine: sa.Engine, heartbeat: Heartbeat, ledger: Ledger, options: argparse.Namespace) -> None:
        self._engine = engine
        self._heartbeat = heartbeat
        self._ledger = ledger
        self._options = options
        self._next_rescue = 0.0
        self._stopping = False
        self._unsure = False
        self.id = self._register()
        signal.signal(signal.SIGTERM, self._stop)

    def run(self) -> None:
        """Claim and work until SIGTERM; an outage of the database is waited for."""
        while not self._stopping:
            try:
                if self._heartbeat.declared_dead:
                    self._ledger.write("dead")
                    self.id = self._register()
                self._keep_house()
                claims = leases.claim(
                    self._engine,
                    worker_id=self.id,
                    lane="bulk",
                    kinds=KINDS,
                    ttl_s=self._options.ttl_s,
                    limit=self._options.batch,
                )
            except (DBAPIError, PoolTimeout):
                time.sleep(0.1)
                self._unsure = True
                continue
            for claim in claims:
                self._work(claim)
            if not claims:
                time.sleep(_IDLE_S)
        leases.unregister(self._engine, self.id)

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _register(self) -> str:
        info = WorkerInfo(
            id=new_id("worker"),
            lanes=["bulk"],
            kinds=list(KINDS),
            host=host_name(),
            boot=boot_id(),
            pid=os.getpid(),
            endpoint=None,
            device="cpu",
            version="0",
        )
        leases.register(self._engine, info)
        self._heartbeat.beat_for(info.id)
        return info.id

    def _keep_house(self) -> None:
        now = time.monotonic()
        if self._unsure:  # a claim may have been granted whose answer never came: between two jobs none is held
            for lease in leases.leases(self._engine, self.id).values():
                outcomes.release(self._engine, lease, self.id)
            self._unsure = False
        leases.promote(self._engine)
        if now >= self._next_rescue and self._heartbeat.well_for_s() >= self._options.ttl_s:
            self._next_rescue = now + self._options.heartbeat_s
            leases.rescue(self._engine, ttl_s=self._options.ttl_s, by=self.id)

    def _work(self, claim: Claim) -> None:
        at = (claim.public_id, claim.epoch, claim.attempt)
        self._ledger.write("start", *at)
        time.sleep(self._options.work_s)
        self._ledger.write(self._finish(claim), *at)

    def _finish(self, claim: Claim) -> Literal["finish", "refused"]:
        result = result_of(claim)
        while True:
            try:
                state = outcomes.finish(self._engine, claim, self.id, result)
            except (DBAPIError, PoolTimeout):
                time.sleep(0.1)  # whether it was written or not, the fence knows
            else:
                return "refused" if state is None else "finish"


def result_of(claim: Claim) -> IngestResult:
    """Make up the result of an ingest job."""
    return IngestResult(
        artifact=f"datasets/{claim.public_id}/{claim.epoch}",
        num_samples=1,
        num_rejected=0,
        rejects=[],
        modalities={},
        splits={},
        labels=[],
        statistics={},
        digest="0" * 64,
        num_bytes=0,
    )


def main() -> None:
    """Run one worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", required=True)
    parser.add_argument("--ledger", required=True, type=Path)
    parser.add_argument("--ttl-s", type=float, default=1.0)
    parser.add_argument("--heartbeat-s", type=float, default=0.2)
    parser.add_argument("--work-s", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    heartbeat = Heartbeat(options.database, options.heartbeat_s)
    worker = Worker(open_engine(options.database, pool_size=2), heartbeat, Ledger(options.ledger), options)
    worker.run()
    heartbeat.stop()


if __name__ == "__main__":
    main()
