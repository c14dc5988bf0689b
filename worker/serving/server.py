"""The inference process over HTTP: POST /call (the wire), /healthz, /readyz, /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from service.contract.errors import (
    Invalid,
    IsthmusError,
    Malformed,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from service.contract.wire import call_adapter, pack, pack_error, unpack
from worker.serving.operations import Answer, Parts, answer

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_CALL_BYTES: Final = 1 << 30
OFF_LOOP_BYTES: Final = 1 << 20  # larger bodies are read and written in a thread: copying them takes milliseconds
CLOSED_BY_CLIENT: Final = 499
T = TypeVar("T")


def create_app(parts: Parts, *, timeout_s: float, token: str | None) -> Starlette:
    """Build the application; `timeout_s` is the deadline of calls that name none, `token` is asked of every call."""

    async def call(request: Request) -> Response:
        started = time.monotonic()
        if token is not None and not _is_authorised(request, token):
            raise Unauthenticated("a valid worker token is needed")
        deadline = started + _remaining_s(request, timeout_s)
        try:
            body = await _body(request)
            result = await _unless_gone(request, _answer(parts, body, deadline))
        except ClientDisconnect:
            return Response(status_code=CLOSED_BY_CLIENT)
        headers = {"x-queue-ms": f"{result.queue_ms:.3f}", "x-inference-ms": f"{result.inference_ms:.3f}"}
        size = sum(array.nbytes for array in result.arrays.values())
        packed = await _maybe_in_thread(size, lambda: pack(result.document, result.arrays))
        return Response(packed, media_type="application/octet-stream", headers=headers)

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_request: Request) -> Response:
        if parts.batcher.alive():
            return JSONResponse({"status": "ok", "missing": []})
        return JSONResponse({"status": "unready", "missing": ["batcher"]}, status_code=503)

    async def metrics(_request: Request) -> Response:
        return PlainTextResponse(_metrics(parts), media_type="text/plain; version=0.0.4")

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        parts.batcher.start()
        yield
        parts.batcher.stop()

    routes = [
        Route("/call", call, methods=["POST"]),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={IsthmusError: _on_error})


def _is_authorised(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


def _remaining_s(request: Request, default_s: float) -> float:
    text = request.headers.get("x-deadline-ms")
    if text is None:
        return default_s
    try:
        remaining_s = float(text) / 1000
    except ValueError:
        remaining_s = math.nan
    if not math.isfinite(remaining_s):
        raise Malformed("x-deadline-ms is a number of milliseconds")
    return remaining_s


async def _body(request: Request) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_CALL_BYTES:
            raise TooLarge(f"a call has at most {MAX_CALL_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


async def _answer(parts: Parts, body: bytes, deadline: float) -> Answer:
    document, arrays = await _maybe_in_thread(len(body), lambda: unpack(body))
    try:
        call = call_adapter.validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Invalid(str(first["msg"]), param=".".join(str(part) for part in first["loc"]) or None) from None
    try:
        # The batcher minds the deadline too; this one covers the loading of a model.
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await answer(parts, call, arrays, deadline=deadline)
    except TimeoutError:
        raise Unavailable("the request was not served before its deadline", code="deadline") from None


async def _maybe_in_thread(num_bytes: int, work: Any) -> Any:
    return await asyncio.to_thread(work) if num_bytes > OFF_LOOP_BYTES else work()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Finish some work, or cancel it as soon as the client hangs up.

    Raises ClientDisconnect in that case.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_error(_request: Request, error: Exception) -> Response:
    known = cast("IsthmusError", error)
    status, body = pack_error(known)
    headers: dict[str, str] = {}
    if isinstance(known, Unavailable | TooMany):
        headers["retry-after"] = str(max(1, math.ceil(known.retry_after_s)))
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def _metrics(parts: Parts) -> str:
    stats = parts.batcher.stats
    figures = {
        "isthmus_inference_calls_total": stats.tickets,
        "isthmus_inference_items_total": stats.items,
        "isthmus_inference_batches_total": stats.batches,
        "isthmus_inference_items_failed_total": stats.failed,
        "isthmus_inference_items_dropped_total": stats.dropped,
        "isthmus_inference_items_waiting": parts.batcher.num_waiting,
        "isthmus_inference_models_loaded": len(parts.residency.artifacts),
        "isthmus_inference_model_bytes": parts.residency.num_bytes,
    }
    lines: list[str] = []
    for name, value in figures.items():
        lines += [f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}", f"{name} {value}"]
    return "\n".join(lines) + "\n"
