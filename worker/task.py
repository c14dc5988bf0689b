"""What the supervisor hands to a runner: one job, resolved, in one line of JSON."""

from __future__ import annotations

from pathlib import Path

from service.contract.jobs import Input, JobArgs
from service.contract.word import Word


class Task(Word):
    """A claimed job with everything that a process without a database needs."""

    job: str
    epoch: int
    attempt: int
    request_id: str | None = None
    args: JobArgs
    inputs: dict[str, Input]
    resume: list[str]
    store_url: str
    scratch: Path
    device: str
    threads: int
