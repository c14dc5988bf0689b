from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import soundfile
from PIL import Image

from service.contract.recipe import Recipe
from service.demo.recipes import recipe
from service.demo.specimens import Collection, Specimen


def collection(medium: str, payload: bytes) -> Collection:
    specimens = (Specimen("a", payload, "a seven", "seven"), Specimen("b", payload, "an eight, at length", "eight"))
    return Collection("image" if medium == "image" else "audio", "made here", specimens, specimens)


def png(side: int, mode: str = "L") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, format="PNG")
    return out.getvalue()


def wav(rate: int, seconds: float) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(round(rate * seconds), np.float32), rate, format="WAV")
    return out.getvalue()


def build(image: bytes, sound: bytes) -> Recipe:
    document = recipe(
        collection("image", image),
        collection("audio", sound),
        datasets={"image": "ds_a", "audio": "ds_b"},
        steps=10,
        seed=1,
    )
    return Recipe.model_validate(document)


def test_the_recipe_is_one_and_never_pairs_images_with_sounds() -> None:
    built = build(png(8), wav(16_000, 1.0))
    assert [set(pair.modalities) for pair in built.pairs] == [{"image", "text"}, {"audio", "text"}]
    assert built.towers["image"].tokens.model_dump(include={"size", "patch", "channels"}) == {
        "size": 8,
        "patch": 4,
        "channels": 1,
    }
    assert built.towers["audio"].tokens.model_dump(include={"sample_rate", "window_s"}) == {
        "sample_rate": 16_000,
        "window_s": 1.0,
    }


def test_the_pair_with_many_more_samples_gets_more_of_the_steps() -> None:
    few, many = collection("image", png(8)), collection("audio", wav(8000, 0.5))
    many = replace(many, train=many.train * 4)
    built = Recipe.model_validate(recipe(few, many, datasets={"image": "ds_a", "audio": "ds_b"}, steps=10, seed=0))
    assert [pair.weight for pair in built.pairs] == [1, 2]


def test_the_recipe_fits_the_size_of_other_media() -> None:
    built = build(png(28, "RGB"), wav(8000, 0.5))
    assert built.towers["image"].tokens.model_dump(include={"size", "patch", "channels"}) == {
        "size": 28,
        "patch": 4,
        "channels": 3,
    }
    assert built.towers["audio"].tokens.model_dump(include={"sample_rate", "window_s"}) == {
        "sample_rate": 8000,
        "window_s": 0.5,
    }
