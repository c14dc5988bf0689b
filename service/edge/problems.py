"""How errors look from outside: one envelope, one table of statuses, one translation of the framework's own errors.

Nothing of the input is echoed: a message names places, types and limits, and no body exceeds 4 KB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final, TypeVar, cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from service.contract.errors import (
    Conflict,
    Forbidden,
    Invalid,
    IsthmusError,
    Malformed,
    NotFound,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
    UnsupportedMedia,
)
from service.contract.word import Word

T = TypeVar("T")
MAX_MESSAGE: Final = 1000
MAX_PARAM: Final = 200
MAX_PART: Final = 64
MAX_ERRORS: Final = 20
PARTS: Final = re.compile(r"[.\[]")

STATUSES: Final[dict[type[IsthmusError], tuple[int, str]]] = {
    Malformed: (400, "invalid_request_error"),
    Unauthenticated: (401, "authentication_error"),
    Forbidden: (403, "permission_error"),
    NotFound: (404, "not_found_error"),
    Conflict: (409, "invalid_request_error"),
    TooLarge: (413, "invalid_request_error"),
    UnsupportedMedia: (415, "invalid_request_error"),
    Invalid: (422, "invalid_request_error"),
    TooMany: (429, "rate_limit_error"),
    Unavailable: (503, "server_error"),
}
GONE: Final = 499  # for our own counters: a caller who hung up is nobody's error, and hears nothing


class ErrorDetail(Word):
    """What went wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Word):
    """The envelope of every error (OpenAI's)."""

    error: ErrorDetail


def documented(*classes: type[IsthmusError]) -> dict[int | str, dict[str, Any]]:
    """Describe errors for OpenAPI, from the classes that are raised."""
    found: dict[int | str, dict[str, Any]] = {}
    for cls in classes:
        status, kind = STATUSES[cls]
        message = (cls.__doc__ or "").strip()
        example = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        content = {"application/json": {"example": example}}
        found[status] = {"model": ErrorBody, "description": message, "content": content}
    return found


EVERYWHERE: Final = documented(Malformed, Unauthenticated, Forbidden, TooLarge, Invalid, TooMany, Unavailable)


def status_and_type(error: IsthmusError) -> tuple[int, str]:
    """Return an error's status: of its class, or of the nearest class above it; 500 for what is no request's fault."""
    for cls in type(error).__mro__:
        if cls in STATUSES:
            return STATUSES[cls]
    return 500, "server_error"


def render(
    status: int,
    message: str,
    kind: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Write the envelope."""
    detail = {
        "message": _short(message, MAX_MESSAGE),
        "type": kind,
        "param": None if param is None else _short(param, MAX_PARAM),
        "code": None if code is None else _short(code, MAX_PART),
    }
    body = json.dumps({"error": detail}).encode()
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def render_error(error: IsthmusError) -> Response:
    """Write an error of the tree."""
    status, kind = status_and_type(error)
    headers: dict[str, str] = {}
    if isinstance(error, TooMany | Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Conflict):
        # Clients of the OpenAI family retry 409 on their own; waiting helps only while a twin request is in progress.
        in_progress = error.code == "idempotency_in_progress"
        headers.update({"retry-after": "1"} if in_progress else {"x-should-retry": "false"})
    message = error.message if status != 500 else "the server met an error in its own data"
    return render(status, message, kind, param=error.param, code=error.code, headers=headers)


async def on_isthmus_error(_request: Request, error: Exception) -> Response:
    """Answer an error of the tree."""
    return render_error(cast("IsthmusError", error))


async def on_http_exception(_request: Request, error: Exception) -> Response:
    """Answer what the framework refuses on its own: no such path, wrong method, too large a body."""
    refused = cast("HTTPException", error)
    status = refused.status_code
    kind = dict(STATUSES.values()).get(status, "server_error" if status >= 500 else "invalid_request_error")
    messages = {
        404: "there is no such path",
        405: "this path does not take that method",
        408: "the rest of the body did not come",
    }
    message = messages.get(status, HTTPStatus(status).phrase)
    return render(status, message, kind, headers=dict(refused.headers or {}))


async def on_validation_error(_request: Request, error: Exception) -> Response:
    """Answer what does not validate: 400 for what cannot be read as JSON numbers and text, 422 for the rest."""
    refused = cast("RequestValidationError", error)
    return render_error(explain(refused.errors(), refused.body))


def validate(adapter: TypeAdapter[T], document: Any) -> T:
    """Validate a document that a handler read itself.

    Raises Invalid or Malformed like the framework's own validation.
    """
    try:
        return adapter.validate_python(document)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        located = [{**each, "loc": ("body", *each["loc"])} for each in found]
        raise explain(located, document) from None


def explain(errors: Sequence[Any], body: Any) -> IsthmusError:
    """Turn validation errors into one error that names the first place and what was expected there."""
    # Of a union every member complains; the one whose complaint lies deepest is the one that was meant.
    places = [_place_of(error, body) for error in errors[:MAX_ERRORS]]
    at = max(range(len(places)), key=lambda index: len(PARTS.findall(places[index] or "")))
    first, param, kind = errors[at], places[at], str(errors[at]["type"])
    if kind == "finite_number" and not isinstance(first.get("input"), str):
        return Malformed("NaN and infinity are no JSON numbers", param=param)
    others = len({each for each in places if each is not None and not (param or "").startswith(each)})
    more = f" (and {others} more)" if others else ""
    return Invalid(f"{_expected(first)}{more}", param=param)


def _expected(error: Any) -> str:
    context: dict[str, Any] = error.get("ctx") or {}
    match str(error["type"]):
        case "extra_forbidden":
            return "there is no such field"
        case "missing":
            return "this field is required"
        case "union_tag_invalid":  # pydantic's own words repeat the tag
            return f"{str(context.get('discriminator')).strip(chr(39))} must be one of {context.get('expected_tags')}"
        case "union_tag_not_found":
            return f"{str(context.get('discriminator')).strip(chr(39))} is required"
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case _:
            return str(error["msg"])


def _place_of(error: Any, body: Any) -> str | None:
    return place(tuple(error["loc"]), body, key_expected=error["type"] in {"missing", "extra_forbidden"})


def place(loc: tuple[str | int, ...], body: Any, *, key_expected: bool) -> str | None:
    """Write where an error lies as a path such as `input[1].image`, leaving out the names of union members.

    pydantic mixes both in `loc`; only what can be walked in the body is part of the path. With `key_expected` the
    last element is a key of an object although the object has none by that name, or should not.
    """
    if not loc:
        return None
    if loc[0] != "body":
        return ".".join(str(part)[:MAX_PART] for part in loc[1:]) or None
    inside = loc[1:]
    if inside and isinstance(body, dict) and cast("dict[object, object]", body).get("kind") == inside[0]:
        inside = inside[1:]  # the member that `kind` chose, which can have a field of its own name
    steps = _walk(inside, body, key_expected=key_expected)
    path = ""
    for step in steps if steps is not None else ():
        path += f"[{step}]" if isinstance(step, int) else f".{step[:MAX_PART]}" if path else step[:MAX_PART]
    return path or None


def _walk(loc: tuple[str | int, ...], value: Any, *, key_expected: bool) -> list[str | int] | None:
    if not loc:
        return None if key_expected else []
    step, rest = loc[0], loc[1:]
    if key_expected and not rest:
        return [step] if isinstance(value, dict) else None
    inside = (isinstance(value, dict) and step in value) or (
        isinstance(value, list | tuple) and isinstance(step, int) and step < len(cast("list[object]", value))
    )
    if inside and (below := _walk(rest, cast("Any", value)[step], key_expected=key_expected)) is not None:
        return [step, *below]
    return _walk(rest, value, key_expected=key_expected)


def _short(text: str, limit: int) -> str:
    plain = "".join(char if char.isprintable() else "?" for char in text[: limit + 1])
    return plain if len(text) <= limit else plain[: limit - 1] + "…"
