"""The wire between the API and the inference process: a call or an answer as safetensors bytes.

The header of safetensors carries one JSON document under `call`; the tensors follow as raw little-endian memory. Numpy
only: the API never opens weights and never loads torch. bf16 does not exist here (numpy has no such type).
"""

from __future__ import annotations

import json
import struct
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load, save

from service.contract.diagnostics import PairDiagnostics
from service.contract.errors import (
    Conflict,
    Invalid,
    IsthmusError,
    Malformed,
    NotFound,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from service.contract.word import Word

MAX_HEADER_BYTES: Final = 16 << 20
Arrays = dict[str, np.ndarray]

Method = Literal["direct", "marginal", "analytic"]


class ModelRef(Word):
    """A model as the store knows it: where it lies, and what it must be."""

    artifact: str
    digest: str


class EmbedCall(Word):
    """Embed sequences of one modality with one model.

    Tensors: `values` (token) ids or (token, dim) vectors, all sequences end to end; `lengths` (sequence,) int32;
    `owners` (sequence,) int32, the item that each belongs to, ascending. Answer: `vectors` (item, dimensions) float32,
    the mean of an item's vectors; of unit vectors, normalised again, if the model's critic is the cosine.
    """

    op: Literal["embed"] = "embed"
    model: ModelRef
    modality: str


class SetRef(Word):
    """An embedding set as the store knows it."""

    artifact: str


class ComposeLeg(Word):
    """One leg: the pair (from, to) of a model."""

    model: ModelRef
    from_: Annotated[str, Field(alias="from")]
    to: str


class ComposeCall(Word):
    """Compose vectors that were embedded before, or with `source_items` a source that is embedded on the way.

    Tensors: `source` (source, d1) in legs[0].from, `target` (target, d2) in legs[-1].to, and, unless `bank`,
    for the bridge between legs j and j + 1 `bridge.{2j}` (bridge, d1) and `bridge.{2j+1}` (bridge, d2): the same items
    under each leg's model; `bridge_weights.{j}` (bridge,) may go with them. A tensor that `sets` names is not sent: it
    is mapped from an embedding set in the store, however large.
    Answer: `index` `score` `log_ratio` `standard_error` `bias` (source, k), `log_normaliser` (source,): log of the sum
    over all targets of prior * ratio, and the diagnostics in the document (`ComposeAnswer`). Without `log_prior` the
    prior is uniform, 1 / targets. If the target is a set that keeps its keys, `key.bytes` and `key.ends` have those of
    all matches, row after row (`service.contract.vectors.Strings`). Where no ratio is defined, `log_ratio`,
    `standard_error`, `bias` and `log_normaliser` are NaN.
    """

    op: Literal["compose"] = "compose"
    legs: list[ComposeLeg]
    method: Annotated[
        Literal["direct", "marginal", "analytic", "auto"],
        Field(description="auto: marginal, or direct if the sum turns out weak and vectors can be compared"),
    ]
    bank: Annotated[bool, Field(description="take bridges that are not among the tensors from the models' banks")]
    log_prior: Annotated[bool, Field(description="`log_prior` (target,) is among the tensors")] = False
    sets: dict[str, SetRef] = Field(default_factory=dict[str, SetRef], description="tensor -> where it lies")
    source_items: Annotated[
        bool, Field(description="in place of `source`: `source.{values, lengths, owners}`, those of an EmbedCall")
    ] = False
    top_k: int


class ComposeAnswer(Word):
    """The document beside a composition's tensors; the lists have one entry for each source."""

    method: Method
    reason: Annotated[str | None, Field(description="why, where the call left the method open")]
    bridge_size: Annotated[int | None, Field(description="the smallest, of several")]
    effective_sample_size: Annotated[
        list[float] | None, Field(description="median over the targets (Kish), of the worst bridge")
    ]
    bridge_resultant: Annotated[float | None, Field(description="the largest, of several")]
    direct_marginal_spearman: Annotated[list[float | None] | None, Field(description="null: not both are defined")]
    normalised: bool
    value_trusted: bool
    warnings: list[str]


class ExamineCall(Word):
    """Look at a pair of modalities that was never trained, over every bridge of which the model keeps both banks.

    No tensors either way; the document is an `ExamineAnswer`.
    """

    op: Literal["examine"] = "examine"
    model: ModelRef
    from_: Annotated[str, Field(alias="from")]
    to: str


class ExamineAnswer(Word):
    """What the banks tell, by the modality of the bridge."""

    through: dict[str, PairDiagnostics]


AnyCall = EmbedCall | ComposeCall | ExamineCall
Call = Annotated[AnyCall, Field(discriminator="op")]
call_adapter: TypeAdapter[AnyCall] = TypeAdapter(Call)


def pack(document: dict[str, Any], arrays: Arrays) -> bytes:
    """Write a document and its arrays as one block of safetensors bytes."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata={"call": json.dumps(document, separators=(",", ":"))})


def unpack(body: bytes) -> tuple[dict[str, Any], Arrays]:
    """Read what `pack` wrote.

    Raises Malformed if the bytes are anything else.
    """
    try:
        (header_bytes,) = struct.unpack_from("<Q", body)
        if header_bytes > MAX_HEADER_BYTES:
            raise Malformed("the header is too large")
        header = json.loads(body[8 : 8 + header_bytes])
        document = json.loads(header["__metadata__"]["call"])
        return document, load(body)
    except (struct.error, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise Malformed("these bytes are not a call") from error


ERRORS: Final[dict[str, tuple[type[IsthmusError], int]]] = {
    cls.__name__: (cls, status)
    for cls, status in (
        (Malformed, 400),
        (Unauthenticated, 401),
        (NotFound, 404),
        (Conflict, 409),
        (TooLarge, 413),
        (Invalid, 422),
        (TooMany, 429),
        (Unavailable, 503),
    )
}
"""What the inference process can answer, by name, and the status that goes with it."""


def pack_error(error: IsthmusError) -> tuple[int, bytes]:
    """Write an error as a status and a JSON envelope; `item` is the item of the call that is to blame."""
    name = type(error).__name__
    detail = {"message": error.message, "type": name, "param": error.param, "code": error.code, "item": error.item}
    return ERRORS[name][1] if name in ERRORS else 500, json.dumps({"error": detail}).encode()


def unpack_error(status: int, body: bytes) -> IsthmusError:
    """Read what `pack_error` wrote; an IsthmusError of no special kind if the bytes are anything else."""
    try:
        detail = json.loads(body)["error"]
        cls, _ = ERRORS[detail["type"]]
        message, param, code, item = (detail[name] for name in ("message", "param", "code", "item"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return IsthmusError(f"the inference process answered {status}", code="inference_failed")
    if cls is Unavailable:
        return Unavailable(message, code=code)
    return cls(message, param=param, code=code, item=item)
