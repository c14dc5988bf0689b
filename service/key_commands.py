"""`isthmus keys`: API keys, straight in the database, since nobody can call an API without one."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError, ProgrammingError

from service.contract.dialects import open_engine
from service.contract.settings import Settings
from service.contract.shares import check_tenant
from service.contract.tables import api_key, owned
from service.keys import DEFAULT_TENANT, CreateKey, create_key, revoke_key


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Create, list or revoke keys and return the exit code."""
    tenant = check_tenant(options.tenant or DEFAULT_TENANT)
    engine = open_engine(settings.resolved_database_url(), pool_size=1)
    try:
        match options.action:
            case "create":
                return _create(options, tenant, engine)
            case "list":
                return _list(tenant, engine)
            case _:
                return _revoke(options.id, tenant, engine)
    except ValidationError as error:
        return _refuse("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors()))
    except (OperationalError, ProgrammingError) as error:
        return _refuse(f"the database cannot be used; has `isthmus migrate` been run? ({error.orig})")
    finally:
        engine.dispose()


def _create(options: argparse.Namespace, tenant: str, engine: sa.Engine) -> int:
    expires_at = None
    if options.expires_days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=options.expires_days)
    wanted = CreateKey(
        name=options.name,
        scopes=[scope.strip() for scope in options.scopes.split(",")],
        requests_per_minute=options.requests_per_minute,
        expires_at=expires_at,
    )
    with engine.begin() as conn:
        key_id, key = create_key(conn, tenant, wanted)
    print(f"{key_id} {options.name!r}; the key, which is never shown again:", file=sys.stderr)
    print(key, flush=True)
    return 0


def _list(tenant: str, engine: sa.Engine) -> int:
    with engine.connect() as conn:
        rows = conn.execute(owned(api_key, tenant).order_by(api_key.c.created_at)).all()
    for row in rows:
        state, scopes = _state_of(row.revoked_at, row.expires_at), ",".join(row.scopes)
        used = f"used {row.last_used_at:%Y-%m-%d %H:%M}" if row.last_used_at is not None else "never used"
        print(f"{row.id}  {state:16}  {used:21}  {scopes:24}  {row.name}")
    return 0


def _revoke(key_id: str, tenant: str, engine: sa.Engine) -> int:
    with engine.begin() as conn:
        if not revoke_key(conn, tenant, key_id):
            return _refuse(f"there is no key {key_id}")
    print(f"revoked {key_id}")
    return 0


def _state_of(revoked_at: datetime | None, expires_at: datetime | None) -> str:
    if revoked_at is not None:
        return "revoked"
    if expires_at is None:
        return "valid"
    return "expired" if expires_at <= datetime.now(UTC) else f"until {expires_at:%Y-%m-%d}"


def _refuse(reason: str) -> int:
    print(f"isthmus: {reason}", file=sys.stderr)
    return 1
