"""Where data sets and checkpoints may lie: what a caller must not make the worker read."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from service.contract.errors import Forbidden, Invalid
from service.contract.imports import HUB_ID, OUTSIDE, is_allowed, local_path
from service.deps import Service
from service.keys import Caller

REMOTE: Final = frozenset({"s3", "gs", "az"})
PATTERN: Final = re.compile(r"[*?\[{]")


def check_source(uri: str, service: Service, caller: Caller, *, param: str, what: str) -> None:
    """Refuse our own store, other protocols, and local files but for administrators.

    Raises Invalid or Forbidden; `what` is named in the message.
    """
    own = service.settings.resolved_store_url()
    for part in map(str.strip, uri.split("::")):
        scheme, separator, rest = part.partition("://")
        if separator and scheme in REMOTE:
            if not is_remote_place(part, own=own):
                raise Invalid("this place cannot be read", param=param)
        elif part.startswith("store:") or (separator and scheme not in {"file", "local"}):
            raise Invalid(f"{what} lies at s3://, gs://, az://, or at a path (file://)", param=param)
        elif "admin" not in caller.scopes:
            message = "reading files of the worker's own machine needs a key with the scope 'admin'"
            raise Forbidden(message, param=param)
        elif "\x00" in rest:
            raise Invalid("text cannot hold NUL characters", param=param)


def check_import(source: str, service: Service, caller: Caller) -> None:
    """Refuse a checkpoint that `check_source` refuses, and a local one outside of the folders set up for imports.

    Raises Invalid or Forbidden. The worker checks again, on its own disk.
    """
    if HUB_ID.fullmatch(source):
        return
    check_source(source, service, caller, param="source", what="a checkpoint")
    path = local_path(source)
    if path is not None and not is_allowed(path, service.settings.resolved_import_folders()):
        raise Invalid(OUTSIDE, param="source", code="forbidden_path")


def is_remote_place(uri: str, *, own: str) -> bool:
    """Tell whether a URI names a bucket, without credentials, and nothing above or in our own store."""
    try:
        parsed = urlsplit(uri)
    except ValueError:  # such as an unclosed bracket
        return False
    if parsed.username or parsed.password or not parsed.netloc:
        return False
    store = own.rstrip("/") + "/"
    literal, *pattern = PATTERN.split(uri, maxsplit=1)  # a pattern may stand for anything after what comes before it
    place = literal if pattern else literal.rstrip("/") + "/"
    return not (place.startswith(store) or store.startswith(place))
