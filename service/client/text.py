"""How jobs read in a terminal. Whatever others wrote, names and errors above all, comes through `plain` first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

MAX_DETAIL: Final = 300
COLUMNS: Final = ("ID", "KIND", "NAME", "STATUS", "PROGRESS", "AGE", "ATTEMPT", "ERROR")


def plain(text: object, *, longest: int | None = None) -> str:
    """Write something in one line without a character that could steer a terminal, cut to `longest` characters."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in str(text)).strip()
    return line if longest is None or len(line) <= longest else line[: max(0, longest - 1)] + "…"


def as_json(document: object) -> str:
    """Write JSON for programs and terminals alike: everything that is not printable ASCII is escaped."""
    return json.dumps(document, indent=2).replace("\x7f", "\\u007f")


def table(rows: Sequence[Sequence[str]], *, width: int | None) -> list[str]:
    """Align rows in columns, cut to the width of a terminal."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    return [plain(line, longest=width) for line in lines]


def row_of(job: Mapping[str, Any], now: datetime) -> list[str]:
    """Return the cells of a job under COLUMNS."""
    return [
        plain(job["id"]),
        plain(job["kind"]),
        plain(job["name"] or "-", longest=32),
        plain(job["status"]),
        how_far(job["progress"]) or "-",
        span((now - _moment(job["created_at"])).total_seconds()),
        attempt_of(job),
        first_line(job["error"]) if job["status"] == "failed" else "",
    ]


def attempt_of(job: Mapping[str, Any]) -> str:
    """Say which attempt it is of how many."""
    return f"{job['attempt']:d} of {job['max_attempts']:d}"


def how_far(progress: Mapping[str, Any] | None) -> str:
    """Say how far a job is, with the unit; empty while it said nothing."""
    if progress is None:
        return ""
    total = "" if progress["total"] is None else f"/{progress['total']:,d}"
    return f"{progress['done']:,d}{total} {plain(progress['unit'])}"


def left(progress: Mapping[str, Any]) -> str:
    """Say how long it will take; empty if that is not known."""
    return f"{span(progress['eta_s'])} left" if progress["eta_s"] else ""


def first_line(error: Mapping[str, Any] | None) -> str:
    """Return the type of an error and the first line of its message."""
    if error is None:
        return ""
    lines = str(error["message"]).strip().splitlines()
    return plain(f"{error['type']}: {lines[0] if lines else ''}", longest=MAX_DETAIL)


def span(seconds: float) -> str:
    """Write a time that has passed, or will, in the largest unit of which there are two."""
    seconds = max(0.0, seconds)  # a service's clock may be ahead of ours
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def ending(job: Mapping[str, Any]) -> str:
    """Say how a job ended."""
    began, ended = job["started_at"], job["finished_at"]
    after = f" after {span((_moment(ended) - _moment(began)).total_seconds())}" if began and ended else ""
    why = f": {first_line(job['error'])}" if job["error"] else ""
    return f"{plain(job['id'])} {plain(job['status'])}{after}{why}"


def event_line(event: Mapping[str, Any]) -> str:
    """Write an event of a job's history: the local time, what happened, and its details."""
    detail = "  ".join(_detail(name, value) for name, value in event["detail"].items())
    line = f"{_local(event['created_at']):%H:%M:%S}  {plain(event['type']):10}  {plain(detail, longest=MAX_DETAIL)}"
    return line.rstrip()


def metrics_note(values: Mapping[str, float]) -> str:
    """Write the losses among metrics, or whatever else comes first."""
    names = [name for name in values if name.startswith("loss")] or list(values)
    return ", ".join(f"{plain(name)} {values[name]:.4g}" for name in sorted(names)[:3])


def description(job: Mapping[str, Any], now: datetime) -> list[str]:
    """Write everything about a job, a line for each thing."""
    facts = {
        "id": plain(job["id"]),
        "kind": plain(job["kind"]),
        "name": plain(job["name"] or "-"),
        "status": plain(job["status"]),
        "progress": ", ".join(filter(None, (how_far(job["progress"]), left(job["progress"] or {"eta_s": None})))),
        "attempt": attempt_of(job),
        "priority": plain(job["priority"]),
        "created": _when(job["created_at"], now),
        "not before": _when(job["run_at"], now) if _moment(job["run_at"]) > now else "",
        "started": _when(job["started_at"], now),
        "finished": _when(job["finished_at"], now),
    }
    lines = [f"{name:11} {value}" for name, value in facts.items() if value]
    if job["error"]:
        text = f"{job['error']['type']}: {job['error']['message']}"
        lines += ["error", *(f"  {plain(line)}" for line in text.strip().splitlines())]
    for name in ("metadata", "args", "result"):
        if job[name]:
            lines += [name, *(f"  {plain(key):16} {_short(value)}" for key, value in job[name].items())]
    return lines


def _when(written: str | None, now: datetime) -> str:
    if written is None:
        return ""
    seconds = (now - _moment(written)).total_seconds()
    distance = f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"
    return f"{_local(written):%Y-%m-%d %H:%M:%S} ({distance})"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return plain(text, longest=160)


def _detail(name: str, value: Any) -> str:
    match value:
        case {"type": str(kind), "message": str(message)}:
            return f"{name} {first_line({'type': kind, 'message': message})}"
        case float():
            return f"{name} {value:.3g}"
        case _:
            return f"{name} {_short(value)}"


def _moment(written: str) -> datetime:
    return datetime.fromisoformat(written).astimezone(UTC)


def _local(written: str) -> datetime:
    return datetime.fromisoformat(written).astimezone()
