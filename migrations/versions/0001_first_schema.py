"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# What the tables meant when this was written, whatever they mean now.
INSTANT = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")
DOUBLE: sa.Double[float] = sa.Double()
BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, comment="SHA-256 of 256 random bits; the key is shown once"),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("expires_at", INSTANT),
        sa.Column("revoked_at", INSTANT),
        sa.Column("last_used_at", INSTANT),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_key_hash")),
    )
    op.create_table(
        "dataset",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, comment="ingesting, ready, failed"),
        sa.Column("artifact", sa.Text()),
        sa.Column("digest", sa.String(64)),
        sa.Column("info", JSON, comment="the IngestResult"),
        sa.Column("meta", JSON),
        sa.Column("job_id", sa.String(64), comment="public id of the ingest job"),
        sa.Column("deleted_at", INSTANT),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset")),
    )
    op.create_index("dataset_tenant", "dataset", ["tenant_id", "created_at"])
    op.create_table(
        "embedding_set",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("artifact", sa.Text(), nullable=False),
        sa.Column("info", JSON, nullable=False, comment="the EmbedResult"),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("deleted_at", INSTANT),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_embedding_set")),
    )
    op.create_index("embedding_set_tenant", "embedding_set", ["tenant_id", "created_at"])
    op.create_table(
        "idempotency",
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("status", sa.SmallInteger(), comment="null while the first request is in progress"),
        sa.Column("body", JSON),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "key", name=op.f("pk_idempotency")),
    )
    op.create_index("idempotency_created", "idempotency", ["created_at"])
    op.create_table(
        "job",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("public_id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("lane", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("fair_seq", sa.BigInteger(), nullable=False, comment="virtual start time (start-time fair queueing)"),
        sa.Column("run_at", INSTANT, nullable=False),
        sa.Column("attempt", sa.SmallInteger(), nullable=False),
        sa.Column("max_attempts", sa.SmallInteger(), nullable=False),
        sa.Column("lease_epoch", sa.BigInteger(), nullable=False, comment="fencing number: +1 per claim, never reset"),
        sa.Column("worker_id", sa.String(64), comment="no foreign key: the worker row may vanish first"),
        sa.Column("deadline_s", sa.Integer(), nullable=False),
        sa.Column("started_at", INSTANT),
        sa.Column("deadline_at", INSTANT),
        sa.Column("finished_at", INSTANT),
        sa.Column("cancel_requested_at", INSTANT),
        sa.Column("args", JSON, nullable=False),
        sa.Column("meta", JSON, comment="the caller's own metadata"),
        sa.Column("error", JSON, comment="the last one; the history is in job_event"),
        sa.Column("unique_key", sa.Text()),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name=op.f("ck_job_leased")),
        sa.CheckConstraint(
            "(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name=op.f("ck_job_finished")
        ),
        sa.CheckConstraint(
            "state IN ('scheduled','queued','running','succeeded','failed','cancelled')", name=op.f("ck_job_state")
        ),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("ck_job_priority")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
        sa.UniqueConstraint("public_id", name=op.f("uq_job_public_id")),
        postgresql_with={
            "fillfactor": 80,
            "autovacuum_vacuum_scale_factor": 0.01,
            "autovacuum_vacuum_threshold": 500,
            "autovacuum_vacuum_cost_delay": 0,
            "autovacuum_analyze_scale_factor": 0.05,
        },
        sqlite_autoincrement=True,
    )
    op.create_index(
        "job_claim",
        "job",
        ["lane", "priority", "fair_seq", "id"],
        postgresql_where=sa.text("state = 'queued'"),
        sqlite_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "job_deadline",
        "job",
        ["deadline_at"],
        postgresql_where=sa.text("state = 'running'"),
        sqlite_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "job_due",
        "job",
        ["run_at"],
        postgresql_where=sa.text("state = 'scheduled'"),
        sqlite_where=sa.text("state = 'scheduled'"),
    )
    op.create_index(
        "job_prune",
        "job",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
        sqlite_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "job_running",
        "job",
        ["worker_id"],
        postgresql_where=sa.text("state = 'running'"),
        sqlite_where=sa.text("state = 'running'"),
    )
    op.create_index("job_tenant", "job", ["tenant_id", "id"])
    op.create_index(
        "job_unique",
        "job",
        ["tenant_id", "kind", "unique_key"],
        unique=True,
        postgresql_where=sa.text("unique_key IS NOT NULL AND state IN ('scheduled','queued','running')"),
        sqlite_where=sa.text("unique_key IS NOT NULL AND state IN ('scheduled','queued','running')"),
    )
    op.create_table(
        "model",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("artifact", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("info", JSON, nullable=False, comment="the TrainResult"),
        sa.Column("job_id", sa.String(64), comment="public id of the job that made it"),
        sa.Column("deleted_at", INSTANT),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model")),
    )
    op.create_index("model_tenant", "model", ["tenant_id", "created_at"])
    op.create_table(
        "tenant_queue",
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("lane", sa.String(16), nullable=False),
        sa.Column("vtime", sa.BigInteger(), nullable=False),
        sa.Column("weight", sa.Integer(), nullable=False),
        sa.Column("max_running", sa.Integer()),
        sa.Column("max_queued", sa.Integer()),
        sa.PrimaryKeyConstraint("tenant_id", "lane", name=op.f("pk_tenant_queue")),
    )
    op.create_index("tenant_queue_vtime", "tenant_queue", ["lane", "vtime"])
    op.create_table(
        "worker",
        sa.Column("id", sa.String(64), nullable=False, comment="one row per process start, never per host name"),
        sa.Column("lanes", JSON, nullable=False),
        sa.Column("kinds", JSON, nullable=False, comment="job kinds that this version runs"),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column(
            "boot",
            sa.Text(),
            nullable=False,
            comment="id of the host's boot: a unix endpoint is used on the same boot only",
        ),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("endpoint", sa.Text(), comment="unix:/path or http://host:port of the inference process"),
        sa.Column("device", sa.Text()),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("started_at", INSTANT, nullable=False),
        sa.Column("last_seen", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_worker")),
        postgresql_with={"fillfactor": 50},
    )
    op.create_table(
        "alias",
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("model_id", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_alias_model_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tenant_id", "name", name=op.f("pk_alias")),
    )
    op.create_index("alias_model", "alias", ["model_id"])
    op.create_table(
        "checkpoint",
        sa.Column("job_id", BIG, autoincrement=False, nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("artifact", sa.Text(), nullable=False, comment="of the checkpoint, whose model/ is a model"),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_checkpoint_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "step", name=op.f("pk_checkpoint")),
    )
    op.create_table(
        "job_event",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("job_id", BIG, autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("detail", JSON, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_event_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_event")),
        sqlite_autoincrement=True,
    )
    op.create_index("job_event_job", "job_event", ["job_id", "id"])
    op.create_table(
        "job_input",
        sa.Column("job_id", BIG, autoincrement=False, nullable=False),
        sa.Column(
            "ref",
            sa.String(64),
            nullable=False,
            comment="id of the data set, model, or job (for its checkpoint) that is read",
        ),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_input_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "ref", name=op.f("pk_job_input")),
    )
    op.create_index("job_input_ref", "job_input", ["ref"])
    op.create_table(
        "job_progress",
        sa.Column("job_id", BIG, autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("done", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger()),
        sa.Column("eta_s", sa.Float()),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_progress_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job_progress")),
        postgresql_with={"fillfactor": 50},
    )
    op.create_table(
        "job_result",
        sa.Column("job_id", BIG, autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("body", JSON, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_result_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job_result")),
    )
    op.create_table(
        "metric",
        sa.Column("job_id", BIG, autoincrement=False, nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(128), nullable=False, comment="loss/a+b takes two modality names"),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("value", DOUBLE, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_metric_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "epoch", "name", "step", name=op.f("pk_metric")),
    )


def downgrade() -> None:
    op.drop_table("metric")
    op.drop_table("job_result")
    op.drop_table("job_progress")
    op.drop_table("job_input")
    op.drop_table("job_event")
    op.drop_table("checkpoint")
    op.drop_table("alias")
    op.drop_table("worker")
    op.drop_table("tenant_queue")
    op.drop_table("model")
    op.drop_table("job")
    op.drop_table("idempotency")
    op.drop_table("embedding_set")
    op.drop_table("dataset")
    op.drop_table("api_key")
