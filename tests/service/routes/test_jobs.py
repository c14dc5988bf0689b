from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract.tables import checkpoint, dataset, job, job_event, job_progress, job_result, metric, model, worker
from service.keys import CreateKey, create_key

pytestmark = pytest.mark.anyio

JOBS = "/v1/jobs"
RECIPE = {
    "towers": {
        "image": {"tokens": {"kind": "image", "size": 8, "patch": 4}},
        "text": {"tokens": {"kind": "text"}},
    },
    "pairs": [{"dataset": "ds_a", "modalities": ["image", "text"]}],
}
NOWHERE = {"dataset": "ds_none", "modalities": ["image", "text"]}
TRAIN = {"kind": "train", "recipe": RECIPE, "name": "digits", "metadata": {"team": "a"}, "priority": 3}


def add_dataset(api: Any, dataset_id: str = "ds_a", tenant: str = "default", **changes: Any) -> None:
    row = {
        "id": dataset_id,
        "tenant_id": tenant,
        "name": "n",
        "source": "s",
        "state": "ready",
        "artifact": f"datasets/{dataset_id}/1",
        "digest": "d",
        "info": {"modalities": {"image": "image", "text": "text"}},
    }
    with api.service.database.engine.begin() as conn:
        conn.execute(sa.insert(dataset).values(**{**row, **changes}))


async def submit(api: Any, **changes: Any) -> dict[str, Any]:
    response = await api.post(JOBS, json=TRAIN | changes)
    assert response.status_code == 202, response.text
    return response.json()


async def test_a_job_is_queued_and_shown(api: Any) -> None:
    add_dataset(api)
    created = await submit(api)
    assert created["status"] == "queued"
    assert (created["name"], created["priority"], created["metadata"]) == ("digits", 3, {"team": "a"})
    assert created["args"]["recipe"]["pairs"][0]["dataset"] == "ds_a"
    assert "metadata" not in created["args"]
    assert (await api.get(f"{JOBS}/{created['id']}")).json() == created
    later = await submit(api, run_at="2100-01-01T00:00:00Z")
    assert later["status"] == "queued"
    assert later["run_at"].startswith("2100-01-01")


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        (
            {"recipe": RECIPE | {"pairs": [{"dataset": "ds_none", "modalities": ["image", "text"]}]}},
            404,
            "recipe.pairs[0].dataset",
        ),
        ({"run_at": 0}, 422, "run_at"),
        ({"run_at": "4000000000"}, 422, "run_at"),
        ({"name": "two words"}, 422, "name"),
        ({"kind": "embed", "recipe": None}, 422, None),
        ({"kind": "ingest"}, 422, None),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, 422, "metadata"),
    ],
)
async def test_a_job_that_cannot_work_is_refused_now(
    api: Any, changes: dict[str, Any], status: int, param: str | None
) -> None:
    add_dataset(api)
    response = await api.post(JOBS, json=TRAIN | changes)
    assert response.status_code == status
    assert param is None or response.json()["error"]["param"] == param
    assert (await api.get(JOBS)).json()["data"] == []


async def test_a_model_is_no_data_set_even_where_both_are_asked_for(api: Any) -> None:
    info = {"modalities": ["image", "text"], "dimensions": 8}
    named = {"id": "model_a", "tenant_id": "default", "artifact": "models/model_a/1", "digest": "d", "info": info}
    with api.service.database.engine.begin() as conn:
        conn.execute(sa.insert(model).values(**named))
    embed = {"kind": "embed", "model": "model_a", "modality": "image"}
    evaluate = {"kind": "evaluate", "model": "model_a"}
    for body, param in (
        (embed | {"dataset": "model_a"}, "dataset"),
        (evaluate | {"datasets": ["model_a"]}, "datasets[0]"),
    ):
        response = await api.post(JOBS, json=body)
        assert response.status_code == 404
        assert response.json()["error"]["param"] == param
        assert response.json()["error"]["code"] == "dataset_not_found"


async def test_a_recipe_is_held_against_its_data_sets(api: Any) -> None:
    add_dataset(api, info={"modalities": {"image": "audio", "sound": "audio"}})
    response = await api.post(JOBS, json=TRAIN)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "recipe.pairs[0].modalities"
    add_dataset(api, "ds_b", state="ingesting", artifact=None, info=None)
    pairs = [{"dataset": "ds_b", "modalities": ["image", "text"]}]
    assert (await api.post(JOBS, json=TRAIN | {"recipe": RECIPE | {"pairs": pairs}})).status_code == 409


async def test_many_twins_with_one_key_make_one_job_and_get_one_answer(api: Any) -> None:
    add_dataset(api)
    headers = {"idempotency-key": "k"}
    answers = await asyncio.gather(*(api.post(JOBS, json=TRAIN, headers=headers) for _ in range(20)))
    assert {each.status_code for each in answers} == {202}
    assert all(each.json() == answers[0].json() for each in answers)
    assert len((await api.get(JOBS)).json()["data"]) == 1
    other = await api.post(JOBS, json=TRAIN | {"priority": 4}, headers=headers)
    assert other.status_code == 422
    spaced = json.dumps(TRAIN, indent=3, sort_keys=True)
    again = await api.post(JOBS, content=spaced, headers=headers | {"content-type": "application/json"})
    assert again.json() == answers[0].json()


async def test_lists_page_in_both_orders_and_filter(api: Any) -> None:
    add_dataset(api)
    ids = [(await submit(api, name=f"n{at}"))["id"] for at in range(5)]
    first = (await api.get(f"{JOBS}?limit=2")).json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == ([ids[4], ids[3]], True)
    second = (await api.get(f"{JOBS}?limit=3&after={ids[3]}")).json()
    assert ([each["id"] for each in second["data"]], second["has_more"]) == (ids[2::-1], False)
    upward = (await api.get(f"{JOBS}?order=asc&after={ids[2]}")).json()
    assert [each["id"] for each in upward["data"]] == ids[3:]
    assert [each["id"] for each in (await api.get(f"{JOBS}?name=n3")).json()["data"]] == [ids[3]]
    await api.post(f"{JOBS}/{ids[0]}/cancel")
    assert [each["id"] for each in (await api.get(f"{JOBS}?status=cancelled")).json()["data"]] == [ids[0]]
    assert len((await api.get(f"{JOBS}?status=queued&kind=train")).json()["data"]) == 4
    assert (await api.get(f"{JOBS}?status=running")).json()["data"] == []


async def test_a_finished_job_cannot_be_cancelled_and_an_unfinished_one_not_retried(api: Any) -> None:
    add_dataset(api)
    job_id = (await submit(api))["id"]
    assert (await api.post(f"{JOBS}/{job_id}/retry")).status_code == 400
    assert (await api.post(f"{JOBS}/{job_id}/cancel")).json()["status"] == "cancelled"
    again = await api.post(f"{JOBS}/{job_id}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "job_already_finished")
    assert (await api.post(f"{JOBS}/{job_id}/retry")).json()["status"] == "queued"


def work(api: Any, public_id: str) -> int:
    """Do as a worker does: claim, report, and leave it running."""
    with api.service.database.engine.begin() as conn:
        conn.execute(
            sa.insert(worker).values(id="w", lanes=["train"], kinds=["train"], host="h", boot="b", pid=1, version="0")
        )
        changes = {"state": "running", "worker_id": "w", "attempt": 1, "lease_epoch": 1}
        conn.execute(sa.update(job).where(job.c.public_id == public_id).values(**changes))
        number: int = conn.execute(sa.select(job.c.id).where(job.c.public_id == public_id)).scalar_one()
        common = {"job_id": number, "tenant_id": "default", "epoch": 1}
        conn.execute(sa.insert(job_progress).values(**common, done=5, total=10, eta_s=1.5))
        points = [{**common, "step": step, "name": name, "value": step + 0.5} for step in (1, 2) for name in ("a", "b")]
        conn.execute(sa.insert(metric), points)
        conn.execute(sa.insert(metric).values(**{**common, "epoch": 2}, step=2, name="a", value=9.0))
        conn.execute(
            sa.insert(checkpoint).values(**common, step=2, artifact="checkpoints/x", digest="d", metrics={"a": 1.0})
        )
    return number


async def test_progress_metrics_and_checkpoints_are_shown(api: Any) -> None:
    add_dataset(api)
    job_id = (await submit(api))["id"]
    work(api, job_id)
    shown = (await api.get(f"{JOBS}/{job_id}")).json()
    assert shown["status"] == "running"
    assert shown["progress"] == {"done": 5, "total": 10, "unit": "steps", "eta_s": 1.5}
    series = (await api.get(f"{JOBS}/{job_id}/metrics")).json()["series"]
    assert series == {"a": {"steps": [1, 2], "values": [1.5, 9.0]}, "b": {"steps": [1, 2], "values": [1.5, 2.5]}}
    table = await api.get(f"{JOBS}/{job_id}/metrics?name=a", headers={"accept": "text/csv"})
    assert table.text == "step,name,value\r\n1,a,1.5\r\n2,a,9.0\r\n"
    (kept,) = (await api.get(f"{JOBS}/{job_id}/checkpoints")).json()["data"]
    assert (kept["id"], kept["metrics"]) == (f"{job_id}@2", {"a": 1.0})
    assert (await api.get(f"{JOBS}/{job_id}/files")).status_code == 409
    assert (await api.post(f"{JOBS}/{job_id}/cancel")).json()["status"] == "cancelling"


async def test_events_are_listed_with_cursors(api: Any) -> None:
    add_dataset(api)
    job_id = (await submit(api))["id"]
    await api.post(f"{JOBS}/{job_id}/cancel")
    listed = (await api.get(f"{JOBS}/{job_id}/events?limit=1")).json()
    assert ([each["type"] for each in listed["data"]], listed["has_more"]) == (["cancelled"], True)
    rest = (await api.get(f"{JOBS}/{job_id}/events?after={listed['data'][0]['id']}")).json()
    assert [each["type"] for each in rest["data"]] == ["queued"]
    for bad in ("0", "99999999", "x", "9" * 30):
        assert (await api.get(f"{JOBS}/{job_id}/events?after={bad}")).status_code == 400


async def read_stream(api: Any, job_id: str, **headers: str) -> list[tuple[str, str | None, Any]]:
    found: list[tuple[str, str | None, Any]] = []
    headers = {"accept": "text/event-stream"} | headers
    response = await api.get(f"{JOBS}/{job_id}/events", headers=headers, timeout=20)
    assert response.headers["content-type"].startswith("text/event-stream")
    for block in response.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


async def test_a_stream_tells_everything_and_ends_with_the_job(api: Any) -> None:
    add_dataset(api)
    job_id = (await submit(api))["id"]
    number = work(api, job_id)

    async def finish() -> None:
        await asyncio.sleep(0.8)
        with api.service.database.engine.begin() as conn:
            changes: dict[str, Any] = {
                "state": "failed",
                "worker_id": None,
                "finished_at": sa.func.coalesce(job.c.created_at, None),
            }
            changes["error"] = {"type": "Permanent", "message": "loss is NaN at step 3", "traceback": "secret"}
            conn.execute(sa.update(job).where(job.c.id == number).values(**changes))
            row = {"job_id": number, "tenant_id": "default", "epoch": 1, "type": "failed", "detail": {}}
            conn.execute(sa.insert(job_event).values(**row))
            point = {"job_id": number, "tenant_id": "default", "epoch": 1, "step": 3, "name": "a", "value": 3.0}
            conn.execute(sa.insert(metric).values(**point))

    (seen, also, _) = await asyncio.gather(read_stream(api, job_id), read_stream(api, job_id), finish())
    assert seen == also
    kinds = [kind for kind, _, _ in seen]
    assert kinds[0] == "event"
    assert kinds[-1] == "done"
    assert [data["status"] for kind, _, data in seen if kind == "state"] == ["running", "failed"]
    assert [data["step"] for kind, _, data in seen if kind == "metric"] == [2, 3]
    assert seen[-1][2]["error"] == {"type": "Permanent", "message": "loss is NaN at step 3", "code": None}
    ids = [int(number) for kind, number, _ in seen if kind == "event" and number]
    assert ids == sorted(ids)
    rest = await read_stream(api, job_id, **{"last-event-id": str(ids[0])})
    assert [int(number) for kind, number, _ in rest if kind == "event" and number] == ids[1:]


async def test_a_stream_ends_when_the_process_stops(small: Any) -> None:
    add_dataset(small)
    job_id = (await submit(small))["id"]
    reading = asyncio.create_task(read_stream(small, job_id))
    await asyncio.sleep(0.3)
    small.service.followers.stop()
    assert (await reading)[0][0] == "event"


async def test_files_are_listed_and_sent_in_ranges(api: Any, tmp_path: Any) -> None:
    add_dataset(api)
    job_id = (await submit(api))["id"]
    number = work(api, job_id)
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.json").write_bytes(b"0123456789")
    (folder / "report.html").write_text("<!DOCTYPE html><title>ü</title>", encoding="utf-8")
    api.service.store.publish(folder, "reports/a/1", kind="report", id="a", body={})
    with api.service.database.engine.begin() as conn:
        row = {
            "job_id": number,
            "tenant_id": "default",
            "epoch": 1,
            "body": {"kind": "train", "artifact": "reports/a/1"},
        }
        conn.execute(sa.insert(job_result).values(**row))
    page, file = (await api.get(f"{JOBS}/{job_id}/files")).json()["data"]
    assert (file["id"], file["num_bytes"]) == ("report.json", 10)
    shown = await api.get(f"{JOBS}/{job_id}/files/{page['id']}")
    assert shown.text == "<!DOCTYPE html><title>ü</title>"
    assert shown.headers["content-type"] == "text/html; charset=utf-8"
    assert shown.headers["content-disposition"] == 'inline; filename="report.html"'
    assert shown.headers["content-security-policy"].startswith("sandbox; default-src 'none';"), "no script, no fetch"
    assert shown.headers["x-content-type-options"] == "nosniff"
    path = f"{JOBS}/{job_id}/files/report.json"
    whole = await api.get(path)
    assert (whole.status_code, whole.content) == (200, b"0123456789")
    assert whole.headers["content-disposition"] == 'attachment; filename="report.json"'
    assert whole.headers["content-security-policy"] == "sandbox"
    for wanted, status, content in (
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-2", 206, b"89"),
        ("bytes=5-999", 206, b"56789"),
        ("bytes=0-,0-", 200, b"0123456789"),
        ("lines=1-2", 200, b"0123456789"),
    ):
        part = await api.get(path, headers={"range": wanted})
        assert (part.status_code, part.content) == (status, content), wanted
    for wanted in ("bytes=10-", "bytes=5-4", "bytes=-0"):
        assert (await api.get(path, headers={"range": wanted})).status_code == 416, wanted
    for missing in ("manifest.json", "../report.json", "%2e%2e/x", "x"):
        assert (await api.get(f"{JOBS}/{job_id}/files/{missing}")).status_code == 404


async def test_an_experiment_is_queued_in_the_lane_of_training(api: Any) -> None:
    response = await api.post(JOBS, json={"kind": "experiment", "experiment": "square-loss", "seeds": 2, "seed": 7})
    assert response.status_code == 202, response.text
    created = response.json()
    assert created["args"] == {
        "kind": "experiment",
        "experiment": "square-loss",
        "seeds": 2,
        "seed": 7,
        "quick": False,
    }
    assert created["max_attempts"] == 1
    assert [each["id"] for each in (await api.get(JOBS, params={"kind": "experiment"})).json()["data"]] == [
        created["id"]
    ]
    with api.service.database.engine.connect() as conn:
        assert conn.execute(sa.select(job.c.lane)).scalar_one() == "train"


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"experiment": "cosine-loss"}, "experiment", "'square-loss', 'certificate', 'completeness'"),
        ({"experiment": None}, "experiment", "'one-sided'"),
        ({"seeds": 0}, "seeds", ""),
        ({"seeds": 101}, "seeds", ""),
        ({"seed": -1}, "seed", ""),
        ({"quick": "yes"}, "quick", ""),
        ({"device": "cuda"}, "device", ""),
    ],
)
async def test_an_experiment_that_there_is_not_is_refused_with_those_that_there_are(
    api: Any, changes: dict[str, Any], param: str, words: str
) -> None:
    response = await api.post(JOBS, json={"kind": "experiment", "experiment": "certificate"} | changes)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]


async def test_a_checkpoint_is_imported_from_a_folder_for_it_by_an_administrator_or_from_afar_by_a_writer(
    small: Any,
) -> None:
    def wanted(source: str) -> dict[str, str]:
        return {"kind": "import_model", "source": source}

    folder = small.service.settings.data.resolve() / "imports"
    assert (await small.post("/v1/jobs", json=wanted(f"{folder}/clip"))).status_code == 202
    for outside in (str(folder.parent), f"file://{folder}/../store", "/", "/etc/passwd", f"{folder}-too"):
        refused = await small.post("/v1/jobs", json=wanted(outside))
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (422, "source", "forbidden_path"), outside
    for bad in ("s3://b/x::file:///etc", "memory://b/x", "https://hub/x", f"{small.service.settings.store_url}/models"):
        assert (await small.post("/v1/jobs", json=wanted(bad))).status_code == 422, bad

    with small.service.database.engine.begin() as conn:
        _, key = create_key(conn, "default", CreateKey(name="k", scopes=["write"]))
    small.service.keys.forget()
    headers = {"authorization": f"Bearer {key}"}
    assert (await small.post("/v1/jobs", json=wanted(f"{folder}/clip"), headers=headers)).status_code == 403
    for far in ("s3://bucket/clip", "openai/clip-vit-base-patch32"):
        assert (await small.post("/v1/jobs", json=wanted(far), headers=headers)).status_code == 202, far
