"""`isthmus tenants`: what each tenant may take of the queue, straight in the database."""

from __future__ import annotations

import argparse
import sys

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, ProgrammingError

from service.contract import shares
from service.contract.dialects import open_engine
from service.contract.settings import Settings


def run(options: argparse.Namespace, settings: Settings) -> int:
    """List or set shares and return the exit code.

    Raises Invalid for a share that cannot be.
    """
    engine = open_engine(settings.resolved_database_url(), pool_size=1)
    try:
        if options.action == "set":
            _set(options, engine)
        _show(engine, None if options.action == "list" else options.tenant)
    except (OperationalError, ProgrammingError) as error:
        reason = f"the database cannot be used; has `isthmus migrate` been run? ({error.orig})"
        print(f"isthmus: {reason}", file=sys.stderr)
        return 1
    finally:
        engine.dispose()
    return 0


def _set(options: argparse.Namespace, engine: sa.Engine) -> None:
    known = {(share.tenant, share.lane): share for share in shares.shares(engine)}
    share = known.get((options.tenant, options.lane))
    weight, max_running, max_queued = (share.weight, share.max_running, share.max_queued) if share else (1, None, None)
    shares.set_share(
        engine,
        tenant=options.tenant,
        lane=options.lane,
        weight=weight if options.weight is None else options.weight,
        max_running=_cap(options.max_running, max_running),
        max_queued=_cap(options.max_queued, max_queued),
    )


def _cap(given: int | str | None, known: int | None) -> int | None:
    if given is None:
        return known
    return given if isinstance(given, int) else None


def _show(engine: sa.Engine, tenant: str | None) -> None:
    print(f"{'tenant':24}  {'lane':6}  {'weight':>6}  {'running':>15}  {'waiting':>15}")
    for share in shares.shares(engine):
        if tenant is None or share.tenant == tenant:
            running = f"{share.running:,}" + ("" if share.max_running is None else f" of {share.max_running:,}")
            waiting = f"{share.waiting:,}" + ("" if share.max_queued is None else f" of {share.max_queued:,}")
            print(f"{share.tenant:24}  {share.lane:6}  {share.weight:6,}  {running:>15}  {waiting:>15}")
