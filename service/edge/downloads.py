"""Sending files of artifacts: listed from the manifest, streamed in pieces, at most one range of bytes."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Final

from fastapi import Header, Response
from starlette.responses import StreamingResponse

from service.contract.errors import NotFound
from service.deps import Service
from service.edge.problems import ErrorBody, render
from service.resources import File, FileList

PIECE_BYTES: Final = 1 << 20
RANGE: Final = re.compile(r"^bytes=(\d{0,18})-(\d{0,18})\Z")
MEDIA_TYPES: Final = {"json": "application/json", "csv": "text/csv", "html": "text/html", "txt": "text/plain"}
# Of a page of ours: it may be looked at, and what it holds can neither run, nor fetch, nor act as this site.
PAGE_POLICY: Final = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_BYTES: Final = {"schema": {"type": "string", "format": "binary"}}
_FILE: Final[dict[str, Any]] = dict.fromkeys(["application/octet-stream", *MEDIA_TYPES.values()], _BYTES) | {
    "application/json": {"schema": {}, "example": {"dimensions": 256}}
}
DOWNLOAD: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The file.", "content": _FILE},
    206: {"description": "The range of it that was asked for.", "content": _FILE},
    416: {"description": "The range is none of this file's.", "model": ErrorBody},
}

WantedRange = Annotated[str | None, Header(alias="range", description="one range of bytes")]


async def list_files(service: Service, key: str) -> FileList:
    """List an artifact's files."""
    manifest = await service.in_file_thread(lambda: service.store.manifest(key))
    files = [
        File(id=path, num_bytes=entry.num_bytes, sha256=entry.sha256) for path, entry in sorted(manifest.files.items())
    ]
    return FileList(data=files, has_more=False)


async def send_file(service: Service, key: str, path: str, wanted_range: str | None) -> Response:
    """Send a file, or the range of it that was asked for.

    Several ranges at once are answered with the whole file, as HTTP allows: assembling them is work without bound.
    Raises NotFound for a file that the artifact does not have.
    """
    manifest = await service.in_file_thread(lambda: service.store.manifest(key))
    entry = manifest.files.get(path)
    if entry is None:
        raise NotFound("there is no such file", param="path")
    name = path.rpartition("/")[2]
    is_page = name.endswith(".html")
    headers = {
        "accept-ranges": "bytes",
        "etag": f'"{entry.sha256}"',
        "content-disposition": f'{"inline" if is_page else "attachment"}; filename="{name}"',
        "content-security-policy": PAGE_POLICY if is_page else "sandbox",
    }
    span = _span(wanted_range, entry.num_bytes)
    if span is None:
        headers["content-range"] = f"bytes */{entry.num_bytes}"
        message = f"the file has {entry.num_bytes} bytes"
        return render(416, message, "invalid_request_error", param="range", headers=headers)
    headers["content-length"] = str(span.num_bytes)
    if span.partial:
        headers["content-range"] = f"bytes {span.start}-{span.start + span.num_bytes - 1}/{entry.num_bytes}"
    stream = await service.in_file_thread(lambda: service.store.open(key, path))
    return StreamingResponse(
        _pieces(service, stream, span),
        status_code=206 if span.partial else 200,
        headers=headers,
        media_type=MEDIA_TYPES.get(name.rpartition(".")[2], "application/octet-stream"),
    )


@dataclass(frozen=True)
class _Span:
    start: int
    num_bytes: int
    partial: bool


def _span(wanted: str | None, size: int) -> _Span | None:
    match = RANGE.match(wanted or "")
    if match is None or match.groups() == ("", ""):
        return _Span(0, size, partial=False)
    first, last = match.groups()
    if not first:  # the last so many bytes
        num_bytes = min(int(last), size)
        return _Span(size - num_bytes, num_bytes, partial=True) if num_bytes else None
    start, end = int(first), min(int(last) if last else size - 1, size - 1)
    return _Span(start, end - start + 1, partial=True) if start <= end else None


async def _pieces(service: Service, stream: BinaryIO, span: _Span) -> AsyncGenerator[bytes]:
    try:
        if span.start:
            await service.in_file_thread(lambda: stream.seek(span.start))
        left = span.num_bytes
        while left:
            size = min(PIECE_BYTES, left)
            piece = await service.in_file_thread(lambda size=size: stream.read(size))
            if not piece:
                return
            left -= len(piece)
            yield piece
    finally:
        stream.close()
