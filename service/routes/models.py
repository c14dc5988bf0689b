"""Models: listed in OpenAI's shape, named by aliases, downloaded, deleted."""

from __future__ import annotations

from typing import Annotated, Any, Final

import sqlalchemy as sa
from fastapi import APIRouter, Response
from pydantic import Field, StrictStr

from service.aliases import check_alias
from service.contract.dialects import now
from service.contract.errors import Conflict, Invalid, NotFound, UnsupportedMedia
from service.contract.references import is_needed, resolve_model
from service.contract.tables import alias, job, model, owned
from service.contract.word import Word
from service.deps import Reader, Running, Service, Writer
from service.edge.bodies import StrictRoute
from service.edge.downloads import DOWNLOAD, WantedRange, list_files, send_file
from service.edge.paging import WantedPage, check_id, select_page
from service.edge.problems import documented
from service.keys import Caller
from service.resources import Deleted, FileList, Model, ModelList, aliases_of, model_of

router = APIRouter(tags=["models"], prefix="/v1/models", route_class=StrictRoute)

MAX_ALIASES: Final = 32
MODEL: Final = "a model's id or alias, or job_x@latest, job_x@<step> for a checkpoint"


class UpdateModel(Word):
    """What can be changed about a model."""

    aliases: Annotated[
        list[StrictStr],
        Field(max_length=MAX_ALIASES, description="all its aliases; one that another model has moves here"),
    ]


@router.get("", operation_id="list_models", summary="List models")
async def list_models(service: Running, caller: Reader, page: WantedPage) -> ModelList:
    """List models, newest first. Checkpoints are listed with their jobs."""

    def work(conn: sa.Connection) -> ModelList:
        query = owned(model, caller.tenant)
        among = query.where(model.c.id == page.after)
        rows, more = select_page(conn, query, page, among=among, order_by=(model.c.created_at, model.c.id))
        names = aliases_of(conn, caller.tenant, [row.id for row in rows])
        return ModelList(data=[model_of(row, names[row.id]) for row in rows], has_more=more)

    return await service.database.read(work)


@router.get("/{name}", operation_id="get_model", summary="Get a model", responses=documented(NotFound))
async def get(service: Running, caller: Reader, name: str) -> Model:
    """Get a model by its id or an alias, or a checkpoint, with its tokenisers and limits."""
    found = await service.catalogue.find(caller.tenant, check_id(name))
    lengths = {modality: config.max_length for modality, config in found.modalities.items()}

    def work(conn: sa.Connection) -> Model:
        resolved = resolve_model(conn, caller.tenant, name)
        row = conn.execute(owned(model, caller.tenant).where(model.c.id == resolved["id"])).first()
        if row is not None:
            names = aliases_of(conn, caller.tenant, [row.id])
            return model_of(row, names[row.id]).model_copy(
                update={"limits": lengths, "tokenisers": dict(found.modalities)}
            )
        job_id = resolved["id"].partition("@")[0]
        made = conn.execute(owned(job, caller.tenant).where(job.c.public_id == job_id)).one()
        return Model(
            id=resolved["id"],
            created=int((made.started_at or made.created_at).timestamp()),
            owned_by=caller.tenant,
            aliases=[],
            modalities=sorted(found.modalities),
            pairs=[list(pair) for pair in found.pairs],
            dimensions=found.dimensions,
            critic=found.critic,
            logit_scales=found.body["logit_scales"],
            logit_biases=found.body.get("logit_biases", {}),
            metrics=found.body.get("metrics", {}),
            state="checkpoint",
            job_id=job_id,
            digest=resolved["digest"],
            num_bytes=None,
            limits=lengths,
            tokenisers=dict(found.modalities),
        )

    return await service.database.read(work)


@router.patch(
    "/{name}",
    operation_id="update_model",
    summary="Set the aliases of a model",
    responses=documented(NotFound, UnsupportedMedia),
)
async def update(service: Running, caller: Writer, name: str, body: UpdateModel) -> Model:
    """Set a model's aliases; requests by name reach it within five seconds in every process."""
    known, tenant = check_id(name), caller.tenant
    for index, wanted in enumerate(body.aliases):
        check_alias(wanted, param=f"aliases[{index}]")

    def work(conn: sa.Connection) -> Model:
        row = _locked(conn, tenant, known)
        mine = alias.c.tenant_id == tenant
        conn.execute(sa.delete(alias).where(mine, (alias.c.model_id == row.id) | alias.c.name.in_(body.aliases)))
        if body.aliases:
            values = [{"tenant_id": tenant, "name": each, "model_id": row.id} for each in sorted(set(body.aliases))]
            conn.execute(sa.insert(alias), values)
        return model_of(row, aliases_of(conn, tenant, [row.id])[row.id])

    changed = await service.database.write(work)
    service.catalogue.forget(tenant)
    return changed


def _locked(conn: sa.Connection, tenant: str, name: str) -> sa.Row[Any]:
    """Return the row of a model that is to be changed.

    Raises NotFound, Invalid for a checkpoint.
    """
    found = resolve_model(conn, tenant, name)
    if "@" in found["id"]:
        raise Invalid("a checkpoint belongs to its job and cannot be changed")
    return conn.execute(owned(model, tenant).where(model.c.id == found["id"]).with_for_update()).one()


@router.delete(
    "/{name}", operation_id="delete_model", summary="Delete a model", responses=documented(NotFound, Conflict)
)
async def delete(service: Running, caller: Writer, name: str) -> Deleted:
    """Delete a model and its aliases, unless a job that is queued or running reads it."""
    known, tenant = check_id(name), caller.tenant

    def work(conn: sa.Connection) -> str:
        row = _locked(conn, tenant, known)
        if is_needed(conn, tenant, row.id):
            raise Conflict("a job that has not ended needs this model", code="model_in_use")
        conn.execute(sa.delete(alias).where(alias.c.tenant_id == tenant, alias.c.model_id == row.id))
        conn.execute(sa.update(model).where(model.c.id == row.id).values(deleted_at=now()))
        return row.id

    deleted = await service.database.write(work)
    service.catalogue.forget(tenant)
    return Deleted(id=deleted, object="model")


@router.get(
    "/{name}/files",
    operation_id="list_model_files",
    summary="List the files of a model",
    responses=documented(NotFound),
)
async def files(service: Running, caller: Reader, name: str) -> FileList:
    """List a model's files: recipe, weights, tokenisers, bridge bank."""
    return await list_files(service, await _artifact(service, caller, name))


@router.get(
    "/{name}/files/{path:path}",
    operation_id="download_model_file",
    summary="Download a file of a model",
    response_class=Response,
    responses={**DOWNLOAD, **documented(NotFound)},
)
async def download(
    service: Running,
    caller: Reader,
    name: str,
    path: str,
    wanted_range: WantedRange = None,
) -> Response:
    """Download a file, or one range of its bytes."""
    return await send_file(service, await _artifact(service, caller, name), path, wanted_range)


async def _artifact(service: Service, caller: Caller, name: str) -> str:
    return (await service.catalogue.find(caller.tenant, check_id(name))).ref.artifact
