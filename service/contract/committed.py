"""A SQLite connection that knows when it has committed: SQLAlchemy's own event comes before."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Hashable
from typing import Any, final


@final
class Committed(sqlite3.Connection):
    """Does what was asked for once a transaction has committed, and forgets it if that was rolled back."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.after_commit: dict[Hashable, Callable[[], None]] = {}

    def commit(self) -> None:
        """Commit, then do what is to be done, each once."""
        super().commit()
        while self.after_commit:
            self.after_commit.popitem()[1]()

    def rollback(self) -> None:
        """Roll back."""
        self.after_commit.clear()
        super().rollback()
