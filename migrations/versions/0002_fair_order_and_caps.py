"""What claims need beside the order by priority: the order by virtual start, and who has a cap; whose request a job is.

Workers of the first schema go on beside it: nothing that they read or write changes.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Concurrently, so that jobs come and go meanwhile; an index that a broken attempt left behind is not valid. What
    # came before this block would be there to stay, and in the way of the next attempt.
    with op.get_context().autocommit_block():
        for index in ("job_fair", "tenant_queue_capped"):
            op.drop_index(index, if_exists=True, postgresql_concurrently=True)
        op.create_index(
            "job_fair",
            "job",
            ["lane", "fair_seq", "id"],
            postgresql_where=sa.text("state = 'queued'"),
            sqlite_where=sa.text("state = 'queued'"),
            postgresql_concurrently=True,
        )
        op.create_index(
            "tenant_queue_capped",
            "tenant_queue",
            ["lane"],
            postgresql_where=sa.text("max_running IS NOT NULL"),
            sqlite_where=sa.text("max_running IS NOT NULL"),
            postgresql_concurrently=True,
        )
    op.add_column("job", sa.Column("request_id", sa.Text(), comment="of the request that submitted it"))


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index("tenant_queue_capped", if_exists=True, postgresql_concurrently=True)
        op.drop_index("job_fair", if_exists=True, postgresql_concurrently=True)
    op.drop_column("job", "request_id")
