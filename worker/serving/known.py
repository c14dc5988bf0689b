"""What questions leave for later ones, of what never changes: paths over banks, and embedding sets at their ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from worker.serving.recent import Recent

if TYPE_CHECKING:
    from worker.composition.columns import Columns
    from worker.serving.ways import Health

COLUMN_BYTES: Final = 256 << 20
"""Of all sets whose scores with a bridge are kept: 1,000 targets with a bridge of 10,000 are 40 MB."""
LARGEST_COLUMNS: Final = 1 << 24  # values of one of them
HEALTH_BYTES: Final = 1 << 20
HEALTH_BYTES_EACH: Final = 1 << 10


@final
class Memory:
    """Everything that is kept."""

    def __init__(self) -> None:
        self.columns: Recent[Columns] = Recent(COLUMN_BYTES)
        self.health: Recent[Health] = Recent(HEALTH_BYTES)


@final
@dataclass(frozen=True)
class Known:
    """What is kept of one path, and of the set that its targets are."""

    memory: Memory
    path: str
    target: str | None
    """The set's artifact; None for targets that came with the call."""

    @property
    def health(self) -> Health | None:
        """How the banks lie, if that was looked at."""
        return self.memory.health.get(self.path)

    def keep_health(self, health: Health) -> None:
        """Keep how the banks lie."""
        self.memory.health.put(self.path, health, HEALTH_BYTES_EACH)

    @property
    def columns(self) -> Columns | None:
        """The scores of the set with the last bridge, if they are here."""
        return None if self.target is None else self.memory.columns.get((self.path, self.target))

    def takes(self, num_values: int) -> bool:
        """Tell whether there is a set, and as many scores of it would be kept."""
        return self.target is not None and num_values <= LARGEST_COLUMNS

    def keep_columns(self, columns: Columns) -> None:
        """Keep scores."""
        self.memory.columns.put((self.path, self.target), columns, columns.num_bytes)
