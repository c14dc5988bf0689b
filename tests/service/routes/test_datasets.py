from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sqlalchemy as sa

from service.contract.samples import SampleWriter
from service.contract.tables import dataset, job, job_input
from service.keys import CreateKey, create_key
from service.sources import is_remote_place

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

DATASETS = "/v1/datasets"


def form(name: str = "digits", content: bytes = b"t" * 3_000_000, filename: str = "a.tar") -> dict[str, Any]:
    return {"data": {"name": name}, "files": {"file": (filename, content, "application/x-tar")}}


async def test_an_upload_is_stored_and_its_ingest_queued(api: Any) -> None:
    response = await api.post(DATASETS, **form())
    assert response.status_code == 202, response.text
    created = response.json()
    assert response.headers["location"] == f"/v1/datasets/{created['id']}"
    assert created["status"] == "ingesting"
    assert created["job"]["kind"] == "ingest"
    assert created["job"]["id"] == created["job_id"]
    source = created["job"]["args"]["source"]
    assert source.startswith("store:uploads/up_")
    with api.service.store.open_upload(source.removeprefix("store:")) as stream:
        assert stream.read() == b"t" * 3_000_000
    shown = (await api.get(f"{DATASETS}/{created['id']}")).json()
    assert shown == {key: value for key, value in created.items() if key != "job"}
    listed = (await api.get(f"{DATASETS}?name=digits&status=ingesting")).json()
    assert [each["id"] for each in listed["data"]] == [created["id"]]


@pytest.mark.parametrize(
    "filename", ["../../x.tar", "C:\\CON.tar", "/etc/x.zip", "x" * 3000 + ".parquet", "\u202ex.tar"]
)
async def test_a_file_name_never_reaches_the_store(small: Any, filename: str) -> None:
    response = await small.post(DATASETS, **form(content=b"x", filename=filename))
    assert response.status_code == 202
    key = response.json()["job"]["args"]["source"].removeprefix("store:")
    assert key.startswith("uploads/up_")
    assert key.rsplit("/", 1)[1] in {"data.tar", "data.zip", "data.parquet"}


async def test_fields_of_an_upload_are_json(api: Any) -> None:
    fields = {"name": "n", "modalities": '{"image": "png"}', "holdout": '{"fraction": 0.2}', "max_bad_fraction": "0.5"}
    response = await api.post(DATASETS, data=fields, files={"file": ("a.zip", b"x")})
    args = response.json()["job"]["args"]
    assert args["modalities"] == {"image": "png"}
    assert args["holdout"]["fraction"] == 0.2
    assert args["max_bad_fraction"] == 0.5


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 422, "name"),
        ({"name": "a\nb"}, 422, "name"),
        ({"name": "n", "modalities": "{"}, 400, "modalities"),
        ({"name": "n", "modalities": '{"A B": "x"}'}, 422, "modalities.A B"),
        ({"name": "n", "max_bad_fraction": "2"}, 422, "max_bad_fraction"),
        ({"name": "n", "holdout": '{"groups": ["ann"]}'}, 422, "holdout"),
        ({"name": "n", "tenant_id": "x"}, 422, "tenant_id"),
    ],
)
async def test_a_refused_upload_leaves_nothing_behind(
    small: Any, fields: dict[str, str], status: int, param: str
) -> None:
    response = await small.post(DATASETS, data=fields, files={"file": ("a.tar", b"x" * 100)})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert small.service.store.list("uploads") == []


async def test_an_upload_that_breaks_off_leaves_nothing_behind(small: Any) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.tar"\r\n\r\n'
        for _ in range(5):
            yield b"x" * 500_000

    headers = {"content-type": "multipart/form-data; boundary=b", "idempotency-key": "k"}
    response = await small.post(DATASETS, content=broken(), headers=headers)
    assert response.status_code == 400
    assert small.service.store.list("uploads") == []
    again = await small.post(DATASETS, **form(content=b"x"), headers={"idempotency-key": "k"})
    assert again.status_code == 202


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1/x",
        "https://example.com/x.tar",
        "gopher://x",
        "store:uploads/up_x/data.tar",
        "s3://bucket/a::store:uploads/up_x/data.tar",
        "s3://user:password@bucket/x",
        "memory://x",
        "s3:///x",
        "s3://[bucket/x",
    ],
)
async def test_places_that_a_worker_must_not_read_are_refused(small: Any, uri: str) -> None:
    response = await small.post(DATASETS, json={"name": "n", "uri": uri})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "uri")


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("s3://bucket/captions.tar", True),
        ("s3://bucket/a-{0..9}.tar", True),
        ("s3://bucket/stores/x.tar", True),
        ("s3://other/store/x.tar", True),
        ("s3://bucket/store", False),
        ("s3://bucket/store/uploads/up_x/data.tar", False),
        ("s3://bucket/", False),
        ("s3://bucket", False),
        ("s3://bucket/*/uploads", False),
        ("s3://bucket/st{or,ar}e/x", False),
        ("s3://bucket/stor[e]/x", False),
    ],
)
def test_no_place_reaches_into_the_services_own_store(uri: str, allowed: bool) -> None:
    assert is_remote_place(uri, own="s3://bucket/store") is allowed
    assert is_remote_place(uri, own="/data/store")


async def test_local_paths_need_the_scope_admin(small: Any) -> None:
    with small.service.database.engine.begin() as conn:
        _, key = create_key(conn, "default", CreateKey(name="k", scopes=["write"]))
    small.service.keys.forget()
    headers = {"authorization": f"Bearer {key}"}
    refused = await small.post(DATASETS, json={"name": "n", "uri": "/etc"}, headers=headers)
    assert refused.status_code == 403
    taken = await small.post(DATASETS, json={"name": "n", "uri": "s3://bucket/x.tar"}, headers=headers)
    assert taken.status_code == 202


async def test_the_same_key_and_upload_give_the_first_answer_and_one_data_set(api: Any) -> None:
    headers = {"idempotency-key": "upload-1"}
    first = await api.post(DATASETS, **form(content=b"abc"), headers=headers)
    second = await api.post(DATASETS, **form(content=b"abc"), headers=headers)
    assert second.status_code == first.status_code == 202
    assert second.json() == first.json()
    assert second.headers["idempotency-replayed"] == "true"
    assert len(api.service.store.list("uploads")) == 1
    other = await api.post(DATASETS, **form(content=b"abd"), headers=headers)
    assert other.status_code == 422
    assert len(api.service.store.list("uploads")) == 1


async def test_a_twin_of_an_upload_in_progress_is_409_and_says_when(small: Any) -> None:
    reading, release = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        reading.set()
        yield b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\nn\r\n'
        await release.wait()
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.tar"\r\n\r\nx\r\n--b--\r\n'

    headers = {"content-type": "multipart/form-data; boundary=b", "idempotency-key": "k"}
    task = asyncio.create_task(small.post(DATASETS, content=slow(), headers=headers))
    await reading.wait()
    twin = await small.post(DATASETS, **form(content=b"x"), headers={"idempotency-key": "k"})
    assert twin.status_code == 409
    assert twin.headers["retry-after"] == "1"
    release.set()
    assert (await task).status_code == 202


async def test_deleting_waits_for_the_jobs_that_read(api: Any) -> None:
    created = (await api.post(DATASETS, **form(content=b"x"))).json()
    path = f"{DATASETS}/{created['id']}"
    assert (await api.client.delete(path)).status_code == 409
    assert (await api.post(f"/v1/jobs/{created['job_id']}/cancel")).status_code == 200
    with api.service.database.engine.begin() as conn:
        row = conn.execute(sa.select(job.c.id)).one()
        conn.execute(sa.insert(job_input).values(job_id=row.id, ref=created["id"], tenant_id="default"))
    deleted = await api.client.delete(path)
    assert deleted.json() == {"id": created["id"], "object": "dataset", "deleted": True}
    assert (await api.get(path)).status_code == 404
    assert (await api.client.delete(path)).status_code == 404
    assert (await api.get(DATASETS)).json()["data"] == []


async def test_samples_are_shown_as_they_were_ingested(api: Any, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    writer = SampleWriter(folder)
    for at in range(3):
        payloads = {"image": b"\x89PNG" + bytes([at]), "text": f"caption {at}".encode(), "state": npy(at)}
        writer.add(f"k{at}", payloads, "seven" if at else "", at == 2)
    writer.close()
    info = {"modalities": {"image": "image", "text": "text", "state": "continuous"}}
    api.service.store.publish(folder, "datasets/ds_a/1", kind="dataset", id="ds_a", body=info)
    row = {"id": "ds_a", "tenant_id": "default", "name": "n", "source": "s", "artifact": "datasets/ds_a/1"}
    with api.service.database.engine.begin() as conn:
        conn.execute(sa.insert(dataset).values(**row, state="ready", info=info))
    page = (await api.get(f"{DATASETS}/ds_a/samples?limit=2")).json()
    assert page["has_more"]
    assert [each["label"] for each in page["data"]] == [None, "seven"]
    assert page["data"][1]["items"]["text"] == "caption 1"
    assert page["data"][1]["items"]["image"].startswith("data:image/png;base64,")
    assert page["data"][1]["items"]["state"] == [[1.0, 1.0]]
    held_out = (await api.get(f"{DATASETS}/ds_a/samples?split=holdout")).json()
    assert [each["key"] for each in held_out["data"]] == ["k2"]


def npy(value: float) -> bytes:
    import io

    out = io.BytesIO()
    np.save(out, np.full((1, 2), value, np.float32))
    return out.getvalue()
