from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract import leases
from service.contract.jobs import KINDS
from service.contract.leases import WorkerInfo
from service.contract.tables import dataset, job

pytestmark = pytest.mark.anyio

CREATE = {"name": "captions", "uri": "s3://bucket/captions.tar"}


@pytest.fixture(autouse=True)
def spoken(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="service.edge.access"):
        yield


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "request"]


async def test_the_id_of_the_request_that_submits_a_job_reaches_its_claim_and_the_log(
    api: Any, caplog: pytest.LogCaptureFixture
) -> None:
    created = await api.post("/v1/datasets", json=CREATE, headers={"x-request-id": "req-by-me"})
    assert created.status_code == 202, created.text
    job_id = created.json()["job"]["id"]
    engine = api.service.database.engine
    info = WorkerInfo("w1", ["bulk"], list(KINDS), "here", "now", 1, None, "cpu", "0")
    leases.register(engine, info)
    (claim,) = leases.claim(engine, worker_id="w1", lane="bulk", kinds=KINDS, ttl_s=20)
    assert (claim.public_id, claim.request_id) == (job_id, "req-by-me")
    (line,) = lines(caplog)
    seconds = line.pop("seconds")
    assert 0 < seconds < 60
    assert line == {
        "job": job_id,
        "attempt": 0,
        "epoch": 0,
        "request_id": "req-by-me",
        "method": "POST",
        "path": "/v1/datasets",
        "tenant": "default",
        "status": 202,
    }


async def test_a_recipe_that_is_submitted_carries_its_request_too(api: Any) -> None:
    tower = {"tokens": {"kind": "text"}}
    recipe = {
        "towers": {"note": tower, "text": tower},
        "pairs": [{"dataset": "ds_a", "modalities": ["note", "text"]}],
    }
    engine = api.service.database.engine
    row = {"id": "ds_a", "tenant_id": "default", "name": "n", "source": "s", "state": "ready", "digest": "d"}
    row |= {"artifact": "datasets/ds_a/1", "info": {"modalities": {"note": "text", "text": "text"}}}
    with engine.begin() as conn:
        conn.execute(sa.insert(dataset).values(**row))
    created = await api.post("/v1/jobs", json={"kind": "train", "recipe": recipe}, headers={"x-request-id": "req-x"})
    assert created.status_code == 202, created.text
    leases.register(engine, WorkerInfo("w1", ["train"], list(KINDS), "here", "now", 1, None, "cpu", "0"))
    (claim,) = leases.claim(engine, worker_id="w1", lane="train", kinds=KINDS, ttl_s=20)
    assert claim.request_id == "req-x"


async def test_a_cancel_is_logged_with_the_attempt_and_the_epoch_that_it_met(
    api: Any, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = (await api.post("/v1/datasets", json=CREATE)).json()["job"]["id"]
    with api.service.database.engine.begin() as conn:
        conn.execute(sa.update(job).values(attempt=2, lease_epoch=3))
    await api.post(f"/v1/jobs/{job_id}/cancel")
    await api.post(f"/v1/jobs/{job_id}/retry")
    about = [(line["path"], line["job"], line["attempt"], line["epoch"]) for line in lines(caplog)[1:]]
    assert about == [(f"/v1/jobs/{job_id}/cancel", job_id, 2, 3), (f"/v1/jobs/{job_id}/retry", job_id, 0, 3)]


async def test_reads_and_inference_are_not_logged_but_refused_changes_are(
    small: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await small.get("/v1/jobs")
    await small.get("/v1/jobs/job_none")
    await small.post("/v1/embeddings", json={"model": "none", "input": "x"})
    await small.post("/v1/jobs", json={"kind": "nonsense"})
    assert [(line["path"], line["status"]) for line in lines(caplog)] == [("/v1/jobs", 422)]
