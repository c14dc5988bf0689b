"""The rows: SQLAlchemy tables, the same for SQLite and PostgreSQL.

`migrations/` creates what stands here and a test compares the two. `queue.py` is the only writer of `job` and of the
tables that hang on it. Every table carries `tenant_id`, and every select of a tenant's rows goes through `owned`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    SmallInteger,
    String,
    Table,
    Text,
)

from service.contract.dialects import Big, Instant, Json, now

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

MAX_ARGS_BYTES: Final = 65_536


def _created() -> Column[datetime]:
    return Column("created_at", Instant, nullable=False, default=now())


def _partial(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    # A literal predicate: PostgreSQL's generic plans cannot use a partial index for a bound parameter.
    predicate = sa.text(where)
    return Index(name, *columns, unique=unique, postgresql_where=predicate, sqlite_where=predicate)


worker = Table(
    "worker",
    metadata,
    Column("id", String(64), primary_key=True, comment="one row per process start, never per host name"),
    Column("lanes", Json, nullable=False),
    Column("kinds", Json, nullable=False, comment="job kinds that this version runs"),
    Column("host", Text, nullable=False),
    Column(
        "boot", Text, nullable=False, comment="id of the host's boot: a unix endpoint is used on the same boot only"
    ),
    Column("pid", Integer, nullable=False),
    Column("endpoint", Text, comment="unix:/path or http://host:port of the inference process"),
    Column("device", Text),
    Column("version", Text, nullable=False),
    Column("draining", Boolean, nullable=False, default=False),
    Column("started_at", Instant, nullable=False, default=now()),
    Column("last_seen", Instant, nullable=False, default=now()),  # not indexed: heartbeats stay HOT updates
    postgresql_with={"fillfactor": 50},
)

job = Table(
    "job",
    metadata,
    Column("id", Big, primary_key=True, autoincrement=True),
    Column("public_id", String(64), nullable=False, unique=True),
    Column("tenant_id", String(64), nullable=False),
    Column("lane", String(16), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("name", Text),
    Column("state", String(16), nullable=False, default="queued"),
    Column("priority", SmallInteger, nullable=False, default=5),
    Column("fair_seq", BigInteger, nullable=False, comment="virtual start time (start-time fair queueing)"),
    Column("run_at", Instant, nullable=False, default=now()),
    Column("attempt", SmallInteger, nullable=False, default=0),
    Column("max_attempts", SmallInteger, nullable=False, default=5),
    Column("lease_epoch", BigInteger, nullable=False, default=0, comment="fencing number: +1 per claim, never reset"),
    Column("worker_id", String(64), comment="no foreign key: the worker row may vanish first"),
    Column("deadline_s", Integer, nullable=False),
    Column("started_at", Instant),
    Column("deadline_at", Instant),
    Column("finished_at", Instant),
    Column("cancel_requested_at", Instant),
    Column("args", Json, nullable=False),
    Column("meta", Json, comment="the caller's own metadata"),
    Column("error", Json, comment="the last one; the history is in job_event"),
    Column("unique_key", Text),
    _created(),
    Column("request_id", Text, comment="of the request that submitted it"),
    CheckConstraint("state IN ('scheduled','queued','running','succeeded','failed','cancelled')", name="state"),
    CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
    CheckConstraint("(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name="finished"),
    CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="leased"),
    _partial("job_claim", "lane", "priority", "fair_seq", "id", where="state = 'queued'"),
    _partial("job_fair", "lane", "fair_seq", "id", where="state = 'queued'"),
    _partial("job_due", "run_at", where="state = 'scheduled'"),
    _partial("job_running", "worker_id", where="state = 'running'"),
    _partial("job_deadline", "deadline_at", where="state = 'running'"),
    _partial("job_prune", "finished_at", where="finished_at IS NOT NULL"),
    _partial(
        "job_unique",
        "tenant_id",
        "kind",
        "unique_key",
        where="unique_key IS NOT NULL AND state IN ('scheduled','queued','running')",
        unique=True,
    ),
    Index("job_tenant", "tenant_id", "id"),
    sqlite_autoincrement=True,
    postgresql_with={
        "fillfactor": 80,
        "autovacuum_vacuum_scale_factor": 0.01,
        "autovacuum_vacuum_threshold": 500,
        "autovacuum_vacuum_cost_delay": 0,
        "autovacuum_analyze_scale_factor": 0.05,
    },
)


def _job_id(*, primary_key: bool = False) -> Column[int]:
    return Column(
        "job_id",
        Big,
        ForeignKey("job.id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
        autoincrement=False,
    )


job_result = Table(
    "job_result",
    metadata,
    _job_id(primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("body", Json, nullable=False),
    _created(),
)

job_progress = Table(
    "job_progress",
    metadata,
    _job_id(primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("done", BigInteger, nullable=False),
    Column("total", BigInteger),
    Column("eta_s", sa.Float),
    Column("updated_at", Instant, nullable=False, default=now()),
    postgresql_with={"fillfactor": 50},
)

job_event = Table(
    "job_event",
    metadata,
    Column("id", Big, primary_key=True, autoincrement=True),
    _job_id(),
    Column("tenant_id", String(64), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("at", Instant, nullable=False, default=now()),
    Column("type", String(32), nullable=False),
    Column("detail", Json, nullable=False),
    Index("job_event_job", "job_id", "id"),
    sqlite_autoincrement=True,
)

metric = Table(
    "metric",
    metadata,
    _job_id(primary_key=True),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("name", String(128), primary_key=True, comment="loss/a+b takes two modality names"),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant_id", String(64), nullable=False),
    Column("value", sa.Double, nullable=False),
)

job_input = Table(
    "job_input",
    metadata,
    _job_id(primary_key=True),
    Column(
        "ref",
        String(64),
        primary_key=True,
        comment="id of the data set, model, or job (for its checkpoint) that is read",
    ),
    Column("tenant_id", String(64), nullable=False),
    Index("job_input_ref", "ref"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    _job_id(primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant_id", String(64), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("artifact", Text, nullable=False, comment="of the checkpoint, whose model/ is a model"),
    Column("digest", String(64), nullable=False),
    Column("metrics", Json, nullable=False),
    _created(),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_sha256", String(64), nullable=False),
    Column("status", SmallInteger, comment="null while the first request is in progress"),
    Column("body", Json),
    _created(),
    Index("idempotency_created", "created_at"),
)

tenant_queue = Table(
    "tenant_queue",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("lane", String(16), primary_key=True),
    Column("vtime", BigInteger, nullable=False, default=0),
    Column("weight", Integer, nullable=False, default=1),
    Column("max_running", Integer),
    Column("max_queued", Integer),
    Index("tenant_queue_vtime", "lane", "vtime"),
    _partial("tenant_queue_capped", "lane", where="max_running IS NOT NULL"),
)

dataset = Table(
    "dataset",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("state", String(16), nullable=False, default="ingesting", comment="ingesting, ready, failed"),
    Column("artifact", Text),
    Column("digest", String(64)),
    Column("info", Json, comment="the IngestResult"),
    Column("meta", Json),
    Column("job_id", String(64), comment="public id of the ingest job"),
    Column("deleted_at", Instant),
    _created(),
    Index("dataset_tenant", "tenant_id", "created_at"),
)

model = Table(
    "model",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("artifact", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("info", Json, nullable=False, comment="the TrainResult"),
    Column("job_id", String(64), comment="public id of the job that made it"),
    Column("deleted_at", Instant),
    _created(),
    Index("model_tenant", "tenant_id", "created_at"),
)

alias = Table(
    "alias",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("model_id", String(64), ForeignKey("model.id", ondelete="CASCADE"), nullable=False),
    Index("alias_model", "model_id"),
)

embedding_set = Table(
    "embedding_set",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("artifact", Text, nullable=False),
    Column("info", Json, nullable=False, comment="the EmbedResult"),
    Column("job_id", String(64), nullable=False),
    Column("deleted_at", Instant),
    _created(),
    Index("embedding_set_tenant", "tenant_id", "created_at"),
)

api_key = Table(
    "api_key",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column(
        "hash", String(64), nullable=False, unique=True, comment="SHA-256 of 256 random bits; the key is shown once"
    ),
    Column("scopes", Json, nullable=False),
    Column("requests_per_minute", Integer),
    Column("expires_at", Instant),
    Column("revoked_at", Instant),
    Column("last_used_at", Instant),
    _created(),
)


def owned(table: Table, tenant: str) -> sa.Select[Any]:
    """Select a tenant's rows of a table, without those that were deleted.

    Every read of the API starts here, so a foreign id is answered like an unknown one.
    """
    query = sa.select(table).where(table.c.tenant_id == tenant)
    return query.where(table.c.deleted_at.is_(None)) if "deleted_at" in table.c else query
