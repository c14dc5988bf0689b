"""Progress that suits where it goes: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator
from typing import Final

QUIET_S: Final = 3.0

Advance = Callable[[float, float, str], None]
"""Called with what is done, the total and a note."""


@contextlib.contextmanager
def progress(title: str) -> Generator[Advance]:
    """Show the progress of one thing; what is printed meanwhile stands above the bar."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in {None, "", "dumb", "unknown"}:
        yield _Lines(title)
        return
    try:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn  # noqa: PLC0415
    except ModuleNotFoundError:  # an API alone does not need it
        yield _Lines(title)
        return

    with Progress(
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TextColumn("{task.fields[count]} {task.fields[note]}", markup=False),
        transient=False,
        redirect_stderr=sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(title, total=None, count="", note="")

        def advance(done: float, total: float, note: str) -> None:
            bar.update(task, completed=done, total=total or None, count=_count(done, total), note=note)

        yield advance


class _Lines:
    def __init__(self, title: str) -> None:
        self._title = title
        self._next = 0.0
        self._last = ""

    def __call__(self, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        line = f"  {self._title} {_count(done, total)} {note}".rstrip()
        if line != self._last and (now >= self._next or (total and done >= total)):
            self._next, self._last = now + QUIET_S, line
            print(line, flush=True)


def _count(done: float, total: float) -> str:
    return f"{done:,.0f}/{total:,.0f}" if total else f"{done:,.0f}"
