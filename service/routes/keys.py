"""API keys: made, listed and revoked by whoever holds the scope admin."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import Connection

from service.contract.errors import NotFound, UnsupportedMedia
from service.contract.tables import api_key, owned
from service.deps import Admin, Running
from service.edge.bodies import StrictRoute
from service.edge.paging import WantedPage, check_id, select_page
from service.edge.problems import documented
from service.keys import CreateKey, create_key, revoke_key
from service.resources import CreatedKey, Deleted, KeyList, key_of

router = APIRouter(tags=["keys"], prefix="/v1/keys", route_class=StrictRoute)


@router.post(
    "", operation_id="create_key", summary="Create an API key", status_code=201, responses=documented(UnsupportedMedia)
)
async def create(service: Running, caller: Admin, body: CreateKey) -> CreatedKey:
    """Create a key; its secret is shown this once, so an idempotency key has no effect here."""

    def work(conn: Connection) -> CreatedKey:
        key_id, secret = create_key(conn, caller.tenant, body)
        row = conn.execute(owned(api_key, caller.tenant).where(api_key.c.id == key_id)).one()
        return CreatedKey(key=key_of(row), secret=secret)

    created = await service.database.write(work)
    service.keys.forget()
    return created


@router.get("", operation_id="list_keys", summary="List API keys")
async def list_keys(service: Running, caller: Admin, page: WantedPage) -> KeyList:
    """List keys without their secrets, revoked ones included."""

    def work(conn: Connection) -> KeyList:
        query = owned(api_key, caller.tenant)
        rows, more = select_page(
            conn,
            query,
            page,
            among=query.where(api_key.c.id == page.after),
            order_by=(api_key.c.created_at, api_key.c.id),
        )
        return KeyList(data=[key_of(row) for row in rows], has_more=more)

    return await service.database.read(work)


@router.delete("/{key_id}", operation_id="revoke_key", summary="Revoke an API key", responses=documented(NotFound))
async def revoke(service: Running, caller: Admin, key_id: str) -> Deleted:
    """Revoke a key; other processes notice within five seconds."""
    if not await service.database.write(lambda conn: revoke_key(conn, caller.tenant, check_id(key_id))):
        raise NotFound("there is no such key")
    service.keys.forget()
    return Deleted(id=key_id, object="key")
