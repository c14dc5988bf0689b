from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import sqlalchemy as sa

from service import known_sets
from service.contract.errors import NotFound, Unavailable
from service.contract.tables import embedding_set, now
from service.database import Database
from service.known_sets import KnownSets

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]
INFO = {
    "artifact": "embeddings/emb_a/1",
    "model": "m",
    "model_digest": "sha256:m",
    "modality": "image",
    "num_vectors": 3,
    "dimensions": 4,
    "num_bytes": 48,
    "digest": "sha256:e",
}


@pytest.fixture
async def database(engine: sa.Engine) -> AsyncIterator[Database]:
    with engine.begin() as conn:
        row = {"id": "emb_a", "tenant_id": "t", "artifact": "embeddings/emb_a/1", "info": INFO, "job_id": "job_a"}
        conn.execute(sa.insert(embedding_set).values(**row))
    database = Database(engine)
    yield database
    await database.close()


def delete(engine: sa.Engine) -> None:
    with engine.begin() as conn:
        conn.execute(sa.update(embedding_set).values(deleted_at=now()))


async def test_a_set_is_known_for_a_while_and_forgotten_on_demand(database: Database, engine: sa.Engine) -> None:
    sets = KnownSets(database)
    found = await sets.find("t", "emb_a", param="target")
    assert (found.artifact, found.about.num_vectors) == ("embeddings/emb_a/1", 3)
    delete(engine)
    assert await sets.find("t", "emb_a", param="target") == found
    sets.forget("t", "emb_a")
    with pytest.raises(NotFound) as missing:
        await sets.find("t", "emb_a", param="target.embeddings")
    assert missing.value.param == "target.embeddings"


async def test_a_set_is_its_tenants_alone(database: Database) -> None:
    sets = KnownSets(database)
    await sets.find("t", "emb_a", param="target")
    with pytest.raises(NotFound):
        await sets.find("other", "emb_a", param="target")


async def test_what_is_stale_is_looked_up_again(
    database: Database, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_sets, "FRESH_S", -1.0)
    sets = KnownSets(database)
    await sets.find("t", "emb_a", param="target")
    delete(engine)
    with pytest.raises(NotFound):
        await sets.find("t", "emb_a", param="target")


async def test_without_the_database_what_was_known_is_answered(
    database: Database, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_sets, "FRESH_S", -1.0)
    sets = KnownSets(database)
    found = await sets.find("t", "emb_a", param="target")
    with engine.begin() as conn:
        conn.execute(sa.text("ALTER TABLE embedding_set RENAME TO elsewhere"))
    assert await sets.find("t", "emb_a", param="target") == found
    with pytest.raises(Unavailable):
        await KnownSets(database).find("t", "emb_a", param="target")
