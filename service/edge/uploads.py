"""Receiving an upload: multipart, one file, streamed to the store as it comes, never spooled to a temporary disk."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final, final

import anyio
import anyio.from_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.contract.errors import Invalid, Malformed, TooLarge, Unavailable, UnsupportedMedia
from service.deps import Service

MAX_FIELDS: Final = 32
MAX_FIELD_BYTES: Final = 64 << 10
BLOCK_BYTES: Final = 1 << 20
SUFFIXES: Final = (".tar", ".zip", ".parquet")


@dataclass(frozen=True)
class Upload:
    """What a multipart body held: its text fields, and where its file went."""

    fields: dict[str, str]
    key: str
    num_bytes: int
    sha256: str


class _Broken(Exception):
    """The body ended early; raised in the writing thread, so that it leaves nothing behind."""


@final
class _Parts:
    """Collects what the parser reports of one piece of the body."""

    def __init__(self) -> None:
        self.file_bytes = bytearray()
        self.suffix: str | None = None
        self.fields: dict[str, str] = {}
        self.file_ended = False
        self.ended = False
        self._num_parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._name = ""
        self._value: bytearray | None = None

    def on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise TooLarge(f"more than {MAX_FIELDS} parts")
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def on_header_end(self) -> None:
        self._headers[bytes(self._header[0]).lower()] = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is None:
            self._value = bytearray()
            return
        if self._name != "file" or self.suffix is not None:
            raise Invalid("one file, in the part `file`", param="file")
        # Nothing of the caller's file name is kept but the suffix, and that only if it is one that we know.
        lowered = filename.decode("utf-8", "replace").lower()
        suffix = next((known for known in SUFFIXES if lowered.endswith(known)), None)
        if suffix is None:
            raise UnsupportedMedia(f"a data set is a file named {', '.join(SUFFIXES)}", param="file")
        self.suffix, self._value = suffix, None

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self.file_bytes += data[start:end]
        elif len(self._value) + end - start > MAX_FIELD_BYTES:
            raise TooLarge(f"a field of more than {MAX_FIELD_BYTES} bytes; a file needs a filename")
        else:
            self._value += data[start:end]

    def on_part_end(self) -> None:
        if self._value is None:
            self.file_ended = True
            return
        if self._name in self.fields:
            raise Invalid("the field is given twice", param=self._name[:64])
        try:
            self.fields[self._name] = self._value.decode("utf-8")
        except UnicodeDecodeError:
            raise Malformed("a field is not UTF-8") from None

    def on_end(self) -> None:
        self.ended = True


@final
class _Writer:
    """Writes blocks to the store from a thread, which starts with the first one."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._blocks_in, self._blocks_out = anyio.create_memory_object_stream[bytes](2)
        self._task: asyncio.Task[tuple[str, int, str]] | None = None
        self._complete = False

    async def write(self, suffix: str, block: bytes) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(suffix))
        try:
            await self._blocks_in.send(block)
        except anyio.BrokenResourceError:  # the store failed: its own error says why
            await self.finish()

    async def finish(self) -> tuple[str, int, str]:
        """Return the key, the bytes and the SHA-256 of what was written."""
        self._complete = True
        self._blocks_in.close()
        assert self._task is not None
        try:
            return await self._task
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise Unavailable("no room is left for uploads", retry_after_s=60, code="store_full") from error
            raise

    async def abort(self) -> None:
        """Leave nothing behind, unless all of it was written."""
        self._blocks_in.close()
        if self._task is not None and not self._complete:
            await asyncio.wait([self._task])
            self._task.exception()  # seen: the body's own error is the one to tell
        self._blocks_out.close()

    async def _run(self, suffix: str) -> tuple[str, int, str]:
        with self._blocks_out:
            return await self._service.in_file_thread(
                lambda: self._service.store.write_upload(f"data{suffix}", self._blocks())
            )

    def _blocks(self) -> Generator[bytes]:
        while True:
            try:
                yield anyio.from_thread.run(self._blocks_out.receive)
            except anyio.EndOfStream:
                break
        if not self._complete:
            raise _Broken


async def receive(request: Request, service: Service) -> Upload:
    """Read a multipart body; its file is in the store when this returns.

    Raises Malformed for what is not multipart, TooLarge, Invalid without a file, UnsupportedMedia by the file's name.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    if not (boundary := options.get(b"boundary")):
        raise Malformed("the content-type of a multipart body names its boundary")
    parts = _Parts()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.on_part_begin,
                "on_header_field": parts.on_header_field,
                "on_header_value": parts.on_header_value,
                "on_header_end": parts.on_header_end,
                "on_headers_finished": parts.on_headers_finished,
                "on_part_data": parts.on_part_data,
                "on_part_end": parts.on_part_end,
                "on_end": parts.on_end,
            },
        )
    except FormParserError:
        raise Malformed("the boundary is not one") from None
    writer = _Writer(service)
    try:
        async for piece in request.stream():
            _parse(parser, piece)
            if parts.suffix is not None and (parts.file_ended or len(parts.file_bytes) >= BLOCK_BYTES):
                await writer.write(parts.suffix, bytes(parts.file_bytes))
                parts.file_bytes.clear()
        if not parts.ended:
            raise Malformed("the multipart body ends early")
        if not parts.file_ended:
            raise Invalid("there is no file", param="file")
        key, num_bytes, sha256 = await writer.finish()
    finally:
        await writer.abort()
    return Upload(parts.fields, key, num_bytes, sha256)


def _parse(parser: MultipartParser, piece: bytes) -> None:
    try:
        parser.write(piece)
    except FormParserError:
        raise Malformed("the body is not multipart") from None
