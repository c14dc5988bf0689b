"""The recipes that the demo submits: three small transformers, sized by the specimens they will see."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
import soundfile
from PIL import Image

from service.demo.specimens import Collection, Specimen

STEPS: Final = 600  # half of them on each pair
STEPS_OF_OTHERS: Final = 1500  # for data that we do not know
BATCH: Final = 128
_TOWER: Final = {"width": 64, "depth": 2, "heads": 4, "dropout": 0.1}


def recipe(
    images: Collection, sounds: Collection, *, datasets: dict[str, str], steps: int, seed: int
) -> dict[str, Any]:
    """Return a recipe that joins image and text by one data set, audio and text by another; nothing joins the rest."""
    # The pair with many more samples has more to learn from, and gets more of the steps.
    fewest = min(len(images.train), len(sounds.train))
    weights = {each.medium: max(1, round((len(each.train) / fewest) ** 0.5)) for each in (images, sounds)}
    longest = max(len(specimen.caption.encode()) for specimen in (*images.train, *sounds.train))
    text = {"kind": "text", "method": "auto", "max_length": min(128, longest + 2), "vocab": 512}
    return {
        "towers": {
            "image": {"tokens": image_tokens(images.train), **_TOWER},
            "audio": {"tokens": audio_tokens(sounds.train), **_TOWER},
            "text": {"tokens": text, **_TOWER},
        },
        "pairs": [
            {"dataset": datasets["image"], "modalities": ["image", "text"], "weight": weights["image"]},
            {"dataset": datasets["audio"], "modalities": ["audio", "text"], "weight": weights["audio"]},
        ],
        "dimensions": 64,
        "optimiser": {"learning_rate": 4e-3, "warmup_steps": max(1, steps // 10)},
        "budget": {"steps": steps, "batch_size": BATCH, "log_every": 5},
        "bank": {"keep": "items", "size": 2048},
        "seed": seed,
    }


def image_tokens(specimens: tuple[Specimen, ...]) -> dict[str, Any]:
    """Cut into patches of four pixels, or eight a side, at the images' own size where that is small."""
    with Image.open(io.BytesIO(specimens[0].payload)) as first:
        side, channels = min(64, *first.size), 1 if first.mode in {"1", "L", "I;16"} else 3
    patch = max(4, round(side / 8))
    return {"kind": "image", "size": patch * max(1, round(side / patch)), "patch": patch, "channels": channels}


def audio_tokens(specimens: tuple[Specimen, ...]) -> dict[str, Any]:
    """Listen for as long as nearly all sounds last, at their own rate where that is low."""
    about = [soundfile.info(io.BytesIO(specimen.payload)) for specimen in specimens[:: max(1, len(specimens) // 200)]]
    sample_rate = min(16_000, *(each.samplerate for each in about))
    window_s = float(np.clip(np.quantile([each.duration for each in about], 0.95), 0.25, 4.0))
    return {
        "kind": "audio",
        "sample_rate": sample_rate,
        "window_s": round(window_s, 2),
        "mels": 40,
        "frame_ms": 25.0,
        "hop_ms": 10.0,
        "frames": 4,
    }
