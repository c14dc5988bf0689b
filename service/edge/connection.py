"""Connections as uvicorn serves them, with bounds on what it leaves unbounded: the head of a request and its arrival.

The parser joins the pieces of one header again and again, so that a header of a hundred megabytes, which needs no key,
would hold up every other caller for minutes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast, final

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.contract.word import new_id
from service.edge.problems import render

if TYPE_CHECKING:
    from asyncio.events import TimerHandle

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

MAX_HEAD_BYTES: Final = 64 << 10
HEAD_S: Final = 30.0  # from the connection, or from the first byte of a later request


@final
class BoundedProtocol(HttpToolsProtocol):
    """Refuse heads and trailers that are too long with 431, and close connections whose head does not come."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = False  # its first byte came, its last did not
        self._in_body = False
        self._head_bytes = 0
        self._timer: TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_S, self._on_late)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            room = MAX_HEAD_BYTES - self._head_bytes
            head, data = data[:room], data[room:]
            if head:
                super().data_received(head)
            if self._in_head:
                self._head_bytes += len(head)
                self._timer = self._timer or self.loop.call_later(HEAD_S, self._on_late)
            if not data or self.transport.is_closing():
                return
            if self._in_head:
                self._refuse(431, f"the head of a request has at most {MAX_HEAD_BYTES} bytes")
                return
        super().data_received(data)

    @override
    def on_message_begin(self) -> None:
        self._in_head, self._in_body, self._head_bytes = True, False, 0
        super().on_message_begin()

    @override
    def on_headers_complete(self) -> None:
        self._in_head, self._in_body, self._head_bytes = False, True, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Expect a piece of the body; after the last piece come trailers, which are headers again."""
        self._in_head, self._in_body, self._head_bytes = True, False, 0

    @override
    def on_body(self, body: bytes) -> None:
        self._in_head, self._in_body, self._head_bytes = False, True, 0
        self._stop_timer()
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._in_head, self._in_body, self._head_bytes = False, False, 0
        self._stop_timer()
        super().on_message_complete()

    @override
    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _on_late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"the head of a request arrives within {HEAD_S:g} s")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, message: str) -> None:
        cycle = cast("RequestResponseCycle | None", self.cycle)
        # Never in the middle of another answer.
        if cycle is None or cycle.response_complete or not cycle.response_started:
            answer = render(status, message, "invalid_request_error", headers={"connection": "close"})
            headers = [*answer.raw_headers, (b"x-request-id", new_id("req").encode())]
            lines = [b"HTTP/1.1 %d \r\n" % status, *(b"%b: %b\r\n" % each for each in headers), b"\r\n"]
            self.transport.write(b"".join([*lines, bytes(answer.body)]))
        self.transport.close()
