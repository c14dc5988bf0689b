"""Embedding sets: what embed jobs made, to be downloaded or used in compose."""

from __future__ import annotations

import sqlalchemy as sa
from fastapi import APIRouter, Response

from service.contract.dialects import now
from service.contract.errors import Conflict, NotFound
from service.contract.references import is_needed
from service.contract.tables import embedding_set, owned
from service.deps import Reader, Running, Writer
from service.edge.downloads import DOWNLOAD, WantedRange, list_files, send_file
from service.edge.paging import WantedPage, check_id, select_page
from service.edge.problems import documented
from service.known_sets import get_row
from service.resources import Deleted, EmbeddingSet, EmbeddingSetList, FileList, embedding_set_of

router = APIRouter(tags=["embedding sets"], prefix="/v1/embedding-sets")


@router.get("", operation_id="list_embedding_sets", summary="List embedding sets")
async def list_sets(service: Running, caller: Reader, page: WantedPage) -> EmbeddingSetList:
    """List embedding sets, newest first."""

    def work(conn: sa.Connection) -> EmbeddingSetList:
        query = owned(embedding_set, caller.tenant)
        among = query.where(embedding_set.c.id == page.after)
        order_by = (embedding_set.c.created_at, embedding_set.c.id)
        rows, more = select_page(conn, query, page, among=among, order_by=order_by)
        return EmbeddingSetList(data=[embedding_set_of(row) for row in rows], has_more=more)

    return await service.database.read(work)


@router.get(
    "/{set_id}", operation_id="get_embedding_set", summary="Get an embedding set", responses=documented(NotFound)
)
async def get(service: Running, caller: Reader, set_id: str) -> EmbeddingSet:
    """Get an embedding set: which model made it of what, and how large it is."""
    return embedding_set_of(await get_row(service.database, caller.tenant, check_id(set_id)))


@router.delete(
    "/{set_id}",
    operation_id="delete_embedding_set",
    summary="Delete an embedding set",
    responses=documented(NotFound, Conflict),
)
async def delete(service: Running, caller: Writer, set_id: str) -> Deleted:
    """Delete an embedding set, unless a job that is queued or running reads it."""
    known, tenant = check_id(set_id), caller.tenant

    def work(conn: sa.Connection) -> None:
        row = conn.execute(owned(embedding_set, tenant).where(embedding_set.c.id == known).with_for_update()).first()
        if row is None:
            raise NotFound("there is no such embedding set", code="embedding_set_not_found")
        if is_needed(conn, tenant, row.id):
            raise Conflict("a job that has not ended needs this embedding set", code="embedding_set_in_use")
        conn.execute(sa.update(embedding_set).where(embedding_set.c.id == row.id).values(deleted_at=now()))

    await service.database.write(work)
    service.sets.forget(tenant, known)
    return Deleted(id=known, object="embedding_set")


@router.get(
    "/{set_id}/files",
    operation_id="list_embedding_set_files",
    summary="List the files of an embedding set",
    responses=documented(NotFound),
)
async def files(service: Running, caller: Reader, set_id: str) -> FileList:
    """List the files: the vectors as npy, and with keys and labels as Parquet."""
    return await list_files(service, (await get_row(service.database, caller.tenant, check_id(set_id))).artifact)


@router.get(
    "/{set_id}/files/{path:path}",
    operation_id="download_embedding_set_file",
    summary="Download a file of an embedding set",
    response_class=Response,
    responses={**DOWNLOAD, **documented(NotFound)},
)
async def download(
    service: Running,
    caller: Reader,
    set_id: str,
    path: str,
    wanted_range: WantedRange = None,
) -> Response:
    """Download a file, or one range of its bytes."""
    row = await get_row(service.database, caller.tenant, check_id(set_id))
    return await send_file(service, row.artifact, path, wanted_range)
