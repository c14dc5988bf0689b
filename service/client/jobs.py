"""`isthmus jobs`: the queue in a terminal, by the public API alone.

The exit code says what became of it: 0 done or succeeded, 1 the job failed or was cancelled, 2 it could not be done or
found out, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
from datetime import UTC, datetime
from typing import Any, Final

import httpx

from service.client.api import Api, ApiError
from service.client.progress import progress
from service.client.text import (
    COLUMNS,
    as_json,
    description,
    ending,
    event_line,
    left,
    metrics_note,
    plain,
    row_of,
    table,
)

TIMEOUT_S: Final = 30.0
PAGE: Final = 100  # the largest that the API gives
LATEST: Final = "latest"
FINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@:-]{0,127}")


def run(options: argparse.Namespace, url: str, key: str | None) -> int:
    """Do what `isthmus jobs` was asked to and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may know fewer characters than a name has
    try:
        with Api(url, key=key, timeout_s=TIMEOUT_S) as api:
            code = _run(options, api)
            sys.stdout.flush()
            return code
    except ApiError as error:
        more = "; the environment variable ISTHMUS_API_KEY takes a key" if error.status == 401 else ""
        return _refuse(f"{error.reason}{more}")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        return _refuse(f"{url!r} is not an http:// or https:// URL: {error}")
    except httpx.RequestError as error:
        return _refuse(f"{url} does not answer ({error or type(error).__name__}); --url names another service")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(options: argparse.Namespace, api: Api) -> int:
    match options.action:
        case "list":
            return _list(options, api)
        case "show":
            job = _find(api, options.id)
            print(as_json(job) if options.json else "\n".join(description(job, datetime.now(UTC))))
            return 0
        case "follow":
            return _follow(api, _find(api, options.id), patience_s=options.patience)
        case "cancel":
            return _cancel(options, api)
        case _:
            return _retry(options, api)


def _refuse(reason: str) -> int:
    print(f"isthmus: {plain(reason)}", file=sys.stderr)
    return 2


def _list(options: argparse.Namespace, api: Api) -> int:
    jobs: list[dict[str, Any]] = []
    wanted = {"status": options.status, "kind": options.kind}
    params = {name: value for name, value in wanted.items() if value is not None}
    more = True
    while more and len(jobs) < options.limit:
        params["limit"] = str(min(PAGE, options.limit - len(jobs)))
        page = _check(api.get("/v1/jobs", params), "list")
        jobs += page["data"]
        more = bool(page["has_more"] and page["data"])
        params["after"] = jobs[-1]["id"] if jobs else ""
    if options.json:
        print(as_json({"object": "list", "data": jobs, "has_more": more}))
        return 0
    now = datetime.now(UTC)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(table([COLUMNS, *(row_of(job, now) for job in jobs)], width=width)))
    if more:
        print(f"there are more than these {len(jobs):,}; --limit says how many to show", file=sys.stderr)
    return 0


def _follow(api: Api, job: dict[str, Any], *, patience_s: float, after: str = "") -> int:
    """Show what happens to a job until it ends: 0 if it succeeded."""
    job_id = str(job["id"])
    note = ""
    try:
        print(f"following {job_id}, {plain(job['kind'])} {plain(job['name'] or '')}".rstrip(), flush=True)
        with progress(plain(job["name"] or job["kind"], longest=32)) as advance:
            for event in api.events(job_id, after=after, patience_s=patience_s):
                match event.kind:
                    case "event":
                        print(event_line(event.data), flush=True)
                    case "metric":
                        note = metrics_note(event.data["values"])
                    case "progress":
                        about = ", ".join(filter(None, (plain(event.data["unit"]), left(event.data), note)))
                        advance(event.data["done"], event.data["total"] or 0, about)
                    case "lost":
                        print(f"the service is away ({plain(event.data['reason'])}); waiting for it", file=sys.stderr)
                    case "found":
                        print("the service is back", file=sys.stderr)
                    case "done":
                        job = event.data
                    case _:
                        pass  # a change of status is an event of the history as well
    except KeyboardInterrupt:
        print(f"\nno longer following; {job_id} goes on, and `isthmus jobs cancel {job_id}` stops it", file=sys.stderr)
        return 130
    print(ending(job), flush=True)
    return 0 if job["status"] == "succeeded" else 1


def _cancel(options: argparse.Namespace, api: Api) -> int:
    """Cancel a job: 0 if it is cancelled, or will be and nobody waits for it."""
    job_id = _check_id(options.id)
    job = _check(api.post(f"/v1/jobs/{job_id}/cancel"), "job")
    if job["status"] in FINAL:
        print(ending(job))
        return 0
    try:
        print(f"{job_id} was asked to stop", flush=True)
        if not options.wait:
            return 0
        for event in api.events(job_id, patience_s=options.patience):
            if event.kind == "done":
                job = event.data
    except KeyboardInterrupt:
        print(f"\nno longer waiting; {job_id} has still been asked to stop", file=sys.stderr)
        return 130
    print(ending(job))
    return 0 if job["status"] == "cancelled" else 1


def _retry(options: argparse.Namespace, api: Api) -> int:
    job_id = _check_id(options.id)
    # What is followed begins where the former attempts ended.
    last = ""
    if options.follow:
        past = _check(api.get(f"/v1/jobs/{job_id}/events", {"limit": "1"}), "list")["data"]
        last = str(past[0]["id"]) if past else ""
    job = _check(api.post(f"/v1/jobs/{job_id}/retry"), "job")
    print(f"{job_id} is queued again", flush=True)
    if not options.follow:
        return 0
    return _follow(api, job, patience_s=options.patience, after=last)


def _find(api: Api, wanted: str) -> dict[str, Any]:
    """Get a job by its id, or the newest one as `latest`."""
    if wanted != LATEST:
        return _check(api.get(f"/v1/jobs/{_check_id(wanted)}"), "job")
    newest = _check(api.get("/v1/jobs", {"limit": "1"}), "list")["data"]
    if not newest:
        msg = "there is no job yet"
        raise ApiError(msg)
    return newest[0]


def _check_id(wanted: str) -> str:
    """Return the id of a job; what cannot be one never becomes part of a path."""
    if wanted == LATEST:
        msg = "`latest` is for show and follow; name the job that is meant"
        raise ApiError(msg)
    if ID.fullmatch(wanted) is None:
        msg = f"there is no job {wanted!r}"
        raise ApiError(msg)
    return wanted


def _check(document: dict[str, Any], kind: str) -> dict[str, Any]:
    if document.get("object") != kind:
        msg = "what answers there is not Isthmus; --url names another service"
        raise ApiError(msg)
    return document
