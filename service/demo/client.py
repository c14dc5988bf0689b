"""What the demo asks of a model: what any program would do with httpx and the documents of `/docs`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from service.client.api import Api
from service.demo.specimens import MEDIA_TYPES, Medium, Specimen

CHUNK: Final = 64  # items in one request; nothing but the size of its body depends on it


class DemoError(RuntimeError):
    """The data are not usable, or the service did not do what the demo needs."""


class Client:
    """What the demo asks of Isthmus over HTTP."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def embed(self, model: str, medium: Medium, specimens: Sequence[Specimen]) -> NDArray[np.float32]:
        """Embed specimens; shape (specimen, dim), unit rows."""
        rows: list[NDArray[np.float32]] = []
        for chunk in _chunks(specimens):
            body = {"model": model, "input": [item(medium, each) for each in chunk], "encoding_format": "base64"}
            answer = self._api.post("/v1/embeddings", body)
            rows += [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in answer["data"]]
        return np.stack(rows)

    def classify(
        self, model: str, medium: Medium, specimens: Sequence[Specimen], labels: dict[str, list[str]]
    ) -> list[str]:
        """Name the likeliest label of every specimen."""
        predictions: list[str] = []
        for chunk in _chunks(specimens):
            body = {"model": model, "input": [item(medium, each) for each in chunk], "labels": labels, "top_k": 1}
            predictions += [entry["prediction"] for entry in self._api.post("/v1/classify", body)["data"]]
        return predictions

    def compose(
        self, model: str, source: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]], top_k: int
    ) -> list[dict[str, Any]]:
        """Match every source item against all target items, through the model's bridge."""
        answers: list[dict[str, Any]] = []
        for at in range(0, len(source), CHUNK):
            body = {"model": model, "source": source[at : at + CHUNK], "target": target, "top_k": top_k}
            answers += self._api.post("/v1/compose", body)["data"]
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
