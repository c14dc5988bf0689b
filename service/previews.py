"""Samples as people look at them: text, media as data: URIs, the first tokens of arrays."""

from __future__ import annotations

import base64
from typing import Final, cast

from service.contract.samples import Samples
from service.contract.tokens.decode import array
from service.resources import Sample

MAX_BYTES: Final = 256 << 10
MAX_TOKENS: Final = 64
_SIGNATURES: Final = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8", "image/jpeg"),
    (b"fLaC", "audio/flac"),
    (b"OggS", "audio/ogg"),
    (b"RF64", "audio/wav"),
    (b"ID3", "audio/mpeg"),
    (b"\xff", "audio/mpeg"),  # a frame without a tag before it
)


def preview(samples: Samples, index: int) -> Sample:
    """Show a sample; what is too large to look at is null."""
    return Sample(
        index=index,
        key=samples.key(index),
        label=samples.label(index) or None,
        split="holdout" if samples.split[index] else "train",
        items={
            modality: _shown(medium, samples.payload(modality, index))
            for modality, medium in samples.modalities.items()
        },
    )


def _shown(medium: str, payload: bytes) -> str | list[int] | list[list[float]] | None:
    if len(payload) > MAX_BYTES:
        return None
    match medium:
        case "text":
            return payload.decode()
        case "image" | "audio":
            return f"data:{_media_type(medium, payload)};base64,{base64.b64encode(payload).decode()}"
        case _:
            return cast("list[int] | list[list[float]]", array(payload)[:MAX_TOKENS].tolist())


def _media_type(medium: str, payload: bytes) -> str:
    if payload[:4] == b"RIFF":
        return "image/webp" if medium == "image" else "audio/wav"
    return next((found for signature, found in _SIGNATURES if payload.startswith(signature)), f"{medium}/octet-stream")
