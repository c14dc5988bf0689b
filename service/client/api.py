"""Isthmus over HTTP, as any program calls it: documents, and the events of a job through every outage."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast, final

import httpx

SILENT_S: Final = 60.0  # an open stream says something every 15 s
PATIENCE_S: Final = 600.0
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 5.0
PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})


class ApiError(RuntimeError):
    """The service answered, and not with what was asked for; `reason` is its own message, after the place it names."""

    def __init__(self, reason: str, *, status: int = 0, code: str | None = None, asked: str = "") -> None:
        self.reason = reason
        self.status = status
        self.code = code
        super().__init__(f"{asked} answered {status}: {reason}" if asked else reason)


@dataclass(frozen=True)
class Event:
    """One message of a job's stream.

    `event` (of its history), `state`, `progress`, `metric` and at last `done`, which carries the job, are the
    service's; `lost` (with a `reason`) and `found` are ours: the service is away, and there again.
    """

    kind: str
    id: str
    data: dict[str, Any]


@final
class Api:
    """A client of one service."""

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 120.0) -> None:
        if key and not (key.isascii() and key.isprintable()):
            msg = "the API key has characters that no key has"
            raise ApiError(msg)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, params: dict[str, str] | None = None) -> dict[str, Any]:
        """Get a document.

        Raises ApiError for any other answer, as do the other methods, and httpx.RequestError for none.
        """
        return _read(self._http.get(path, params=params))

    def post(self, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        """Post a document and return the answer."""
        return _read(self._http.post(path, json=document))

    def download(self, path: str) -> bytes:
        """Get a file."""
        response = self._http.get(path)
        if not response.is_success:
            raise _error(response)
        return response.content

    def upload(self, path: Path, name: str) -> dict[str, Any]:
        """Upload a tar as a data set and return it."""
        with path.open("rb") as file:
            files = {"file": (path.name, file, "application/x-tar")}
            return _read(self._http.post("/v1/datasets", data={"name": name}, files=files))

    def events(self, job: str, *, after: str = "", patience_s: float = PATIENCE_S) -> Generator[Event]:
        """Yield the events of a job as they happen, those after the one with the id `after`; `done` is the last.

        A stream that breaks is taken up where it broke. A service that stays away for longer than `patience_s` raises
        what it was last seen to do, httpx.RequestError or ApiError.
        """
        last, num_failures, began, pause_s = after, 0, 0.0, FIRST_PAUSE_S
        while True:
            try:
                for event in self._stream(job, last):
                    if num_failures > 1:
                        yield Event("found", last, {})
                    num_failures, pause_s = 0, FIRST_PAUSE_S
                    last = event.id or last
                    yield event
                    if event.kind == "done":
                        return
                # The process that sent it is stopping, or a proxy's patience has ended.
                trouble: Exception = ApiError("the stream of events ended before the job did")
            except httpx.TransportError as error:
                trouble = error
            except ApiError as error:
                if error.status not in PASSING:
                    raise
                trouble = error
            num_failures += 1
            if num_failures == 1:  # not worth a word unless the next attempt fails too
                began = time.monotonic()
            if num_failures == 2:
                yield Event("lost", last, {"reason": str(trouble) or type(trouble).__name__})
            if time.monotonic() - began >= patience_s:
                raise trouble
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _stream(self, job: str, after: str) -> Generator[Event]:
        headers = {"accept": "text/event-stream"} | ({"last-event-id": after} if after else {})
        with self._http.stream("GET", f"/v1/jobs/{job}/events", headers=headers, timeout=SILENT_S) as stream:
            if not stream.is_success:
                stream.read()
                raise _error(stream)
            if not stream.headers.get("content-type", "").startswith("text/event-stream"):
                raise _stranger(stream)
            for kind, number, text in _server_sent(_lines(stream.iter_bytes())):
                try:
                    data = json.loads(text)
                except ValueError:
                    raise _stranger(stream) from None
                yield Event(kind, number, data)


def _read(response: httpx.Response) -> dict[str, Any]:
    if not response.is_success:
        raise _error(response)
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise _stranger(response)
    return cast("dict[str, Any]", document)


def _error(response: httpx.Response) -> ApiError:
    asked = f"{response.request.method} {response.request.url.path}"
    try:
        said = response.json()["error"]
        where = f"{said['param']}: " if said["param"] else ""
        return ApiError(f"{where}{said['message']}", status=response.status_code, code=said["code"], asked=asked)
    except (ValueError, KeyError, TypeError):
        reason = response.text[:500] or response.reason_phrase
        return ApiError(reason, status=response.status_code, asked=asked)


def _stranger(response: httpx.Response) -> ApiError:
    return ApiError(f"{response.request.url} does not answer as Isthmus does", status=response.status_code)


def _lines(chunks: Iterable[bytes]) -> Generator[str]:
    # Not httpx's own lines: they also end at U+2028 and its like, which stand unescaped in JSON.
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")


def _server_sent(lines: Iterable[str]) -> Generator[tuple[str, str, str]]:
    """Yield (event, id, data) of a server-sent event stream."""
    kind, number, data = "message", "", list[str]()
    for line in lines:
        if not line:
            if data:
                yield kind, number, "\n".join(data)
            kind, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                kind = value
            case "id":
                number = value
            case "data":
                data.append(value)
            case _:
                pass  # a comment keeps the connection warm
