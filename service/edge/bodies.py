"""Reading JSON bodies: strictly, before a model sees them.

The standard library's parser takes NaN, infinity, lone surrogates, repeated keys and any encoding of Unicode. Each of
these has made a service of this kind answer 500, so none of them gets past this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast, final

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.contract.errors import Invalid, Malformed, UnsupportedMedia

MAX_KEYS: Final = 10_000
MAX_BRACKETS: Final = 2 << 20  # a vector for each token that a request may hold by far; brackets within text count too


def parse_json(body: bytes) -> Any:
    """Read a JSON document.

    Raises Malformed for bytes that are not JSON in UTF-8, Invalid for NUL characters in text.
    """
    # An empty array takes two bytes to send and twenty times as many to hold.
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise Malformed(f"the body holds more than {MAX_BRACKETS:,} arrays and objects")
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise Malformed("the body is not UTF-8") from None
    except RecursionError:
        raise Malformed("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # Python's own limit on the digits of an integer, and our two hooks
        message = str(error)
        raise Malformed(message if message.startswith("the body") else "the body holds a number too large") from None
    if b"\\u" in body:  # only an escape can bring these in: raw ones are refused by the decoders above
        _check_text(document, "")
    return document


def _no_constant(_name: str) -> Any:
    msg = "the body holds NaN or Infinity, which are not JSON"
    raise ValueError(msg)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:  # each could be an error of its own
        msg = f"the body holds an object of more than {MAX_KEYS:,} keys"
        raise ValueError(msg)
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "the body repeats a key within one object"
        raise ValueError(msg)
    return found


def _check_text(value: Any, path: str) -> None:
    match value:
        case str():
            if "\x00" in value:
                raise Invalid("text cannot hold NUL characters", param=path or None)
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Malformed("the body holds half of a surrogate pair", param=path or None) from None
        case list():
            for index, entry in enumerate(cast("list[Any]", value)):
                if isinstance(entry, str | list | dict):
                    _check_text(entry, f"{path}[{index}]")
        case dict():
            for key, entry in cast("dict[str, Any]", value).items():
                _check_text(key, path)
                if isinstance(entry, str | list | dict):
                    _check_text(entry, f"{path}.{key[:64]}" if path else key[:64])
        case _:
            pass


def check_headers(request: Request, *accepted: str) -> None:
    """Refuse a body of another media type, and every compressed one.

    Raises UnsupportedMedia. A request without a body passes: what is missing is the model's to say.
    """
    headers = request.headers
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("compressed bodies are not read: leave content-encoding out")
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in accepted:
        raise UnsupportedMedia(f"content-type must be {' or '.join(accepted)}")


class _StrictRequest(Request):
    async def json(self) -> Any:
        return self.scope["isthmus.json"]


async def read_strictly(request: Request) -> Request:
    """Read a request's JSON body by `parse_json` and return the request that a handler finds it in.

    Raises UnsupportedMedia, Malformed or Invalid.
    """
    check_headers(request, "application/json")
    strict = _StrictRequest(request.scope, request.receive)
    body = await strict.body()
    strict.scope["isthmus.json"] = parse_json(body) if body else None
    return strict


@final
class StrictRoute(APIRoute):
    """A route whose JSON body is read by `parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the framework's handler, which would turn our errors into its own 400."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_strictly(request: Request) -> Response:
            return await handle(await read_strictly(request))

        return handle_strictly
