from __future__ import annotations

import logging
from typing import Any

import pytest

pytestmark = pytest.mark.anyio

MULTIPART = b"multipart/form-data; boundary=x"
PART = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.tar"\r\n\r\n' + b"a" * 5000


@pytest.mark.parametrize(
    ("path", "media_type", "piece"),
    [("/v1/embeddings", b"application/json", b'{"model":'), ("/v1/datasets", MULTIPART, PART)],
)
async def test_a_caller_who_hangs_up_within_the_body_is_nobodys_error(
    shared: Any, caplog: pytest.LogCaptureFixture, path: str, media_type: bytes, piece: bytes
) -> None:
    messages = iter([{"type": "http.request", "body": piece, "more_body": True}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", media_type), (b"content-length", b"9999")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    app = shared.client._transport.app
    with caplog.at_level(logging.INFO):
        await app(scope, receive, send)
    assert not sent
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert f'path="{path}",status="499"' in (await shared.get("/metrics")).text
