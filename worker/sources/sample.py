"""What every reader yields: a sample as its source holds it, not yet validated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

MAX_VALUE_BYTES: Final = 128 << 20
MAX_RATIO: Final = 200  # bytes out of an archive per byte of it, once the allowance is used up
RATIO_ALLOWANCE_BYTES: Final = 16 << 20

Kind = Literal["image", "audio", "text", "npy", "json", "list"]


@dataclass(frozen=True, slots=True)
class Value:
    """One modality of a sample: encoded bytes, text, an npy file, a JSON list, or a list that is already Python's."""

    kind: Kind
    data: object


@dataclass(frozen=True, slots=True)
class Raw:
    """A sample as it was found; `problem` says why it cannot be used, naming its row, line or member."""

    key: str
    values: dict[str, Value] = field(default_factory=dict[str, Value])
    label: str = ""
    fields: dict[str, str] = field(default_factory=dict[str, str])
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the reader is asked for: modality -> extension or column (None: recognise), and metadata fields."""

    mapping: dict[str, str] | None
    fields: frozenset[str]


def plain(value: object) -> str:
    """Write a label or a metadata value as text; None is empty."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer():
            return str(int(value))
        case bytes():
            return value.decode("utf-8", "surrogateescape").strip()
        case _:
            return str(value).strip()


def signature(data: bytes) -> Kind:
    """Tell by its first bytes what a value is; text is what nothing else claims."""
    match data[:4], data[8:12]:
        case (b"\x89PNG", _) | (b"RIFF", b"WEBP"):
            return "image"
        case (b"RIFF" | b"RF64", b"WAVE") | (b"fLaC" | b"OggS", _):
            return "audio"
        case _ if data.startswith(b"\xff\xd8\xff"):
            return "image"
        case _ if data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2):
            return "audio"
        case _:
            return "npy" if data.startswith(b"\x93NUMPY") else "text"
