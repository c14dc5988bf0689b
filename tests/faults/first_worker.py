"""A worker of the first schema: what it sent then, word for word, until it has found nothing to do for a while.

Run as a process: `first_worker.py URL ID`. It writes a line for every job that it ended.
"""

from __future__ import annotations

import sys
import time

import sqlalchemy as sa

from service.contract.dialects import open_engine

POSTGRES = """
WITH pick AS MATERIALIZED (SELECT job.id AS id FROM job
    WHERE job.state = 'queued' AND job.lane = 'bulk' AND job.kind IN ('ingest', 'train', 'embed', 'evaluate')
        AND (EXISTS (SELECT * FROM worker WHERE worker.id = :me AND worker.draining IS false))
    ORDER BY job.priority, job.fair_seq, job.id LIMIT 1 FOR UPDATE OF job SKIP LOCKED)
UPDATE job SET state='running', attempt=job.attempt + 1, lease_epoch=job.lease_epoch + 1, worker_id=:me,
    started_at=statement_timestamp(), deadline_at=statement_timestamp() + make_interval(secs => job.deadline_s)
WHERE job.id IN (SELECT pick.id FROM pick)
RETURNING job.id, job.public_id, job.tenant_id, job.lane, job.kind, job.lease_epoch, job.attempt, job.max_attempts,
    job.deadline_s, job.priority, job.fair_seq, job.args
"""
SQLITE = (
    POSTGRES.replace("FOR UPDATE OF job SKIP LOCKED", "")
    .replace(
        "statement_timestamp() + make_interval(secs => job.deadline_s)", "isthmus_now() + job.deadline_s * 1000000"
    )
    .replace("statement_timestamp()", "isthmus_now()")
)
FINISH = """
UPDATE job SET state='succeeded', worker_id=NULL, deadline_at=NULL, finished_at={now}, error=NULL
WHERE job.id = :job AND job.state = 'running' AND job.lease_epoch = :epoch AND job.worker_id = :me
    AND job.cancel_requested_at IS NULL
"""
RESULT = (
    "INSERT INTO job_result (job_id, tenant_id, epoch, body, created_at) VALUES (:job, :tenant, :epoch, '{{}}', {now})"
)
EVENT = """INSERT INTO job_event (job_id, tenant_id, epoch, at, type, detail)
VALUES (:job, :tenant, :epoch, {now}, '{type}', '{{}}')"""
REGISTER = """INSERT INTO worker (id, lanes, kinds, host, boot, pid, version, draining, started_at, last_seen)
VALUES (:me, '["bulk"]', '[]', 'h', 'b', 1, '0', false, {now}, {now})"""
BEAT = "UPDATE worker SET last_seen={now} WHERE worker.id = :me RETURNING worker.draining"
WORK_S = 0.01
IDLE_S = 3.0


def main(url: str, me: str) -> None:
    engine = open_engine(url)
    sqlite = engine.dialect.name == "sqlite"
    clock = "isthmus_now()" if sqlite else "statement_timestamp()"

    def send(conn: sa.Connection, statement: str, **values: object) -> sa.CursorResult[tuple[object, ...]]:
        text = statement.replace("{now}", clock).replace("{{}}", "{}")
        return conn.execute(sa.text(text), values)

    with engine.begin() as conn:
        send(conn, REGISTER, me=me)
    last = time.monotonic()
    while time.monotonic() - last < IDLE_S:
        with engine.begin() as conn:
            send(conn, BEAT, me=me)
        with engine.begin() as conn:
            found = send(conn, SQLITE if sqlite else POSTGRES, me=me).one_or_none()
            if found is not None:
                at = {"job": found.id, "tenant": found.tenant_id, "epoch": found.lease_epoch}
                send(conn, EVENT.replace("{type}", "started"), **at)
        if found is None:
            time.sleep(0.05)
            continue
        time.sleep(WORK_S)
        last = time.monotonic()
        at = {"job": found.id, "tenant": found.tenant_id, "epoch": found.lease_epoch}
        with engine.begin() as conn:
            held = {"job": found.id, "epoch": found.lease_epoch, "me": me}
            assert send(conn, FINISH, **held).rowcount == 1
            send(conn, RESULT, **at)
            send(conn, EVENT.replace("{type}", "succeeded"), **at)
        sys.stdout.write(f"{found.public_id}\n")
        sys.stdout.flush()
    engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:])
