"""API keys: who is calling, what they may do, how often.

A key is 160 random bits with a prefix, shown once and stored as its SHA-256: with that much randomness a fast hash is
the right one. Without any key in the database the service is open on a loopback bind, and refuses to start elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Final, Literal, cast, final
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import Field, StrictInt
from sqlalchemy.dialects.postgresql import insert

from service.contract.dialects import after, now
from service.contract.errors import Forbidden, TooMany, Unauthenticated, Unavailable
from service.contract.host import is_loopback
from service.contract.settings import Settings
from service.contract.tables import api_key, owned
from service.contract.word import ALPHABET, Moment, Name, Word, new_id
from service.database import Database

log = logging.getLogger(__name__)

Scope = Literal["read", "infer", "write", "admin"]
ALL_SCOPES: Final[tuple[Scope, ...]] = ("read", "infer", "write", "admin")
PREFIX: Final = "isk_"
KEY: Final = re.compile(rf"^{PREFIX}[{ALPHABET}]{{32}}\Z")
FRESH_S: Final = 5.0
NOTED_S: Final = 60.0  # between two notes that a key is in use
MAX_CACHED: Final = 10_000
DEFAULT_TENANT: Final = "default"


class CreateKey(Word):
    """A new API key."""

    name: Name
    scopes: Annotated[
        list[Scope],
        Field(min_length=1, max_length=4, description="read; infer: online operations; write; admin: everything"),
    ]
    requests_per_minute: Annotated[StrictInt | None, Field(ge=1, le=1_000_000, description="null: no limit")] = None
    expires_at: Annotated[Moment | None, Field(description="null: never")] = None


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    tenant: str
    key_id: str | None
    scopes: frozenset[str]
    requests_per_minute: int | None = None
    expires_at: datetime | None = None

    def require(self, scope: Scope) -> None:
        """Raise Forbidden unless the key carries the scope, or `admin`, which includes every other."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise Forbidden(f"this needs a key with the scope {scope!r}")


OPEN: Final = Caller(DEFAULT_TENANT, None, frozenset(ALL_SCOPES))


def hash_key(key: str) -> str:
    """Return what the database keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(conn: sa.Connection, tenant: str, wanted: CreateKey) -> tuple[str, str]:
    """Make a key; return its id and the key itself, which nobody can read again."""
    key_id = new_id("key")
    key = PREFIX + "".join(secrets.choice(ALPHABET) for _ in range(32))
    conn.execute(
        sa.insert(api_key).values(
            id=key_id,
            tenant_id=tenant,
            name=wanted.name,
            hash=hash_key(key),
            scopes=sorted(set(wanted.scopes)),
            requests_per_minute=wanted.requests_per_minute,
            expires_at=wanted.expires_at,
        )
    )
    return key_id, key


def ensure_key(conn: sa.Connection, key: str) -> None:
    """Make sure that a key from the settings exists, with every scope; one that was revoked stays revoked.

    Raises RuntimeError if it does not look like a key.
    """
    if not KEY.match(key):
        msg = (
            f"ISTHMUS_API_KEY is not a key: {PREFIX} and 32 hexadecimal digits, such as {PREFIX}$(openssl rand -hex 16)"
        )
        raise RuntimeError(msg)
    given = insert(api_key).values(
        id=new_id("key"), tenant_id=DEFAULT_TENANT, name="ISTHMUS_API_KEY", hash=hash_key(key), scopes=list(ALL_SCOPES)
    )
    conn.execute(given.on_conflict_do_nothing(index_elements=[api_key.c.hash]))  # several processes start at once


def revoke_key(conn: sa.Connection, tenant: str, key_id: str) -> bool:
    """Revoke a key; tell whether the tenant has it."""
    known = conn.execute(owned(api_key, tenant).where(api_key.c.id == key_id)).first()
    if known is None:
        return False
    conn.execute(
        sa.update(api_key).where(api_key.c.id == key_id, api_key.c.revoked_at.is_(None)).values(revoked_at=now())
    )
    return True


def any_key(conn: sa.Connection) -> bool:
    """Tell whether a key was ever made: revoking the last one does not open the service."""
    return conn.execute(sa.select(api_key.c.id).limit(1)).first() is not None


def _name_in(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # such as an unclosed bracket
        return ""


def check_bind(settings: Settings, *, has_key: bool) -> None:
    """Raise RuntimeError for a bind that others can reach while nobody needs a key."""
    if not (has_key or settings.insecure or is_loopback(settings.host)):
        msg = (
            f"{settings.host} can be reached from outside and there is no API key yet: create one with "
            "`isthmus keys create`, bind 127.0.0.1, or say --insecure (ISTHMUS_INSECURE=1)"
        )
        raise RuntimeError(msg)


@dataclass
class _Bucket:
    tokens: float
    at: float


@dataclass
class _Known:
    caller: Caller | None
    at: float
    bucket: _Bucket
    noted_at: float = -math.inf


@final
class Keys:
    """Keys as this process knows them: five seconds fresh, stale while the database is down."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._has_key: bool | None = None
        self._has_key_at = -math.inf
        self._notes: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Finish what is being written."""
        await asyncio.gather(*self._notes)

    async def has_key(self) -> bool:
        """Tell whether any key exists.

        Raises Unavailable if the database is down and was never asked before.
        """
        # Once there is a key there will always be one: only "none yet" needs asking again.
        if self._has_key is not True and time.monotonic() - self._has_key_at > FRESH_S:
            try:
                self._has_key = await self._database.read(any_key)
            except Unavailable:
                if self._has_key is None:
                    raise
            self._has_key_at = time.monotonic()
        return bool(self._has_key)

    def forget(self) -> None:
        """Ask the database again at the next request: keys have changed."""
        self._known.clear()
        self._has_key_at = -math.inf

    async def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Return who sends these headers.

        Raises Unauthenticated without a valid key where one is needed, Forbidden for a browser's request from another
        site to an open service, TooMany over the key's rate.
        """
        authorization = headers.get("authorization")
        if not await self.has_key():
            return self._open(headers)
        if authorization is None:
            raise Unauthenticated("send an API key: `authorization: Bearer isk_...`")
        scheme, _, key = authorization.partition(" ")
        # Whatever is wrong with a key, the answer is the same.
        if scheme.lower() != "bearer" or not KEY.match(key):
            raise Unauthenticated("the API key is not valid")
        known = await self._find(hash_key(key))
        caller = known.caller
        if caller is None or (caller.expires_at is not None and caller.expires_at <= datetime.now(UTC)):
            raise Unauthenticated("the API key is not valid")
        if caller.requests_per_minute is not None:
            _take(known.bucket, caller.requests_per_minute)
        if caller.key_id is not None and time.monotonic() - known.noted_at >= NOTED_S:
            known.noted_at = time.monotonic()
            note = asyncio.create_task(self._note_use(caller.key_id))  # no request waits for it
            self._notes.add(note)
            note.add_done_callback(self._notes.discard)
        return caller

    async def _note_use(self, key_id: str) -> None:
        try:
            await self._database.write(lambda conn: conn.execute(_USED, {"key": key_id}))
        except (Unavailable, TooMany) as error:
            log.info("the use of a key is not noted: %s", error.message)

    def _open(self, headers: Mapping[str, str]) -> Caller:
        if self._settings.insecure:
            return OPEN
        if not is_loopback(self._settings.host):
            raise Unauthenticated("an API key is needed, and there is none yet")
        # A web page on another site must not reach an open service through its reader's browser, neither by a plain
        # form (Origin) nor by a name of its own that resolves to 127.0.0.1 (Host).
        origin, host = headers.get("origin", "http://localhost"), headers.get("host", "")
        if not (is_loopback(_name_in(f"//{host}")) and is_loopback(_name_in(origin))):
            raise Forbidden("without API keys only this machine may call, by the name localhost or 127.0.0.1")
        return OPEN

    async def _find(self, digest: str) -> _Known:
        at = time.monotonic()
        known = self._known.get(digest)
        if known is not None and at - known.at < FRESH_S:
            return known
        try:
            caller = await self._database.read(lambda conn: _select_caller(conn, digest))
        except Unavailable:
            if known is None:
                raise
            known.at = at
            return known
        known = self._known.get(digest)  # another request may have found it meanwhile: its bucket counts
        if known is None:
            rate = caller.requests_per_minute if caller else None
            known = self._known[digest] = _Known(caller, at, _Bucket(float(rate or 0), at))
            while len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
        known.caller, known.at = caller, at
        return known


# Other processes note it too: one write in a minute is enough for all of them.
_USED: Final = (
    sa.update(api_key)
    .where(
        api_key.c.id == sa.bindparam("key"),
        api_key.c.last_used_at.is_(None) | (api_key.c.last_used_at < after(sa.literal(-NOTED_S))),
    )
    .values(last_used_at=now())
)


def _select_caller(conn: sa.Connection, digest: str) -> Caller | None:
    row = conn.execute(sa.select(api_key).where(api_key.c.hash == digest, api_key.c.revoked_at.is_(None))).first()
    if row is None:
        return None
    scopes = frozenset(cast("list[str]", row.scopes))
    return Caller(row.tenant_id, row.id, scopes, row.requests_per_minute, row.expires_at)


def _take(bucket: _Bucket, per_minute: int) -> None:
    at = time.monotonic()
    bucket.tokens = min(float(per_minute), bucket.tokens + (at - bucket.at) * per_minute / 60)
    bucket.at = at
    if bucket.tokens < 1:
        error = TooMany("the key's requests per minute are used up")
        error.retry_after_s = (1 - bucket.tokens) * 60 / per_minute
        raise error
    bucket.tokens -= 1
