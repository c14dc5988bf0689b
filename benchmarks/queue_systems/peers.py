# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# They are installed for the benchmark alone.
"""The queues that ours is measured next to, each run by its own worker."""

from __future__ import annotations

import logging
import sys
from typing import Any, Final, final

import asyncpg
import pgqueuer
import procrastinate
import uvloop
from pgqueuer.types import QueueExecutionMode

from benchmarks.queue_systems.commands import Ran, System, serve


@final
class Procrastinate(System):
    """Its worker, with its psycopg connector."""

    def __init__(self, url: str) -> None:

        self.app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
        self.ran = Ran()

        @self.app.task(name="no_op")
        async def no_op() -> None:
            self.ran.no_op()

        self.task: Any = no_op

    async def install(self) -> None:
        """Make the tables."""
        await self.prepare()
        await self.app.schema_manager.apply_schema_async()

    async def fill(self, num: int) -> None:
        """Defer in batches."""
        await self.prepare()
        run = self.app.connector.execute_query_async
        await run("TRUNCATE procrastinate_jobs, procrastinate_workers CASCADE")
        for at in range(0, num, 1000):
            await self.task.batch_defer_async(*[{} for _ in range(min(1000, num - at))])
        await run("ANALYZE")

    async def prepare(self) -> None:
        """Open the pool, once."""
        await self.app.open_async()

    async def drain(self, size: int, ran: Ran) -> None:
        """Run a worker without waiting for more."""
        self.ran = ran
        await self.app.run_worker_async(wait=False, concurrency=size, install_signal_handlers=False)


@final
class PgQueuer(System):
    """Its queue manager, with its asyncpg driver; it buffers completions on its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection: Any = None

    async def install(self) -> None:
        """Make the tables."""
        await self.prepare()
        await pgqueuer.Queries(pgqueuer.AsyncpgDriver(self.connection)).install()

    async def fill(self, num: int) -> None:
        """Enqueue in batches."""
        await self.prepare()
        await self.connection.execute("TRUNCATE pgqueuer, pgqueuer_log, pgqueuer_statistics CASCADE")
        queries = pgqueuer.Queries(pgqueuer.AsyncpgDriver(self.connection))
        for at in range(0, num, 1000):
            some = min(1000, num - at)
            await queries.enqueue(["no_op"] * some, [None] * some, [0] * some)
        await self.connection.execute("ANALYZE")

    async def prepare(self) -> None:
        """Connect anew: a queue manager closes its listener for good."""
        if self.connection is not None:
            await self.connection.close()
        self.connection = await asyncpg.connect(self.url)

    async def drain(self, size: int, ran: Ran) -> None:
        """Run a queue manager in its mode for draining."""
        manager = pgqueuer.QueueManager(pgqueuer.Queries(pgqueuer.AsyncpgDriver(self.connection)))

        async def no_op(_job: pgqueuer.Job) -> None:
            ran.no_op()

        manager.entrypoint("no_op")(no_op)
        await manager.run(batch_size=size, mode=QueueExecutionMode.drain)


SYSTEMS: Final = {"procrastinate": Procrastinate, "pgqueuer": PgQueuer}

if __name__ == "__main__":
    logging.getLogger("procrastinate").setLevel(logging.ERROR)  # it warns about apps of the main module
    # pgqueuer's command line takes this loop when it is there; procrastinate is no slower with it.
    uvloop.run(serve(SYSTEMS[sys.argv[1]](sys.argv[2])))
