"""Embedding sets that requests named a moment ago: found again without the database, also while that is away."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final, final

import sqlalchemy as sa

from service.contract.errors import NotFound, Unavailable
from service.contract.tables import embedding_set, owned
from service.contract.word import Word
from service.database import Database
from service.resources import EmbeddingSet, embedding_set_of

FRESH_S: Final = 5.0
MAX_SETS: Final = 4096


class Operand(Word):
    """An embedding set, and where it lies."""

    about: EmbeddingSet
    artifact: str


@dataclass(frozen=True)
class _Known:
    operand: Operand
    at: float


@final
class KnownSets:
    """Look up embedding sets by id; for a few seconds another process may have deleted what is answered."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    async def find(self, tenant: str, set_id: str, *, param: str) -> Operand:
        """Return an embedding set that a request names.

        Raises NotFound, and Unavailable if neither the database nor this process knows.
        """
        at, key = time.monotonic(), (tenant, set_id)
        known = self._known.get(key)
        if known is not None and at - known.at <= FRESH_S:
            return known.operand
        try:
            row = await get_row(self._database, tenant, set_id, param=param)
        except NotFound:
            self.forget(tenant, set_id)
            raise
        except Unavailable:
            if known is None:
                raise
            operand = known.operand
        else:
            operand = Operand(about=embedding_set_of(row), artifact=row.artifact)
        self._known[key] = _Known(operand, at)
        while len(self._known) > MAX_SETS:
            self._known.popitem(last=False)
        return operand

    def forget(self, tenant: str, set_id: str) -> None:
        """Ask the database again: the set is gone."""
        self._known.pop((tenant, set_id), None)


async def get_row(database: Database, tenant: str, set_id: str, *, param: str | None = None) -> sa.Row[Any]:
    """Return the row of an embedding set.

    Raises NotFound.
    """
    row = await database.read(
        lambda conn: conn.execute(owned(embedding_set, tenant).where(embedding_set.c.id == set_id)).first()
    )
    if row is None:
        raise NotFound("there is no such embedding set", param=param, code="embedding_set_not_found")
    return row
