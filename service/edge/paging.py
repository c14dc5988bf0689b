"""Lists: newest first, `after` is the id of the last item that was seen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

import sqlalchemy as sa
from fastapi import Depends, Query

from service.contract.errors import Malformed, NotFound
from service.contract.word import Word

T = TypeVar("T")
MAX_LIMIT: Final = 100
ID: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.@:-]{0,127}\Z")


class Listing(Word, Generic[T]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool


@dataclass(frozen=True)
class Page:
    """Which part of a list is wanted."""

    after: str | None
    limit: int
    descending: bool


async def _page(
    after: Annotated[str | None, Query(max_length=200, description="id of the last item of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="by creation; desc: newest first")] = "desc",
) -> Page:
    return Page(after, limit, order == "desc")


WantedPage = Annotated[Page, Depends(_page)]


def select_page(
    conn: sa.Connection, query: sa.Select[Any], page: Page, *, among: sa.Select[Any], order_by: Sequence[sa.Column[Any]]
) -> tuple[list[sa.Row[Any]], bool]:
    """Run a query for one page; return its rows and whether there are more.

    `among` selects the rows whose ids are valid cursors, and the cursor's own row when filtered by it; `order_by` are
    columns that together are unique. Raises Malformed for a cursor that is none.
    """
    if page.after is not None:
        bad = Malformed("after is not the id of an item of this list", param="after")
        if not ID.match(page.after):
            raise bad
        last = conn.execute(among).first()
        if last is None:
            raise bad
        here = sa.tuple_(*order_by)
        there = sa.tuple_(*(sa.literal(last._mapping[column.name], column.type) for column in order_by))  # noqa: SLF001  # SQLAlchemy's public name
        query = query.where(here < there if page.descending else here > there)
    direction = sa.desc if page.descending else sa.asc
    rows = list(conn.execute(query.order_by(*map(direction, order_by)).limit(page.limit + 1)))
    return rows[: page.limit], len(rows) > page.limit


def check_id(value: str) -> str:
    """Return an id from a path.

    Raises NotFound for what cannot be one: an id is never looked up that the database might choke on.
    """
    if not ID.match(value):
        raise NotFound("there is nothing here by that name")
    return value
