"""What two do at once comes out as if one had done it after the other, and both are told so."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import sqlalchemy as sa

from service.contract import leases, outcomes, queue
from service.contract.dialects import open_engine
from service.contract.jobs import KINDS, IngestArgs, IngestResult
from service.contract.leases import Claim, WorkerInfo
from service.contract.tables import dataset, idempotency, job, job_event, job_result, tenant_queue
from service.contract.wake import Listener
from service.contract.word import new_id
from service.serve import bind

ROOT: Final = Path(__file__).resolve().parents[2]
JOBS: Final = "/v1/jobs"
TRAIN: Final[dict[str, Any]] = {
    "kind": "train",
    "recipe": {
        "towers": {
            "image": {"tokens": {"kind": "image", "size": 8, "patch": 4}},
            "text": {"tokens": {"kind": "text"}},
        },
        "pairs": [{"dataset": "ds_a", "modalities": ["image", "text"]}],
    },
}
ENDED: Final = ("succeeded", "failed", "cancelled")


@dataclass
class Api:
    """An API as a process of its own, its database, and a worker that tests play."""

    http: httpx.Client
    engine: sa.Engine
    worker: str

    def add(self, num: int = 1, **options: Any) -> list[str]:
        """Enqueue ingest jobs of the API's own tenant."""
        with self.engine.begin() as conn:
            return [
                queue.enqueue(conn, tenant="default", args=IngestArgs(dataset="ds_x", source="s"), **options)
                for _ in range(num)
            ]

    def claim(self, limit: int = 1) -> list[Claim]:
        return leases.claim(self.engine, worker_id=self.worker, lane="bulk", kinds=KINDS, ttl_s=1e6, limit=limit)

    def finish(self, claim: Claim) -> str | None:
        return outcomes.finish(self.engine, claim, self.worker, RESULT)

    def fail(self, claim: Claim) -> None:
        error = {"type": "Permanent", "message": "no", "code": None}
        assert outcomes.fail(self.engine, claim, self.worker, error, retry=False) == "failed"

    def history(self, public_id: str) -> list[str]:
        query = sa.select(job_event.c.type).join(job, job.c.id == job_event.c.job_id).order_by(job_event.c.id)
        with self.engine.connect() as conn:
            return list(conn.scalars(query.where(job.c.public_id == public_id)))

    def count(self, table: sa.Table) -> int:
        with self.engine.connect() as conn:
            return conn.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


RESULT: Final = IngestResult(
    artifact="datasets/ds_x/1",
    num_samples=1,
    num_rejected=0,
    rejects=[],
    modalities={"text": "text"},
    splits={"train": 1},
    labels=[],
    statistics={},
    digest="d",
    num_bytes=1,
)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("races") / "isthmus.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    with request.getfixturevalue("postgres").database("migrated") as url:
        yield url


@pytest.fixture(scope="module")
def running(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("api")
    engine = open_engine(database, pool_size=20)
    row = {"id": "ds_a", "tenant_id": "default", "name": "n", "source": "s", "state": "ready", "digest": "d"}
    with engine.begin() as conn:
        info = {"modalities": {"image": "image", "text": "text"}}
        conn.execute(sa.insert(dataset).values(**row, artifact="datasets/ds_a/1", info=info))
    worker = new_id("up")
    leases.register(engine, WorkerInfo(worker, ["bulk"], list(KINDS), "h", "b", 1, None, "cpu", "0"))
    environment = {**os.environ, "ISTHMUS_DATABASE_URL": database, "PYTHONPATH": str(ROOT)}
    with bind("127.0.0.1", 0, exactly=False) as sock:
        port = sock.getsockname()[1]
        command = ["-m", "service.cli", "api", "--fd", str(sock.fileno()), "--data", str(folder)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", *command], env=environment, stderr=log, stdout=log, pass_fds=[sock.fileno()]
            )
        limits = httpx.Limits(max_connections=50)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False, limits=limits) as http:
            assert http.get("/healthz").status_code == 200
            yield Api(http, engine, worker)
    process.terminate()
    assert process.wait(30) == 0, (folder / "log").read_text()
    engine.dispose()


@pytest.fixture
def api(running: Api) -> Api:
    """The API on an empty queue."""
    with running.engine.begin() as conn:
        for table in (job, idempotency, tenant_queue):
            conn.execute(sa.delete(table))
    return running


def at_once(*acts: Callable[[], Any]) -> list[Any]:
    """Do all of it at the same time and return what came of each."""
    barrier = threading.Barrier(len(acts))

    def begin(act: Callable[[], Any]) -> Any:
        barrier.wait()
        return act()

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(begin, acts))


def test_fifty_requests_with_one_key_at_once_make_one_job_and_get_equal_answers(api: Api) -> None:
    headers = {"idempotency-key": "once"}
    answers = at_once(*[lambda: api.http.post(JOBS, json=TRAIN, headers=headers)] * 50)
    assert {answer.status_code for answer in answers} == {202}
    assert all(answer.json() == answers[0].json() for answer in answers)
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 49
    assert api.count(job) == 1
    assert api.history(answers[0].json()["id"]) == ["queued"]


def test_a_key_that_was_used_for_another_request_makes_no_job(api: Api) -> None:
    headers = {"idempotency-key": "mine"}
    assert api.http.post(JOBS, json=TRAIN, headers=headers).status_code == 202
    refused = api.http.post(JOBS, json=TRAIN | {"priority": 1}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "idempotency-key")
    assert api.count(job) == 1


def test_two_requests_with_one_key_at_once_are_one_job_and_one_refusal_if_they_differ(api: Api) -> None:
    for number in range(10):
        headers = {"idempotency-key": f"key {number}"}
        answers = at_once(
            lambda headers=headers: api.http.post(JOBS, json=TRAIN, headers=headers),
            lambda headers=headers: api.http.post(JOBS, json=TRAIN | {"priority": 1}, headers=headers),
        )
        assert sorted(answer.status_code for answer in answers) == [202, 422]
    assert api.count(job) == 10


def test_an_enqueue_that_is_rolled_back_leaves_no_job_and_wakes_nobody(engine: sa.Engine) -> None:
    args = IngestArgs(dataset="ds_x", source="s")
    with closing(Listener(engine)) as listener:
        listener.open()
        for stop in (RuntimeError, KeyboardInterrupt):
            with suppress(stop), engine.begin() as conn:
                queue.enqueue(conn, tenant="t", args=args, unique_key="k")
                raise stop
        assert not listener.wait(0.5)
        with engine.connect() as conn:
            for table in (job, job_event, tenant_queue):
                assert conn.execute(sa.select(table)).all() == []
        with engine.begin() as conn:
            queue.enqueue(conn, tenant="t", args=args, unique_key="k")
        assert listener.wait(10)


def test_twenty_enqueues_with_one_unique_key_at_once_are_one_job(api: Api) -> None:
    args = IngestArgs(dataset="ds_x", source="s")

    def add(key: str) -> str:
        with api.engine.begin() as conn:
            return queue.enqueue(conn, tenant="default", args=args, unique_key=key)

    for number in range(5):
        found = at_once(*[lambda number=number: add(f"key {number}")] * 20)
        assert len(set(found)) == 1
        assert api.history(found[0]) == ["queued"]
        assert api.count(job) == number + 1


def test_an_end_and_twenty_enqueues_with_its_unique_key_at_once_leave_one_unfinished_job(api: Api) -> None:
    args = IngestArgs(dataset="ds_x", source="s")

    def add() -> str:
        with api.engine.begin() as conn:
            return queue.enqueue(conn, tenant="default", args=args, unique_key="k")

    def stop(public_id: str) -> None:
        with api.engine.begin() as conn:
            queue.cancel(conn, "default", public_id)

    for _ in range(5):
        first = add()
        at_once(lambda first=first: stop(first), *[add] * 19)
        with api.engine.connect() as conn:
            unfinished = conn.scalars(sa.select(job.c.public_id).where(job.c.state.not_in(ENDED))).all()
        assert len(unfinished) <= 1
        for left in unfinished:
            stop(left)
    with api.engine.connect() as conn:
        assert conn.scalars(sa.select(job.c.state).distinct()).all() == ["cancelled"]


def test_a_cancel_and_an_end_at_once_agree_with_the_answer(api: Api) -> None:
    """Five hundred times on each database, with the end at a random moment of the cancellation."""
    rng = random.Random(0)
    api.add(500)
    answers: Counter[str] = Counter()
    while claims := api.claim(limit=50):
        for claim in claims:

            def end(claim: Claim = claim, wait_s: float = rng.uniform(0, 0.012)) -> str | None:
                time.sleep(wait_s)
                return api.finish(claim)

            answer, ended = at_once(lambda claim=claim: api.http.post(f"{JOBS}/{claim.public_id}/cancel"), end)
            shown = api.http.get(f"{JOBS}/{claim.public_id}").json()
            if answer.status_code == 200:
                assert answer.json()["status"] in ("cancelling", "cancelled")
                assert (ended, shown["status"], shown["result"]) == ("cancelled", "cancelled", None)
            else:
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, "job_already_finished")
                assert (ended, shown["status"]) == ("succeeded", "succeeded")
                assert shown["result"] is not None
            assert [each for each in api.history(claim.public_id) if each in ENDED] == [ended]
            answers[shown["status"]] += 1
    assert answers.total() == 500
    assert min(answers["cancelled"], answers["succeeded"]) > 10, "one of them was always first: this was no race"
    assert api.count(job_result) == answers["succeeded"]


def test_two_retries_at_once_are_one(api: Api) -> None:
    for _ in range(20):
        (public_id,) = api.add()
        (claim,) = api.claim()
        api.fail(claim)
        answers = at_once(*[lambda public_id=public_id: api.http.post(f"{JOBS}/{public_id}/retry")] * 2)
        assert sorted(answer.status_code for answer in answers) == [200, 400]
        refused = next(answer for answer in answers if answer.status_code == 400)
        assert refused.json()["error"]["code"] == "job_not_retryable"
        assert api.history(public_id) == ["queued", "started", "failed", "queued"]
        assert api.http.post(f"{JOBS}/{public_id}/cancel").status_code == 200


def test_whoever_reads_while_jobs_are_pruned_gets_them_or_is_told_that_they_are_gone(api: Api) -> None:
    statuses: Counter[int] = Counter()
    for _ in range(4):
        names = api.add(300)
        with api.engine.begin() as conn:
            for name in names:
                queue.cancel(conn, "default", name)
        pruned = threading.Event()

        def read(part: Sequence[str], pruned: threading.Event = pruned) -> list[httpx.Response]:
            found: list[httpx.Response] = []
            paths = [f"{JOBS}/{name}{rest}" for name in part for rest in ("", "/events", "/metrics", "/checkpoints")]
            while not pruned.is_set() or not found:
                found.append(api.http.get(random.choice(paths)))
                found.append(api.http.get(f"{JOBS}?limit=100"))
            return found

        def prune(pruned: threading.Event = pruned) -> int:
            time.sleep(0.05)
            num = 0
            for _ in range(3):
                num += queue.prune(api.engine, older_than_s=0)
            pruned.set()
            return num

        *answers, num = at_once(*[lambda names=names, read=read: read(names)] * 4, prune)
        assert num == 300
        statuses.update(answer.status_code for found in answers for answer in found)
        assert api.http.get(f"{JOBS}/{names[0]}").status_code == 404
        assert api.http.get(JOBS).json()["data"] == []
    assert set(statuses) <= {200, 404}, statuses
    assert statuses[200] > 0


def test_a_stream_of_a_job_that_is_pruned_ends(api: Api) -> None:
    (public_id,) = api.add()
    (claim,) = api.claim()
    with api.http.stream("GET", f"{JOBS}/{public_id}/events", headers={"accept": "text/event-stream"}) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("event:")
        api.finish(claim)
        queue.prune(api.engine, older_than_s=0)
        rest = [line for line in lines if line.startswith("data:")]
    assert all(json.loads(line[5:]) is not None for line in rest)
