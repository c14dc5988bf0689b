"""How an attempt's outcome is written down: one fenced transaction of the queue for each."""

from __future__ import annotations

from typing import assert_never

import sqlalchemy as sa
from sqlalchemy.exc import DataError, IntegrityError

from service.contract import outcomes
from service.contract.errors import TooLarge
from service.contract.jobs import State
from service.contract.leases import Claim
from worker.running import Done, Failed, Outcome, Stopped


def settle(engine: sa.Engine, claim: Claim, worker_id: str, outcome: Outcome) -> State | None:
    """Write how an attempt ended and return the job's state; None if the lease is lost.

    A result that the database refuses fails the job for good.
    """
    match outcome:
        case Done(result):
            try:
                return outcomes.finish(engine, claim, worker_id, result)
            except (IntegrityError, DataError, TooLarge) as error:
                message = str(error).partition("\n")[0]
                failed = {"type": type(error).__name__, "message": message, "code": "result_refused"}
                return outcomes.fail(engine, claim, worker_id, failed, retry=False)
        case Failed(error, retry):
            return outcomes.fail(engine, claim, worker_id, error, retry=retry)
        case Stopped("cancel"):
            return outcomes.cancelled(engine, claim, worker_id)
        case Stopped("interrupt"):
            return outcomes.release(engine, claim, worker_id)
        case Stopped():
            return None
        case _:
            assert_never(outcome)
