"""The inference processes that this API process may call: found by their rows, judged by their connections.

The rows are read in a thread of their own. While the database is silent the last list stays, and a worker is left out
only for not answering. A worker whose readiness says no is kept, and not called.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, final

import aiohttp
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from service.contract.dialects import after
from service.contract.host import boot_id
from service.contract.tables import worker

if TYPE_CHECKING:
    from service.contract.settings import Settings

log = logging.getLogger(__name__)

REFRESH_S: Final = 1.0
PROBE_AGAIN_S: Final = 0.2  # while some worker is not ready: a restarted process is used as soon as it answers
PROBE_TIMEOUT_S: Final = 2.0
DATABASE_TIMEOUT_S: Final = 2.0
MISSES: Final = 3  # slow probes in a row: a busy machine is not a dead one
MAX_IN_FLIGHT: Final = 2
KEEP_ALIVE_S: Final = 30.0  # shorter than the server's, so no connection is closed as it is being used
UNIX: Final = "unix:"
_PROBE: Final = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)


def find_endpoints(engine: sa.Engine, *, ttl_s: float, boot: str) -> dict[str, str]:
    """Read worker id -> endpoint of the live workers that serve and can be reached from this boot of the host."""
    query = sa.select(worker.c.id, worker.c.endpoint, worker.c.boot).where(
        worker.c.endpoint.is_not(None),
        worker.c.draining.is_(sa.false()),
        worker.c.last_seen > after(sa.literal(-ttl_s, sa.Double)),
    )
    with engine.connect().execution_options(sqlite_read=True) as connection:
        rows = connection.execute(query).all()
    return {row.id: row.endpoint for row in rows if row.boot == boot or not row.endpoint.startswith(UNIX)}


@final
@dataclass(eq=False)
class Worker:
    """One inference process, as seen from here."""

    id: str
    endpoint: str
    client: aiohttp.ClientSession
    is_ready: bool = False
    num_in_flight: int = 0
    num_misses: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self) -> None:
        """Count a call."""
        self.num_in_flight += 1
        self.idle.clear()

    def leave(self) -> None:
        """Count the end of a call."""
        self.num_in_flight -= 1
        if not self.num_in_flight:
            self.idle.set()

    def weight(self, key: str) -> bytes:
        """Weigh this worker for a key; the heaviest is the key's own (rendezvous hashing)."""
        return hashlib.blake2b(f"{self.id}\0{key}".encode(), digest_size=8).digest()

    async def probe(self) -> None:
        """Ask for readiness."""
        try:
            async with self.client.get("/readyz", timeout=_PROBE) as response:
                status = response.status
        except TimeoutError:
            self.num_misses += 1
            self.is_ready = self.is_ready and self.num_misses < MISSES
        except aiohttp.ClientError:
            self.is_ready = False
        else:
            self.num_misses = 0
            self.is_ready = status == 200


@final
class Workers:
    """The list of workers, kept fresh by a task of its own."""

    def __init__(self, settings: Settings, engine: sa.Engine, on_change: Callable[[], None]) -> None:
        self._engine = engine
        self._ttl_s = settings.worker_ttl_s
        self._token = settings.worker_token
        self._on_change = on_change
        self._boot = boot_id()
        self._known: dict[str, Worker] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="workers")
        self._reading: asyncio.Future[dict[str, str]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._read_at = 0.0
        self._closing: set[asyncio.Task[None]] = set()
        self.ready_at = time.monotonic()  # when a worker was last known to be ready

    async def start(self) -> None:
        """Find the workers once, then again and again."""
        await self._refresh()
        self._task = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        """Stop looking, and close every connection."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for known in self._known.values():
            await known.client.close()
        await asyncio.gather(*self._closing, return_exceptions=True)
        self._known.clear()
        # Its connection has to be back before the engine closes those that it knows of.
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    def any_known(self) -> bool:
        """Tell whether any worker serves, ready or not."""
        return bool(self._known)

    def any_ready(self) -> bool:
        """Tell whether any worker can be called."""
        return any(known.is_ready for known in self._known.values())

    def look_again(self) -> None:
        """Refresh now."""
        self._read_at = 0.0
        self._hurry.set()

    def lost(self, dead: Worker) -> None:
        """Note that a worker's connection failed: it is not called until it answers a probe."""
        dead.is_ready = False
        self._hurry.set()

    def choose(self, key: str, avoid: set[str]) -> Worker | None:
        """Choose a free worker for a key: the key's own if it is free, else the least busy.

        Workers in `avoid` are taken only if there is no other. Returns None if nobody is free.
        """
        ready = [known for known in self._known.values() if known.is_ready]
        ready = [known for known in ready if known.id not in avoid] or ready
        free = [known for known in ready if known.num_in_flight < MAX_IN_FLIGHT]
        if not free:
            return None
        own = max(ready, key=lambda known: known.weight(key))
        return own if own in free else min(free, key=lambda known: known.num_in_flight)

    async def _keep_fresh(self) -> None:
        while True:
            pause = REFRESH_S if all(known.is_ready for known in self._known.values()) else PROBE_AGAIN_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._hurry.wait()
                    await asyncio.sleep(PROBE_AGAIN_S / 4)  # however often we are hurried
            self._hurry.clear()
            await self._refresh()

    async def _refresh(self) -> None:
        if time.monotonic() - self._read_at >= REFRESH_S and (endpoints := await self._read()) is not None:
            self._read_at = time.monotonic()
            self._replace(endpoints)
        # Together, so that one silent worker holds back nobody.
        await asyncio.gather(*(known.probe() for known in self._known.values()))
        if self.any_ready():
            self.ready_at = time.monotonic()
        self._on_change()

    async def _read(self) -> dict[str, str] | None:
        loop = asyncio.get_running_loop()
        if self._reading is None:
            self._reading = loop.run_in_executor(
                self._thread, lambda: find_endpoints(self._engine, ttl_s=self._ttl_s, boot=self._boot)
            )
        reading = self._reading
        await asyncio.wait((reading,), timeout=DATABASE_TIMEOUT_S)
        if not reading.done():
            return None  # silent: the read goes on, and the last list stays
        self._reading = None
        try:
            return reading.result()
        except SQLAlchemyError as error:
            log.warning("the list of workers is not fresh: %s", type(error).__name__)
            return None

    def _replace(self, endpoints: dict[str, str]) -> None:
        for gone in [known for known in self._known.values() if endpoints.get(known.id) != known.endpoint]:
            del self._known[gone.id]
            self._retire(gone)
        for worker_id, endpoint in endpoints.items():
            if worker_id not in self._known:
                try:
                    self._known[worker_id] = Worker(worker_id, endpoint, self._connect(endpoint))
                except ValueError:
                    log.warning("worker %s has an endpoint that is no URL: %s", worker_id, endpoint)

    def _retire(self, gone: Worker) -> None:
        async def close() -> None:
            if gone.num_in_flight:  # a draining worker finishes what it has
                await gone.idle.wait()
            await gone.client.close()

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _connect(self, endpoint: str) -> aiohttp.ClientSession:
        # Raises ValueError for what is no URL. Not httpx: see decision 10.
        headers: dict[str, str] = {}
        if endpoint.startswith(UNIX):
            connector = aiohttp.UnixConnector(endpoint.removeprefix(UNIX), keepalive_timeout=KEEP_ALIVE_S)
            endpoint = "http://worker"
        else:
            if not endpoint.startswith(("http://", "https://")):
                raise ValueError(endpoint)
            connector = aiohttp.TCPConnector(keepalive_timeout=KEEP_ALIVE_S)
            if self._token is not None:
                headers["authorization"] = f"Bearer {self._token.get_secret_value()}"
        cookies = aiohttp.DummyCookieJar()
        return aiohttp.ClientSession(endpoint, connector=connector, headers=headers, cookie_jar=cookies)
