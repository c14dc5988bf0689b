"""Run migrations on the database of the settings, or on the URL in the config's `url` attribute.

No transaction is opened around the run here: each revision has its own, and `autocommit_block()` (for CREATE INDEX
CONCURRENTLY) needs to be outside of all of them.
"""

from __future__ import annotations

import math
import time

import sqlalchemy as sa
from alembic import context

from service.contract.dialects import open_engine
from service.contract.settings import Settings
from service.contract.tables import metadata

LOCK = 0x1574_3505  # one migration at a time


def run() -> None:
    url = context.config.attributes.get("url") or Settings().resolved_database_url()
    engine = open_engine(url, pool_size=1, answer_s=math.inf)
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                # A revision may rewrite a large table, but never makes others wait for its locks for long.
                connection.execute(sa.text("SET statement_timeout = 0"))
                connection.execute(sa.text("SET idle_in_transaction_session_timeout = 0"))
                connection.execute(sa.text("SET lock_timeout = '2s'"))
                connection.commit()
                # Asked for again and again: who waits within a statement holds up CREATE INDEX CONCURRENTLY, and so
                # the one that it waits for.
                while not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(LOCK))):
                    connection.commit()
                    time.sleep(0.1)
                connection.commit()
            context.configure(
                connection=connection,
                target_metadata=metadata,
                transactional_ddl=True,
                transaction_per_migration=True,
                render_as_batch=engine.dialect.name == "sqlite",
                compare_type=True,
            )
            with context.begin_transaction():
                context.run_migrations()
    finally:
        engine.dispose()  # a closed connection gives its advisory lock back


if context.is_offline_mode():
    msg = "SQL scripts are not written: what a revision does depends on the database it meets"
    raise SystemExit(msg)
run()
