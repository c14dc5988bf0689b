"""An API whose gateway knows an inference process and its models."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from service.contract.host import boot_id
from service.contract.tables import worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from service.contract.wire import ModelRef


@pytest.fixture
def start_served(start: Any, sqlite_template: Path, tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Any]]:
    """Start an API over a store and the inference process on it; `model_a` is called `a`."""

    @asynccontextmanager
    async def run(store: Path, endpoint: str, models: Mapping[str, ModelRef], **changes: Any) -> AsyncGenerator[Any]:
        path = shutil.copy(sqlite_template, tmp_path / "isthmus.db")
        (tmp_path / "store").symlink_to(store)
        async with start(f"sqlite:///{path}", **changes) as running:
            row = {"id": "w", "lanes": ["serve"], "kinds": [], "host": "h", "boot": boot_id(), "pid": 1, "version": "0"}
            with running.service.database.engine.begin() as conn:
                conn.execute(sa.insert(worker).values(**row, endpoint=endpoint))
            for key, ref in models.items():
                name = key.removeprefix("model_")
                running.add_model(f"model_{name}", ref, name=name)
            running.service.gateway._workers.look_again()
            for _ in range(100):
                if running.service.gateway.ready():
                    break
                await asyncio.sleep(0.02)
            yield running

    return run
