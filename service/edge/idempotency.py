"""Idempotency keys: the same key and request get the first answer for a day.

The row is written in the transaction that creates the resource, so either both exist or neither. A request that takes
long before it has anything to write (an upload) reserves its key first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, cast

import sqlalchemy as sa
from fastapi import Response
from fastapi.responses import JSONResponse
from sqlalchemy.dialects.postgresql import insert

from service.contract.dialects import after
from service.contract.errors import Conflict, Invalid, Malformed
from service.contract.tables import idempotency, owned

DAY_S: Final = 24 * 3600
ABANDONED_S: Final = 6 * 3600
MAX_KEY: Final = 255


@dataclass(frozen=True)
class Answer:
    """A status and a JSON body that were, or will be, sent."""

    status: int
    body: dict[str, Any]
    replayed: bool = False


def check_key(key: str | None) -> str | None:
    """Return the key of a header.

    Raises Malformed unless it is 1 to 255 printable ASCII characters.
    """
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        raise Malformed(f"idempotency-key is 1 to {MAX_KEY} printable ASCII characters", param="idempotency-key")
    return key


def fingerprint(method: str, path: str, fields: Any) -> str:
    """Hash what makes two requests the same: method, path, and fields in sorted order with the digests of files."""
    text = json.dumps([method, path, fields], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def reserve(conn: sa.Connection, tenant: str, key: str) -> None:
    """Mark a key as in progress before the request is known in full.

    Raises Conflict while a twin is in progress. A key that has its answer already is left alone.
    """
    _drop_old(conn, tenant, key)
    if not _insert(conn, tenant, key, request_sha256="") and _select(conn, tenant, key).status is None:
        raise Conflict("a request with this idempotency key is in progress", code="idempotency_in_progress")


def release(conn: sa.Connection, tenant: str, key: str) -> None:
    """Give back a key whose request failed."""
    conn.execute(sa.delete(idempotency).where(*_mine(tenant, key), idempotency.c.status.is_(None)))


def replay(conn: sa.Connection, tenant: str, key: str | None, digest: str, *, reserved: bool = False) -> Answer | None:
    """Return the first answer to this key, or None for a request that is the first.

    Call it in the transaction that creates the resource, and end that with `remember`. With `reserved` the caller holds
    the key through `reserve`. Raises Invalid for another request under the same key, Conflict while it is in progress.
    """
    if key is None:
        return None
    _drop_old(conn, tenant, key)
    if _insert(conn, tenant, key, request_sha256=digest):
        return None
    row = _select(conn, tenant, key)
    if row.status is None:
        if reserved:
            return None
        raise Conflict("a request with this idempotency key is in progress", code="idempotency_in_progress")
    if row.request_sha256 != digest:
        raise Invalid("this idempotency key was used for another request", param="idempotency-key")
    return Answer(row.status, cast("dict[str, Any]", row.body), replayed=True)


def remember(conn: sa.Connection, tenant: str, key: str | None, digest: str, answer: Answer) -> Answer:
    """Keep the answer for later requests with this key."""
    if key is not None:
        values = {"request_sha256": digest, "status": answer.status, "body": answer.body}
        conn.execute(sa.update(idempotency).where(*_mine(tenant, key)).values(**values))
    return answer


def _mine(tenant: str, key: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return idempotency.c.tenant_id == tenant, idempotency.c.key == key


def _select(conn: sa.Connection, tenant: str, key: str) -> sa.Row[Any]:
    return conn.execute(owned(idempotency, tenant).where(idempotency.c.key == key)).one()


def _drop_old(conn: sa.Connection, tenant: str, key: str) -> None:
    too_old = idempotency.c.created_at < after(sa.literal(-DAY_S))
    # A process that died during an upload never gives its key back.
    abandoned = idempotency.c.status.is_(None) & (idempotency.c.created_at < after(sa.literal(-ABANDONED_S)))
    conn.execute(sa.delete(idempotency).where(*_mine(tenant, key), too_old | abandoned))


def _insert(conn: sa.Connection, tenant: str, key: str, *, request_sha256: str) -> bool:
    # On PostgreSQL the insert waits for a twin's transaction, so afterwards its outcome is visible.
    values = {"tenant_id": tenant, "key": key, "request_sha256": request_sha256}
    statement = insert(idempotency).values(**values).on_conflict_do_nothing().returning(idempotency.c.key)
    return conn.execute(statement).first() is not None


def respond(answer: Answer, headers: dict[str, str] | None = None) -> Response:
    """Send an answer, saying whether it is a repetition."""
    marked = {"idempotency-replayed": "true"} if answer.replayed else {}
    return JSONResponse(answer.body, status_code=answer.status, headers={**(headers or {}), **marked})
