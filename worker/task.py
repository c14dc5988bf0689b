"""What the supervisor hands to a runner: one job, resolved, in one line of JSON."""

from __future__ import annotations

from pathlib import Path

from service.contract.jobs import Input, JobArgs
from service.contract.word import Word


class Rank(Word):
    """Which of several processes that train one model together this is, and how it meets the others."""

    rank: int
    size: int
    store: Path
    threads: int


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
    import_folders: tuple[Path, ...] = ()
    """Where on this machine checkpoints to be imported may lie."""
    scratch: Path
    device: str
    threads: int
    rank: Rank | None = None
    """For a process that another runner started: a job begins with one."""
