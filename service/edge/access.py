"""The access log: a line for every request that may change something, or that failed on our side.

Reads and inference are many and leave nothing behind: the metrics count them.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from starlette.requests import Request
from starlette.types import Scope

log = logging.getLogger(__name__)

_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_INFERENCE: Final = frozenset({"/v1/embeddings", "/v1/classify", "/v1/compose", "/v1/tokenize"})
_MAX_PATH: Final = 200


def note_job(request: Request, job_id: str, *, attempt: int, epoch: int) -> None:
    """Name the job that this request is about."""
    request.scope["isthmus.job"] = {"job": job_id, "attempt": attempt, "epoch": epoch}


def about(scope: Scope) -> dict[str, Any]:
    """Return the fields that every line about a request carries."""
    caller = scope.get("isthmus.caller")
    return {
        **scope.get("isthmus.job", {}),
        "request_id": scope["isthmus.request_id"],
        "method": scope["method"],
        "path": scope["path"][:_MAX_PATH],
        "tenant": None if caller is None else caller.tenant,
    }


def log_request(scope: Scope, status: int, seconds: float) -> None:
    """Log an answered request, if it is of those that are logged; being too busy is no failure."""
    is_silent = scope["method"] in _READS or scope["path"] in _INFERENCE
    if is_silent and (status < 500 or status == 503):
        return
    fields = {**about(scope), "status": status, "seconds": round(seconds, 4)}
    log.log(logging.INFO if status < 500 else logging.ERROR, "request", extra={"fields": fields})
