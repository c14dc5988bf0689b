"""Progress that suits where it goes: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import Final

QUIET_S: Final = 3.0

Advance = Callable[[float, float, str], None]
"""Called with what is done, the total and a note."""


@contextlib.contextmanager
def progress(title: str) -> Generator[Advance]:
    """Show the progress of one thing."""
    if not sys.stdout.isatty():
        yield _Lines(title)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn  # noqa: PLC0415

    with Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        transient=False,
    ) as bar:
        task = bar.add_task(title, total=None, note="")

        def advance(done: float, total: float, note: str) -> None:
            bar.update(task, completed=done, total=total or None, note=note)

        yield advance


class _Lines:
    def __init__(self, title: str) -> None:
        self._title = title
        self._next = 0.0

    def __call__(self, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        if now >= self._next or (total and done >= total):
            self._next = now + QUIET_S
            of = f"/{total:,.0f}" if total else ""
            print(f"  {self._title} {done:,.0f}{of} {note}".rstrip(), flush=True)
