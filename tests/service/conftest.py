"""The application itself, on a real database and a real store, called over ASGI."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest
import sqlalchemy as sa

from service.app import create_app
from service.contract.settings import Settings
from service.contract.tables import alias, model
from service.deps import Service, service_of

if TYPE_CHECKING:
    from service.contract.wire import ModelRef


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Api:
    """A running application and a client of it."""

    client: httpx.AsyncClient
    service: Service

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.client.get(path, **options)

    async def post(self, path: str, **options: Any) -> httpx.Response:
        return await self.client.post(path, **options)

    def add_model(self, model_id: str, ref: ModelRef, *, name: str | None = None, tenant: str = "default") -> None:
        """Add the row of a published model, as the end of its job does."""
        body = self.service.store.manifest(ref.artifact).body
        info = {
            "kind": "train",
            "artifact": ref.artifact,
            "modalities": sorted(body["modalities"]),
            "dimensions": body["dimensions"],
            "logit_scales": body["logit_scales"],
            "logit_biases": body.get("logit_biases", {}),
            "critic": body.get("critic", "cosine"),
            "metrics": {"loss": 1.0},
            "digest": ref.digest,
            "num_bytes": 1,
        }
        with self.service.database.engine.begin() as conn:
            row = {"id": model_id, "tenant_id": tenant, "artifact": ref.artifact, "digest": ref.digest, "info": info}
            conn.execute(sa.insert(model).values(**row))
            if name is not None:
                conn.execute(sa.insert(alias).values(tenant_id=tenant, name=name, model_id=model_id))


Start = Callable[..., AbstractAsyncContextManager[Api]]


@asynccontextmanager
async def _run(folder: Path, database_url: str, **changes: Any) -> AsyncGenerator[Api]:
    settings = Settings(data=folder, database_url=database_url, store_url=str(folder / "store"), **changes)
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield Api(client, service_of(app))


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start the application: `async with start(database_url, **settings) as api`."""

    def run(database_url: str, **changes: Any) -> AbstractAsyncContextManager[Api]:
        return _run(tmp_path, database_url, **changes)

    return run


SMALL: Final = {"max_body_bytes": 200_000, "max_upload_bytes": 3_000_000, "max_items": 100, "max_tokens": 1000}


@pytest.fixture
async def api(start: Start, database_url: str) -> AsyncIterator[Api]:
    """The application on each database."""
    async with start(database_url) as running:
        yield running


@pytest.fixture
async def small(start: Start, sqlite_template: Path, tmp_path: Path) -> AsyncIterator[Api]:
    """The application on SQLite, with small limits."""
    path = shutil.copy(sqlite_template, tmp_path / "small.db")
    async with start(f"sqlite:///{path}", **SMALL) as running:
        yield running


@pytest.fixture(scope="module")
async def shared(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    """One application with small limits for all tests of a module that leave nothing behind."""
    folder = tmp_path_factory.mktemp("shared")
    path = shutil.copy(sqlite_template, folder / "shared.db")
    async with _run(folder, f"sqlite:///{path}", **SMALL) as running:
        yield running
