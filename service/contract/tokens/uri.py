"""Base64 and `data:` URIs, read strictly: what is not exactly right is refused, never repaired."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from service.contract.errors import Invalid

HEADER: Final = re.compile(
    r"data:([a-z0-9][a-z0-9!#$&^_.+-]{0,63}/[a-z0-9][a-z0-9!#$&^_.+-]{0,63})((?:;[a-z0-9_-]{1,32}=[^;,\s]{0,64})*)(;base64)?,",
    re.IGNORECASE,
)
MAX_HEADER_CHARACTERS: Final = 512  # a comma further in belongs to somebody's prose


@dataclass(frozen=True, slots=True)
class DataUri:
    """A medium written into a string."""

    media_type: str
    data: bytes


def data_uri(string: str) -> DataUri | None:
    """Read a string that is, as a whole, `data:<type>/<subtype>[;name=value][;base64],...`; None for any other.

    The media type comes back in lower case. Raises Invalid if the string is such a URI and its content is damaged.
    """
    match = HEADER.match(string, 0, MAX_HEADER_CHARACTERS)
    if match is None:
        return None
    content = string[match.end() :]
    if match[3]:
        data = strict_base64(content)
    elif content.isascii() and not any(character.isspace() for character in content):
        data = unquote_to_bytes(content)
    else:
        raise Invalid("a data: URI without ;base64 is percent-encoded ASCII")
    return DataUri(match[1].lower(), data)


def strict_base64(string: str) -> bytes:
    """Decode base64 in the standard alphabet, padded, without whitespace.

    Raises Invalid for anything else, and for nothing at all.
    """
    try:
        data = base64.b64decode(string, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid("this is not base64 (standard alphabet, padded, no whitespace)", code="bad_base64") from error
    if not data:
        raise Invalid("there is no data in it", code="empty")
    return data
