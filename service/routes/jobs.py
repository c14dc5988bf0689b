"""Jobs: submitted, listed, followed, cancelled, tried again; what they wrote on the way and what they left."""

from __future__ import annotations

import csv
import io
from typing import Annotated, Any, Final, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from service.aliases import check_alias
from service.composing import settle
from service.contract import queue
from service.contract.errors import Conflict, Invalid, Malformed, NotFound, RequestError, UnsupportedMedia
from service.contract.tables import checkpoint, job, job_event, metric, owned
from service.contract.word import Name
from service.deps import IdempotencyKey, Reader, Running, Service, Writer, request_id_of
from service.edge import access, idempotency
from service.edge.bodies import StrictRoute
from service.edge.downloads import DOWNLOAD, WantedRange, list_files, send_file
from service.edge.idempotency import Answer
from service.edge.paging import WantedPage, check_id, select_page
from service.edge.problems import documented
from service.keys import Caller
from service.resources import (
    Checkpoint,
    CheckpointList,
    FileList,
    Job,
    JobEventList,
    JobList,
    Metrics,
    Series,
    event_of,
    job_of,
    select_jobs,
)
from service.sources import check_import
from service.submissions import (
    EXAMPLES,
    AnySubmission,
    SubmitCompose,
    SubmitImportModel,
    SubmitTrain,
    args_of,
    check_fit,
    find_starts,
)

router = APIRouter(tags=["jobs"], prefix="/v1/jobs", route_class=StrictRoute)

MAX_EVENT_ID: Final = 2**62
MAX_POINTS: Final = 200_000


@router.post(
    "",
    operation_id="create_job",
    summary="Submit a job",
    status_code=202,
    response_model=Job,
    responses=documented(NotFound, Conflict, UnsupportedMedia),
)
async def create(
    request: Request,
    service: Running,
    caller: Writer,
    body: Annotated[AnySubmission, Field(discriminator="kind"), Body(openapi_examples=EXAMPLES)],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a job. What it names must exist, and fit, now."""
    key = idempotency.check_key(idempotency_key)
    tenant = caller.tenant
    if body.run_at is not None and not 2000 <= body.run_at.year <= 2200:
        raise Invalid("the year lies between 2000 and 2200", param="run_at")
    if isinstance(body, SubmitTrain | SubmitImportModel) and body.name is not None:
        check_alias(body.name, param="name")
    if isinstance(body, SubmitImportModel):
        check_import(body.source, service, caller)
    digest = idempotency.fingerprint("POST", "/v1/jobs", body.model_dump(mode="json"))
    starts = await find_starts(service.catalogue, tenant, body)
    settled = await settle(service, tenant, body) if isinstance(body, SubmitCompose) else None

    def work(conn: sa.Connection) -> Answer:
        if (first := idempotency.replay(conn, tenant, key, digest)) is not None:
            return first
        if isinstance(settled, RequestError):
            raise settled
        args = args_of(settled or body, starts)
        check_fit(conn, tenant, args, starts)
        public_id = queue.enqueue(
            conn,
            tenant=tenant,
            args=args,
            name=body.name,
            priority=body.priority,
            run_at=body.run_at,
            meta=dict(body.metadata) if body.metadata is not None else None,
            request_id=request_id_of(request),
        )
        row = conn.execute(select_jobs(tenant).where(job.c.public_id == public_id)).one()
        answer = Answer(202, job_of(row).model_dump(mode="json"))
        return idempotency.remember(conn, tenant, key, digest, answer)

    answer = await service.database.write(work)
    access.note_job(request, answer.body["id"], attempt=0, epoch=0)
    return idempotency.respond(answer, {"location": f"/v1/jobs/{answer.body['id']}"})


@router.get("", operation_id="list_jobs", summary="List jobs")
async def list_jobs(
    *,
    service: Running,
    caller: Reader,
    page: WantedPage,
    kind: Literal["ingest", "train", "embed", "evaluate", "experiment", "import_model", "compose"] | None = None,
    status: Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"] | None = None,
    name: Annotated[Name | None, Query()] = None,
) -> JobList:
    """List jobs, newest first."""

    def work(conn: sa.Connection) -> JobList:
        query = select_jobs(caller.tenant)
        if kind is not None:
            query = query.where(job.c.kind == kind)
        if name is not None:
            query = query.where(job.c.name == name)
        match status:
            case None:
                pass
            case "queued":
                query = query.where(job.c.state.in_(("scheduled", "queued")))
            case "running":
                query = query.where(job.c.state == "running", job.c.cancel_requested_at.is_(None))
            case "cancelling":
                query = query.where(job.c.state == "running", job.c.cancel_requested_at.is_not(None))
            case _:
                query = query.where(job.c.state == status)
        among = owned(job, caller.tenant).where(job.c.public_id == page.after)
        rows, more = select_page(conn, query, page, among=among, order_by=(job.c.id,))
        return JobList(data=[job_of(row) for row in rows], has_more=more)

    return await service.database.read(work)


@router.get("/{job_id}", operation_id="get_job", summary="Get a job", responses=documented(NotFound))
async def get(service: Running, caller: Reader, job_id: str) -> Job:
    """Get a job with its progress, error and result."""
    return job_of(await _get_row(service, caller, job_id))


async def _get_row(service: Service, caller: Caller, job_id: str) -> sa.Row[Any]:
    known = check_id(job_id)
    row = await service.database.read(
        lambda conn: conn.execute(select_jobs(caller.tenant).where(job.c.public_id == known)).first()
    )
    if row is None:
        raise NotFound("there is no such job", code="job_not_found")
    return row


@router.post(
    "/{job_id}/cancel", operation_id="cancel_job", summary="Cancel a job", responses=documented(NotFound, Malformed)
)
async def cancel(request: Request, service: Running, caller: Writer, job_id: str) -> Job:
    """Cancel a waiting job at once, ask a running one to stop; a job that has ended answers 400."""
    known = check_id(job_id)
    await service.database.write(lambda conn: queue.cancel(conn, caller.tenant, known))
    return await _changed(request, service, caller, known)


@router.post(
    "/{job_id}/retry",
    operation_id="retry_job",
    summary="Try a failed or cancelled job again",
    responses=documented(NotFound, Malformed, Conflict),
)
async def retry(request: Request, service: Running, caller: Writer, job_id: str) -> Job:
    """Queue it again with all its attempts; a train job goes on from its last checkpoint."""
    known = check_id(job_id)
    await service.database.write(lambda conn: queue.retry(conn, caller.tenant, known))
    return await _changed(request, service, caller, known)


async def _changed(request: Request, service: Service, caller: Caller, job_id: str) -> Job:
    row = await _get_row(service, caller, job_id)
    access.note_job(request, job_id, attempt=row.attempt, epoch=row.lease_epoch)
    return job_of(row)


@router.get(
    "/{job_id}/events",
    operation_id="list_job_events",
    summary="List or follow the events of a job",
    response_model=JobEventList,
    responses={
        200: {
            "description": "A page of events; or, for `Accept: text/event-stream`, a stream of `event`, `state`, "
            "`progress` and `metric` that ends with `done`, whose data is the job.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **documented(NotFound),
    },
)
async def events(
    *,
    request: Request,
    service: Running,
    caller: Reader,
    job_id: str,
    page: WantedPage,
    last_event_id: Annotated[str | None, Header(description="of a stream: go on after this event")] = None,
) -> Response:
    """List what happened to a job, newest first, or follow it as it happens."""
    row = await _get_row(service, caller, job_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        after = _event_id(last_event_id, "last-event-id") if last_event_id else 0
        stream = service.followers.follow(caller.tenant, row.id, after)
        headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    def work(conn: sa.Connection) -> JobEventList:
        query = owned(job_event, caller.tenant).where(job_event.c.job_id == row.id)
        among = query.where(job_event.c.id == (_event_id(page.after, "after") if page.after is not None else None))
        rows, more = select_page(conn, query, page, among=among, order_by=(job_event.c.id,))
        return JobEventList(data=[event_of(each) for each in rows], has_more=more)

    listed = await service.database.read(work)
    return Response(listed.model_dump_json(), media_type="application/json")


def _event_id(text: str, param: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and int(text) < MAX_EVENT_ID):
        raise Malformed("this is not the id of an event", param=param)
    return int(text)


@router.get(
    "/{job_id}/metrics",
    operation_id="get_job_metrics",
    summary="Get the metrics of a job",
    response_model=Metrics,
    responses={
        200: {
            "description": "JSON, or CSV for `Accept: text/csv`.",
            "content": {"text/csv": {"schema": {"type": "string"}}},
        },
        **documented(NotFound),
    },
)
async def metrics(
    request: Request,
    service: Running,
    caller: Reader,
    job_id: str,
    name: Annotated[str | None, Query(max_length=64, pattern=r"^[\x20-\x7e]+$", description="only this one")] = None,
) -> Response:
    """Get every metric by step. Of a step that was worked twice the later run counts."""
    row = await _get_row(service, caller, job_id)
    query = owned(metric, caller.tenant).where(metric.c.job_id == row.id)
    if name is not None:
        query = query.where(metric.c.name == name)
    query = query.order_by(metric.c.step, metric.c.name, metric.c.epoch).limit(MAX_POINTS)
    rows = await service.database.read(lambda conn: conn.execute(query).all())
    points = {(each.step, each.name): each.value for each in rows}
    if "text/csv" in request.headers.get("accept", ""):
        out = io.StringIO()
        table = csv.writer(out)
        table.writerow(["step", "name", "value"])
        table.writerows([step, series, repr(value)] for (step, series), value in points.items())
        return Response(out.getvalue(), media_type="text/csv")
    found: dict[str, tuple[list[int], list[float]]] = {}
    for (step, series), value in points.items():
        steps, values = found.setdefault(series, ([], []))
        steps.append(step)
        values.append(value)
    shown = Metrics(series={series: Series(steps=steps, values=values) for series, (steps, values) in found.items()})
    return Response(shown.model_dump_json(), media_type="application/json")


@router.get(
    "/{job_id}/checkpoints",
    operation_id="list_checkpoints",
    summary="List the checkpoints of a job",
    responses=documented(NotFound),
)
async def checkpoints(service: Running, caller: Reader, job_id: str) -> CheckpointList:
    """List checkpoints, newest first; the id of one serves as a model's."""
    row = await _get_row(service, caller, job_id)
    query = owned(checkpoint, caller.tenant).where(checkpoint.c.job_id == row.id).order_by(checkpoint.c.step.desc())
    rows = await service.database.read(lambda conn: conn.execute(query).all())
    data = [
        Checkpoint(id=f"{row.public_id}@{each.step}", step=each.step, created_at=each.created_at, metrics=each.metrics)
        for each in rows
    ]
    return CheckpointList(data=data, has_more=False)


@router.get(
    "/{job_id}/files",
    operation_id="list_job_files",
    summary="List the files that a job left",
    responses=documented(NotFound, Conflict),
)
async def files(service: Running, caller: Reader, job_id: str) -> FileList:
    """List the files of what the job made: a model, an embedding set, a report, a data set."""
    return await list_files(service, await _artifact(service, caller, job_id))


@router.get(
    "/{job_id}/files/{path:path}",
    operation_id="download_job_file",
    summary="Download a file that a job left",
    response_class=Response,
    responses={**DOWNLOAD, **documented(NotFound, Conflict)},
)
async def download(
    service: Running,
    caller: Reader,
    job_id: str,
    path: str,
    wanted_range: WantedRange = None,
) -> Response:
    """Download a file, or one range of its bytes."""
    return await send_file(service, await _artifact(service, caller, job_id), path, wanted_range)


async def _artifact(service: Service, caller: Caller, job_id: str) -> str:
    row = await _get_row(service, caller, job_id)
    if row.body is None:
        raise Conflict("the job has not succeeded: it has no files", code="job_not_succeeded")
    return str(row.body["artifact"])
