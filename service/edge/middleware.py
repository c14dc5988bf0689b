"""The outermost layer: a request id, a caller, timing and security headers on every answer, and the last handler.

Plain ASGI: the framework's own middleware class would wrap every streamed answer in another task.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import MutableMapping
from typing import Any, Final, final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.contract.errors import IsthmusError, Unavailable
from service.contract.word import new_id
from service.deps import Service, service_of
from service.edge import access
from service.edge.docs import ASSETS
from service.edge.problems import GONE, render, render_error
from service.edge.stalls import unless_stalled
from service.edge.telemetry import Telemetry

log = logging.getLogger(__name__)

SANE_ID: Final = re.compile(r"^[A-Za-z0-9_.:-]{1,128}\Z")
MAX_HEADER_VALUE: Final = 8192
NO_KEY_NEEDED: Final = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"})
SECURITY: Final = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@final
class Edge:
    """Wrap the application."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, *, body_timeout_s: float) -> None:
        self.app = app
        self._body_timeout_s = body_timeout_s
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        scope["isthmus.request_id"] = answer.request_id
        self._telemetry.in_flight.inc()
        try:
            if (refusal := await _admit(service_of(scope["app"]), scope, answer)) is not None:
                await refusal(scope, receive, answer.send)
            else:
                await self.app(scope, unless_stalled(receive, self._body_timeout_s), answer.send)
        except ClientDisconnect:
            answer.status = answer.status or GONE  # in the middle of its body: there is nobody to answer
        except asyncio.CancelledError:
            if answer.status is not None or not service_of(scope["app"]).draining:
                raise
            # The grace of a stop is over: the caller hears so, where the server itself would answer 500.
            stopping = render_error(Unavailable("the server is stopping", code="stopping"))
            await stopping(scope, receive, answer.send)
        except Exception:
            # A bug: the log gets everything, the caller the id to ask about.
            log.exception("a request met a bug", extra={"fields": access.about(scope)})
            if answer.status is not None:
                raise  # too late for another answer: the server cuts the connection
            message = f"the server met a bug; request id {answer.request_id}"
            await render(500, message, "server_error", code="internal_error")(scope, receive, answer.send)
        finally:
            self._telemetry.in_flight.dec()
            seconds = time.perf_counter() - answer.began
            self._telemetry.observe(scope, answer.status or 500, seconds)
            access.log_request(scope, answer.status or 500, seconds)


async def _admit(service: Service, scope: Scope, answer: _Answer) -> ASGIApp | None:
    """Put the caller into the scope, or return the refusal; no body is read for an unknown caller."""
    if scope["path"] in NO_KEY_NEEDED or scope["path"].startswith(f"{ASSETS}/"):
        return None
    headers = answer.headers
    if len(headers.get("authorization", "")) > MAX_HEADER_VALUE:
        headers = {"authorization": ""}
    try:
        scope["isthmus.caller"] = await service.keys.authenticate(headers)
    except IsthmusError as error:
        return render_error(error)
    return None


@final
class _Answer:
    """Completes the headers of an answer on its way out."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.headers = Headers(scope=scope)
        wanted = self.headers.get("x-request-id", "")
        self.request_id = wanted if SANE_ID.match(wanted) else new_id("req")
        self.began = time.perf_counter()
        self.status: int | None = None
        self._scope = scope
        self._send = send
        self._rewritten = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] == 413 and self._is_plain(message):
                # The framework's body limit answers below every handler, in plain text.
                self._rewritten = True
                refusal = render(413, "the body is larger than the limit", "invalid_request_error")
                self._begin({"status": 413, "headers": list(refusal.raw_headers)})
                await self._send({"type": "http.response.start", "status": 413, "headers": self._raw})
                await self._send({"type": "http.response.body", "body": refusal.body})
                return
            self._begin(message)
            await self._send({**message, "headers": self._raw})
        elif not self._rewritten:
            await self._send(message)

    def _begin(self, message: MutableMapping[str, Any]) -> None:
        self.status = message["status"]
        headers = MutableHeaders(raw=list(message["headers"]))
        headers["x-request-id"] = self.request_id
        headers["x-total-time"] = f"{(time.perf_counter() - self.began) * 1000:.2f}"
        for name, value in SECURITY.items():
            headers.setdefault(name, value)
        self._raw = headers.raw

    @staticmethod
    def _is_plain(message: Message) -> bool:
        return Headers(raw=list(message["headers"])).get("content-type", "").startswith("text/plain")
