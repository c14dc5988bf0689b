"""Data sets: uploaded or registered, ingested by a job, previewed, deleted."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import anyio
import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field, TypeAdapter

from service.contract import queue
from service.contract.dialects import now
from service.contract.errors import Conflict, Invalid, IsthmusError, NotFound, TooLarge, UnsupportedMedia
from service.contract.jobs import Holdout, IngestArgs
from service.contract.references import is_needed
from service.contract.samples import Samples
from service.contract.tables import dataset, job, owned
from service.contract.word import ModalityName, Name, Real, Text, Word, new_id
from service.deps import IdempotencyKey, Reader, Running, Service, Writer, request_id_of
from service.edge import access, idempotency
from service.edge.bodies import check_headers, parse_json
from service.edge.idempotency import Answer
from service.edge.paging import WantedPage, check_id, select_page
from service.edge.problems import documented, validate
from service.edge.uploads import Upload, receive
from service.keys import Caller
from service.previews import preview
from service.resources import (
    Dataset,
    DatasetCreated,
    DatasetList,
    Deleted,
    SampleList,
    dataset_of,
    job_of,
    select_jobs,
)
from service.sources import check_source

router = APIRouter(tags=["datasets"], prefix="/v1/datasets")

MAX_NAMED: Final = 64


class Described(Word):
    """What is said of a data set, wherever it lies; in a multipart form `modalities` and `holdout` are JSON."""

    name: Name
    modalities: Annotated[
        dict[ModalityName, Annotated[Text, Field(max_length=200)]] | None,
        Field(description="modality -> member extension or column; null: recognised", max_length=MAX_NAMED),
    ] = None
    holdout: Holdout | None = None
    max_bad_fraction: Annotated[Real, Field(ge=0, le=1, description="more rejected samples fail the job")] = 0.1


class CreateDataset(Described):
    """A data set that lies somewhere already."""

    uri: Annotated[
        Text,
        Field(
            min_length=1,
            max_length=2048,
            description="s3://, gs:// or az://, or (scope admin) a path on the worker's machine: WebDataset tars, "
            "Parquet, zip, or a folder with a CSV or JSONL manifest",
        ),
    ]


_created: TypeAdapter[CreateDataset] = TypeAdapter(CreateDataset)
_described: TypeAdapter[Described] = TypeAdapter(Described)

SCHEMAS: Final[dict[str, Any]] = {
    "CreateDataset": CreateDataset.model_json_schema(ref_template="#/components/schemas/{model}"),
    "UploadDataset": {
        "title": "UploadDataset",
        "description": "A data set in the body.",
        "type": "object",
        "required": ["name", "file"],
        "properties": {
            "name": {"type": "string"},
            "file": {"type": "string", "format": "binary", "description": "a .tar, .zip or .parquet file"},
            "modalities": {"type": "string", "description": "JSON: modality -> member extension or column"},
            "holdout": {"type": "string", "description": 'JSON: {"fraction", "seed", "group_by", "groups"}'},
            "max_bad_fraction": {"type": "number"},
        },
    },
    "Holdout": Holdout.model_json_schema(),
}
"""What FastAPI cannot see, since the handler reads the body itself: one path takes JSON or multipart."""

_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"$ref": "#/components/schemas/UploadDataset"}},
            "application/json": {
                "schema": {"$ref": "#/components/schemas/CreateDataset"},
                "example": {"name": "captions", "uri": "s3://bucket/captions-{00000..00009}.tar"},
            },
        },
    }
}


@router.post(
    "",
    operation_id="create_dataset",
    summary="Upload or register a data set",
    status_code=202,
    response_model=DatasetCreated,
    responses=documented(Conflict, TooLarge, UnsupportedMedia),
    openapi_extra=_BODY,
)
async def create(
    request: Request, service: Running, caller: Writer, idempotency_key: IdempotencyKey = None
) -> Response:
    """Take a file (multipart, streamed to storage) or a place where one lies (JSON), and queue its ingest."""
    key = idempotency.check_key(idempotency_key)
    check_headers(request, "application/json", "multipart/form-data")
    if request.headers.get("content-type", "").startswith("multipart/"):
        answer = await _create_uploaded(request, service, caller, key)
    else:
        answer = await _create_registered(request, service, caller, key)
    access.note_job(request, answer.body["job"]["id"], attempt=0, epoch=0)
    return idempotency.respond(answer, {"location": f"/v1/datasets/{answer.body['id']}"})


async def _create_registered(request: Request, service: Service, caller: Caller, key: str | None) -> Answer:
    document = await _read_json(request, service.settings.max_body_bytes)
    wanted = validate(_created, document)
    check_source(wanted.uri, service, caller, param="uri", what="a data set")
    digest = idempotency.fingerprint("POST", "/v1/datasets", wanted.model_dump(mode="json"))
    return await service.database.write(
        lambda conn: _insert(
            conn, caller, key, digest, wanted=wanted, source=wanted.uri, request_id=request_id_of(request)
        )
    )


async def _create_uploaded(request: Request, service: Service, caller: Caller, key: str | None) -> Answer:
    tenant = caller.tenant
    if key is not None:
        await service.database.write(lambda conn: idempotency.reserve(conn, tenant, key))
    upload: Upload | None = None
    answer: Answer | None = None
    try:
        upload = await receive(request, service)
        wanted = validate(_described, _from_fields(upload.fields))
        fields = {**wanted.model_dump(mode="json"), "file": upload.sha256}
        digest = idempotency.fingerprint("POST", "/v1/datasets", fields)
        source = f"store:{upload.key}"
        answer = await service.database.write(
            lambda conn: _insert(
                conn,
                caller,
                key,
                digest,
                wanted=wanted,
                source=source,
                request_id=request_id_of(request),
                reserved=True,
            )
        )
        return answer
    finally:
        with anyio.CancelScope(shield=True):  # the caller may have hung up
            if upload is not None and (answer is None or answer.replayed):
                await service.in_file_thread(lambda: service.store.delete(upload.key))
            if key is not None and answer is None:
                await service.database.write(lambda conn: idempotency.release(conn, tenant, key))


def _insert(
    conn: sa.Connection,
    caller: Caller,
    key: str | None,
    digest: str,
    *,
    wanted: Described,
    source: str,
    request_id: str,
    reserved: bool = False,
) -> Answer:
    tenant = caller.tenant
    if (first := idempotency.replay(conn, tenant, key, digest, reserved=reserved)) is not None:
        return first
    dataset_id = new_id("ds")
    conn.execute(
        sa.insert(dataset).values(id=dataset_id, tenant_id=tenant, name=wanted.name, source=source, state="ingesting")
    )
    args = IngestArgs(
        dataset=dataset_id,
        source=source,
        modalities=wanted.modalities,
        max_bad_fraction=wanted.max_bad_fraction,
        holdout=wanted.holdout,
    )
    job_id = queue.enqueue(conn, tenant=tenant, args=args, name=wanted.name, request_id=request_id)
    conn.execute(sa.update(dataset).where(dataset.c.id == dataset_id).values(job_id=job_id))
    row = conn.execute(owned(dataset, tenant).where(dataset.c.id == dataset_id)).one()
    job_row = conn.execute(select_jobs(tenant).where(job.c.public_id == job_id)).one()
    shown = DatasetCreated(**dataset_of(row).model_dump(), job=job_of(job_row))
    return idempotency.remember(conn, tenant, key, digest, Answer(202, shown.model_dump(mode="json")))


async def _read_json(request: Request, max_bytes: int) -> Any:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise TooLarge(f"a JSON body has at most {max_bytes} bytes")
    return parse_json(bytes(body)) if body else None


def _from_fields(fields: dict[str, str]) -> dict[str, Any]:
    document: dict[str, Any] = dict(fields)
    for name in ("modalities", "holdout", "max_bad_fraction"):
        if name in fields:
            try:
                document[name] = parse_json(fields[name].encode())
            except IsthmusError as error:
                raise error.at(name) from None
    if "\x00" in fields.get("name", ""):
        raise Invalid("text cannot hold NUL characters", param="name")
    return document


@router.get("", operation_id="list_datasets", summary="List data sets")
async def list_datasets(
    service: Running,
    caller: Reader,
    page: WantedPage,
    status: Literal["ingesting", "ready", "failed"] | None = None,
    name: Annotated[Name | None, Query()] = None,
) -> DatasetList:
    """List data sets, newest first."""

    def work(conn: sa.Connection) -> DatasetList:
        query = owned(dataset, caller.tenant)
        among = query.where(dataset.c.id == page.after)
        if status is not None:
            query = query.where(dataset.c.state == status)
        if name is not None:
            query = query.where(dataset.c.name == name)
        rows, more = select_page(conn, query, page, among=among, order_by=(dataset.c.created_at, dataset.c.id))
        return DatasetList(data=[dataset_of(row) for row in rows], has_more=more)

    return await service.database.read(work)


@router.get("/{dataset_id}", operation_id="get_dataset", summary="Get a data set", responses=documented(NotFound))
async def get(service: Running, caller: Reader, dataset_id: str) -> Dataset:
    """Get a data set: counts, modalities, statistics and the first rejected samples."""
    return dataset_of(await _get_row(service, caller, dataset_id))


async def _get_row(service: Service, caller: Caller, dataset_id: str) -> sa.Row[Any]:
    known = check_id(dataset_id)
    row = await service.database.read(
        lambda conn: conn.execute(owned(dataset, caller.tenant).where(dataset.c.id == known)).first()
    )
    if row is None:
        raise NotFound("there is no such data set", code="dataset_not_found")
    return row


@router.get(
    "/{dataset_id}/samples",
    operation_id="list_samples",
    summary="Preview samples of a data set",
    responses=documented(NotFound, Conflict),
)
async def list_samples(
    *,
    service: Running,
    caller: Reader,
    dataset_id: str,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=20)] = 5,
    split: Literal["train", "holdout", "all"] = "all",
) -> SampleList:
    """Preview samples as they were ingested, media as data: URIs."""
    row = await _get_row(service, caller, dataset_id)
    if row.artifact is None:
        raise Conflict("the data set is not ready", code="dataset_not_ready")

    def work() -> SampleList:
        samples = Samples(service.store.local(row.artifact))
        indices = samples.indices(split)[offset : offset + limit + 1].tolist()
        return SampleList(data=[preview(samples, index) for index in indices[:limit]], has_more=len(indices) > limit)

    return await service.in_file_thread(work)


@router.delete(
    "/{dataset_id}",
    operation_id="delete_dataset",
    summary="Delete a data set",
    responses=documented(NotFound, Conflict),
)
async def delete(service: Running, caller: Writer, dataset_id: str) -> Deleted:
    """Delete a data set, unless a job that is queued or running reads it or writes it."""
    known = check_id(dataset_id)

    def work(conn: sa.Connection) -> None:
        row = conn.execute(owned(dataset, caller.tenant).where(dataset.c.id == known).with_for_update()).first()
        if row is None:
            raise NotFound("there is no such data set", code="dataset_not_found")
        if is_needed(conn, caller.tenant, known, maker=row.job_id):
            raise Conflict("a job that has not ended needs this data set", code="dataset_in_use")
        conn.execute(sa.update(dataset).where(dataset.c.id == known).values(deleted_at=now()))

    await service.database.write(work)
    return Deleted(id=known, object="dataset")
