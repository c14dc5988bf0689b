"""The demo's HTTP client: what any program would do with httpx and the documents of `/docs`."""

from __future__ import annotations

import base64
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from service.demo.specimens import MEDIA_TYPES, Medium, Specimen

CHUNK: Final = 64  # items in one request; nothing but the size of its body depends on it


class DemoError(RuntimeError):
    """The service did not do what the demo needs; the message is the service's own."""


class Client:
    """Isthmus over HTTP."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=120.0, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """Get a document."""
        return _read(self._http.get(path))

    def post(self, path: str, document: dict[str, Any]) -> Any:
        """Post a document and return the answer."""
        return _read(self._http.post(path, json=document))

    def upload(self, path: Path, name: str) -> dict[str, Any]:
        """Upload a tar as a data set and return it."""
        with path.open("rb") as file:
            files = {"file": (path.name, file, "application/x-tar")}
            return _read(self._http.post("/v1/datasets", data={"name": name}, files=files))

    def events(self, job: str) -> Generator[dict[str, Any]]:
        """Yield the events of a job as they happen, until it has ended; a broken stream is taken up where it broke."""
        last = ""
        while True:
            headers = {"accept": "text/event-stream"} | ({"last-event-id": last} if last else {})
            try:
                with self._http.stream("GET", f"/v1/jobs/{job}/events", headers=headers, timeout=60.0) as stream:
                    if not stream.is_success:
                        stream.read()
                        _read(stream)
                    for kind, number, data in _server_sent(stream):
                        last = number or last
                        yield {"event": kind, **json.loads(data)}
            except (httpx.ReadError, httpx.RemoteProtocolError, httpx.ReadTimeout):
                pass
            if self.get(f"/v1/jobs/{job}")["status"] in {"succeeded", "failed", "cancelled"}:
                return

    def embed(self, model: str, medium: Medium, specimens: Sequence[Specimen]) -> NDArray[np.float32]:
        """Embed specimens; shape (specimen, dim), unit rows."""
        rows: list[NDArray[np.float32]] = []
        for chunk in _chunks(specimens):
            body = {"model": model, "input": [item(medium, each) for each in chunk], "encoding_format": "base64"}
            answer = self.post("/v1/embeddings", body)
            rows += [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in answer["data"]]
        return np.stack(rows)

    def classify(
        self, model: str, medium: Medium, specimens: Sequence[Specimen], labels: dict[str, list[str]]
    ) -> list[str]:
        """Name the likeliest label of every specimen."""
        predictions: list[str] = []
        for chunk in _chunks(specimens):
            body = {"model": model, "input": [item(medium, each) for each in chunk], "labels": labels, "top_k": 1}
            predictions += [entry["prediction"] for entry in self.post("/v1/classify", body)["data"]]
        return predictions

    def compose(
        self, model: str, source: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]], top_k: int
    ) -> list[dict[str, Any]]:
        """Match every source item against all target items, through the model's bridge."""
        answers: list[dict[str, Any]] = []
        for at in range(0, len(source), CHUNK):
            body = {"model": model, "source": source[at : at + CHUNK], "target": target, "top_k": top_k}
            answers += self.post("/v1/compose", body)["data"]
        return answers


def item(medium: Medium, specimen: Specimen) -> dict[str, Any]:
    """Return a specimen as an item of a request: the encoded file as a data URI."""
    return {medium: data_uri(MEDIA_TYPES[medium], specimen.payload)}


def vectors(medium: Medium, z: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return vectors, shape (item, dim), as items of a request."""
    return [{"modality": medium, "embedding": row} for row in z.tolist()]


def data_uri(media_type: str, content: bytes) -> str:
    """Write bytes as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _chunks(specimens: Sequence[Specimen]) -> list[Sequence[Specimen]]:
    return [specimens[at : at + CHUNK] for at in range(0, len(specimens), CHUNK)]


def _read(response: httpx.Response) -> Any:
    if response.is_success:
        return response.json()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    msg = f"{response.request.method} {response.request.url.path} answered {response.status_code}: {message}"
    raise DemoError(msg)


def _server_sent(stream: httpx.Response) -> Generator[tuple[str, str, str]]:
    """Yield (event, id, data) of a server-sent event stream."""
    kind, number, data = "message", "", list[str]()
    for line in stream.iter_lines():
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
