"""The four figures of the demo, from what the service answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Figure:
    """A share between 0 and 1, the bar that it should clear and what guessing would give."""

    key: str
    name: str
    meaning: str
    value: float
    bar: float
    chance: float


BARS: Final = {
    "image_accuracy": 0.93,
    "audio_accuracy": 0.90,
    "audio_to_image_precision_at_10": 0.85,
    "image_to_audio_recall_at_1": 0.90,
}


def accuracy(predictions: Sequence[str], truth: Sequence[str]) -> float:
    """Return the share of right predictions."""
    return sum(said == true for said, true in zip(predictions, truth, strict=True)) / len(truth)


def precision(answers: Sequence[dict[str, Any]], source: Sequence[str], target: Sequence[str], k: int) -> float:
    """Return the mean share of right labels among the first k matches of each source."""
    shares = [
        sum(target[match["index"]] == label for match in answer["matches"][:k]) / min(k, len(target))
        for answer, label in zip(answers, source, strict=True)
    ]
    return sum(shares) / len(shares)


def chance(source: Sequence[str], target: Sequence[str]) -> float:
    """Return the precision of random matches."""
    return sum(list(target).count(label) / len(target) for label in source) / len(source)


def figures(
    *,
    image_labels: Sequence[str],
    image_predictions: Sequence[str],
    audio_labels: Sequence[str],
    audio_predictions: Sequence[str],
    to_images: Sequence[dict[str, Any]],
    to_sounds: Sequence[dict[str, Any]],
) -> list[Figure]:
    """Return the four figures: naming what is seen, naming what is heard, and both compositions."""
    guess = 1 / len(set(image_labels) | set(audio_labels))
    rows = [
        (
            "image_accuracy",
            "image, zero-shot",
            "held-out images named right",
            accuracy(image_predictions, image_labels),
            guess,
        ),
        (
            "audio_accuracy",
            "sound, zero-shot",
            "held-out sounds named right",
            accuracy(audio_predictions, audio_labels),
            guess,
        ),
        (
            "audio_to_image_precision_at_10",
            "sound to images, composed",
            "right ones among the first ten images",
            precision(to_images, audio_labels, image_labels, 10),
            chance(audio_labels, image_labels),
        ),
        (
            "image_to_audio_recall_at_1",
            "image to sounds, composed",
            "first sound is a right one",
            precision(to_sounds, image_labels, audio_labels, 1),
            chance(image_labels, audio_labels),
        ),
    ]
    return [Figure(key, name, meaning, value, BARS[key], low) for key, name, meaning, value, low in rows]
