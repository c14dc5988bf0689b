"""One line per event on standard error: key=value pairs on a terminal, a JSON object everywhere else.

A line says `at`, `level` and `event`, then the fields given as `extra={"fields": {...}}`. Wherever there is a job,
these are `job`, `attempt`, `epoch` and `request_id`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, final

_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/@+")
_SPOKEN_AT_WARNING: Final = ("alembic", "httpx", "httpcore", "aiobotocore", "botocore")


@final
class Lines(logging.Formatter):
    """Formats a record as a line, with `always` in every one."""

    def __init__(self, *, as_json: bool, always: Mapping[str, object]) -> None:
        super().__init__()
        self._as_json = as_json
        self._always = dict(always)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._always,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps(fields, ensure_ascii=True, default=str)
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items() if value is not None)


def configure(always: Mapping[str, object] | None = None) -> None:
    """Send every log and warning of this process to standard error; a second call replaces the first."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(as_json=not sys.stderr.isatty(), always=always or {}))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in _SPOKEN_AT_WARNING:
        logging.getLogger(name).setLevel(logging.WARNING)


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(text, ensure_ascii=False)
