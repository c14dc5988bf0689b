"""Connections to a real server, by raw sockets: heads that are too long, too slow, or no HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from service.edge import connection
from service.edge.connection import MAX_HEAD_BYTES, BoundedProtocol

pytestmark = pytest.mark.anyio


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def drip(_request: Request) -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield b"x"
            await asyncio.sleep(0.1)

    return StreamingResponse(pieces())


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"]), Route("/drip", drip)])
    server = uvicorn.Server(uvicorn.Config(app, http=BoundedProtocol, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def send(port: int, *pieces: bytes) -> bytes:
    """Send pieces one by one and return what comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def refused(answer: bytes, status: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"x-request-id: req_" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


HEAD = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"


async def test_bodies_of_any_length_pass_whole_or_in_chunks(port: int) -> None:
    body = b"a" * (3 * MAX_HEAD_BYTES)
    whole = await send(port, HEAD + b"content-length: %d\r\n\r\n" % len(body), body)
    assert whole.endswith(b"\r\n\r\n%d" % len(body))
    chunk = b"%x\r\n%b\r\n" % (len(body), body)
    chunked = await send(port, HEAD + b"transfer-encoding: chunked\r\n\r\n", chunk, chunk * 2 + b"0\r\n\r\n")
    assert chunked.endswith(b"\r\n\r\n%d" % (3 * len(body)))


@pytest.mark.parametrize(
    "more", [b"x: " + b"a" * MAX_HEAD_BYTES, b"x: a\r\n" * (MAX_HEAD_BYTES // 6)], ids=["one header", "many headers"]
)
async def test_a_head_that_is_too_long_is_refused_before_it_ends(port: int, more: bytes) -> None:
    refused(await send(port, HEAD + more), 431)
    refused(await send(port, HEAD, more[:-20], b"a" * 40), 431)


async def test_trailers_that_are_too_long_end_the_connection(port: int) -> None:
    trailer = b"0\r\nx: " + b"a" * MAX_HEAD_BYTES
    assert b"200 OK" not in await send(port, HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n", trailer, b"a" * 9)


@pytest.mark.parametrize("head", [b"", b"GET / HT", HEAD])
async def test_a_head_that_does_not_come_is_not_waited_for(port: int, head: bytes) -> None:
    refused(await send(port, head), 408)


async def test_a_long_answer_is_not_cut_by_the_time_for_heads(port: int) -> None:
    answer = await send(port, b"GET /drip HTTP/1.0\r\n\r\n")
    assert answer.count(b"\r\nx\r\n") == 8


async def test_what_is_not_http_is_answered_like_everything_else(port: int) -> None:
    refused(await send(port, b"\x16\x03\x01\x02\x00\x01\r\n\r\n"), 400)
    refused(await send(port, HEAD + b"transfer-encoding: chunked\r\n\r\n", b"zz\r\n"), 400)
