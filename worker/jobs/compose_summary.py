"""What a compose job says of its answers as a whole: diagnostics over all sources, for programs and at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.contract.wire import Arrays, ComposeAnswer

MAX_WARNINGS: Final = 20


@final
class Summary:
    """Takes the diagnostics of one block of sources after the other."""

    def __init__(self, num_sources: int, num_targets: int) -> None:
        self._num_sources, self._num_targets = num_sources, num_targets
        self._answers: list[dict[str, Any]] = []
        self._best: list[np.ndarray] = []
        self._errors: list[np.ndarray] = []

    def add(self, answer: ComposeAnswer, found: Arrays) -> None:
        """Take a block's."""
        self._answers.append(answer.model_dump(mode="json"))
        self._best.append(found["log_ratio"][:, 0])
        self._errors.append(found["standard_error"][:, 0])

    @property
    def warnings(self) -> list[str]:
        """Return every warning once."""
        return list(dict.fromkeys(text for answer in self._answers for text in answer["warnings"]))[:MAX_WARNINGS]

    def figures(self) -> dict[str, float]:
        """Return the figures of the whole: medians over the sources, and the share of them whose values are trusted."""
        named = {
            "effective_sample_size": self._each("effective_sample_size"),
            "direct_marginal_spearman": self._each("direct_marginal_spearman"),
            "log_ratio_of_best": np.concatenate(self._best),
            "standard_error_of_best": np.concatenate(self._errors),
        }
        medians = {f"median_{name}": _median(values) for name, values in named.items()}
        trusted = float(np.mean([answer["value_trusted"] for answer in self._answers]))
        found = {**medians, "share_trusted": trusted}
        return {name: value for name, value in found.items() if value is not None}

    def described(self) -> dict[str, Any]:
        """Return all that is said in `summary.json`."""
        lists = {name for answer in self._answers for name, value in answer.items() if isinstance(value, list)}
        first = self._answers[0]
        constant = {name: value for name, value in first.items() if name not in lists}
        spread = {
            name: {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}
            for name in sorted(lists - {"warnings"})
            if len(values := self._each(name))
        }
        return {
            "num_sources": self._num_sources,
            "num_targets": self._num_targets,
            **constant,
            "value_trusted": all(answer["value_trusted"] for answer in self._answers),
            **spread,
            "warnings": self.warnings,
            "figures": self.figures(),
        }

    def _each(self, name: str) -> np.ndarray:
        values: Iterable[Any] = (value for answer in self._answers for value in answer.get(name) or [])
        return np.array([value for value in values if value is not None], np.float64)


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None
