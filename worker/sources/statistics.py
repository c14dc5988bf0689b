"""Statistics of a data set, gathered in one pass and in little memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.contract.modality import Medium
    from worker.sources.validate import Checked

MAX_DISTINCT: Final = 10_000_000


@dataclass(slots=True)
class _Figure:
    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.least = min(self.least, value)
        self.most = max(self.most, value)


@final
class Statistics:
    """Figures per modality."""

    def __init__(self, media: Mapping[str, Medium]) -> None:
        self._figures: dict[str, dict[str, _Figure]] = {name: {} for name in media}
        self._num_bytes = dict.fromkeys(media, 0)
        self._texts: dict[str, set[bytes]] = {name: set() for name, medium in media.items() if medium == "text"}

    def add(self, sample: Mapping[str, Checked]) -> None:
        """Count a sample's values."""
        for name, checked in sample.items():
            self._num_bytes[name] += len(checked.payload)
            figures = self._figures[name]
            for figure, value in checked.figures.items():
                figures.setdefault(figure, _Figure()).add(value)
            if (texts := self._texts.get(name)) is not None and len(texts) < MAX_DISTINCT:
                texts.add(hashlib.blake2b(checked.payload, digest_size=12).digest())

    def dimension(self, name: str) -> int | None:
        """Return the dimension of a continuous modality, once a sample has one."""
        figure = self._figures[name].get("dim")
        return int(figure.most) if figure else None

    def summary(self) -> dict[str, dict[str, float]]:
        """Return modality -> figure -> value; the unit is in the figure's name."""
        return {name: self._summary(name) for name in sorted(self._figures)}

    def _summary(self, name: str) -> dict[str, float]:
        figures = self._figures[name]
        found: dict[str, float] = {
            "count": max((figure.count for figure in figures.values()), default=0),
            "bytes": self._num_bytes[name],
        }
        for what, figure in figures.items():
            if what == "dim":
                found["dim"] = figure.most
            elif what == "max_id":
                found["max_id"] = figure.most
            else:
                found |= {
                    f"{what}_mean": figure.total / figure.count,
                    f"{what}_min": figure.least,
                    f"{what}_max": figure.most,
                }
                if what in {"seconds", "tokens"}:
                    found[f"{what}_total"] = figure.total
        if name in self._texts:
            found["distinct"] = len(self._texts[name])
        return found
