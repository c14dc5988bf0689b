"""Callers who fall silent in the middle of a body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from service.app import create_app
from service.contract.settings import Settings

pytestmark = pytest.mark.anyio

PART = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.tar"\r\n\r\n' + b"a" * 5000


@pytest.fixture
async def port(tmp_path: Path, sqlite_template: Path) -> AsyncIterator[int]:
    settings = Settings(data=tmp_path, database_url=f"sqlite:///{sqlite_template}", body_timeout_s=0.3)
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="error"))
    serving = asyncio.create_task(server.serve())
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def send(port: int, path: str, media_type: str, *pieces: bytes, num_bytes: int) -> tuple[int, Any]:
    """Send a body in pieces, a tenth of a second apart; return the status and the document when the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    headers = {"host": "localhost", "content-type": media_type, "content-length": num_bytes}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    writer.write("\r\n".join(lines).encode())
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("path", "media_type", "piece"),
    [
        ("/v1/jobs", "application/json", b'{"kind":'),
        ("/v1/embeddings", "application/json", b'{"model":'),
        ("/v1/embeddings", "application/json", b""),
        ("/v1/datasets", "multipart/form-data; boundary=x", PART),
    ],
)
async def test_a_body_that_stops_coming_is_not_waited_for(
    port: int, path: str, media_type: str, piece: bytes, tmp_path: Path
) -> None:
    status, document = await send(port, path, media_type, piece, num_bytes=9999)
    assert status == 408
    assert document["error"]["message"] == "the rest of the body did not come"
    assert not list((tmp_path / "store").rglob("*.tar"))


async def test_a_body_that_comes_slowly_is_read_whole(port: int) -> None:
    media_type = "application/json\r\nconnection: close"
    pieces = [b'{"model": ', *([b" "] * 8), b'"m", "input": "a"}']
    status, document = await send(port, "/v1/embeddings", media_type, *pieces, num_bytes=sum(map(len, pieces)))
    assert (status, document["error"]["code"]) == (404, "model_not_found")
