"""A worker that is going to be killed: it works jobs that take some time and writes starts and ends to a ledger."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.queue_systems.ours import RESULT, Ours
from service.contract import leases, outcomes
from worker.heartbeat import Heartbeat

TTL_S: Final = 1.0


def run(url: str, ledger: Path) -> None:
    """Work until somebody kills this process."""
    system = Ours(url)
    heartbeat = Heartbeat(url, TTL_S / 4)
    asyncio.run(system.prepare())
    heartbeat.beat_for(system.worker_id)
    descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    swept = 0.0
    while True:
        if heartbeat.declared_dead:
            asyncio.run(system.prepare())
            heartbeat.beat_for(system.worker_id)
        if time.monotonic() - swept > 0.25:
            leases.promote(system.engine)
            leases.rescue(system.engine, ttl_s=TTL_S)
            swept = time.monotonic()
        claims = system.claim(system.engine, 1, TTL_S)
        for claim in claims:
            os.write(descriptor, f"start {claim.id} {claim.epoch}\n".encode())
            time.sleep(0.15 * random.random())
            state = outcomes.finish(system.engine, claim, system.worker_id, RESULT)
            os.write(descriptor, f"{state or 'refused'} {claim.id} {claim.epoch}\n".encode())
        if not claims:
            time.sleep(0.05)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # every kill is followed by warnings about rescued jobs
    run(sys.argv[1], Path(sys.argv[2]))
