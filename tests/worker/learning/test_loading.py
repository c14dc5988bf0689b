from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import torch
from PIL import Image

from service.contract.errors import Permanent, Transient
from service.contract.recipe import Budget, Recipe
from worker import loader
from worker.learning import data, loading, reading
from worker.learning.data import Dataset, PairData
from worker.learning.model import build_tokenisers
from worker.learning.ragged import Ragged

ROOT = Path(__file__).resolve().parents[3]
MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def datasets(bench: Any) -> dict[str, Dataset]:
    context = bench.context("job_data")
    return {name: data.open_dataset(name, context) for name in ("ds_imu", "ds_codes")}


def open_pairs(recipe: Recipe, datasets: dict[str, Dataset], batch_size: int = 32) -> list[PairData]:
    files = data.train_tokenisers(recipe, datasets)
    return reading.open_pairs(recipe, datasets, build_tokenisers(recipe, files), batch_size)


def test_the_position_is_how_often_each_pair_was_drawn(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    pairs = open_pairs(recipe(), datasets)
    whole = list(islice(loading.batches(pairs, [0, 0]), 9))
    drawn = Counter(at for at, _, _ in whole[:5])
    rest = list(islice(loading.batches(pairs, [drawn[0], drawn[1]]), 4))
    for (at, first, second), (other_at, other_first, other_second) in zip(whole[5:], rest, strict=True):
        assert at == other_at
        assert torch.equal(first.values, other_first.values)
        assert torch.equal(second.values, other_second.values)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def wav(wave: np.ndarray) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, 8000, format="WAV")
    return out.getvalue()


MEDIA: dict[str, Any] = {
    "towers": {
        "sight": {
            "tokens": {"kind": "image", "size": 16, "patch": 8},
            "augment": {"kind": "image", "crop": 0.4, "flip": 0.5, "colour": 0.3},
        },
        "sound": {
            "tokens": {"kind": "audio", "sample_rate": 8000, "window_s": 0.2, "mels": 16, "windows": 3},
            "augment": {"kind": "audio", "shift_s": 0.1, "noise_db": 20.0, "time_masks": 1, "mel_masks": 1},
        },
        "text": {"tokens": {"kind": "text", "max_length": 16}, "augment": {"kind": "tokens", "drop": 0.2}},
    },
    "pairs": [
        {"dataset": "ds_media", "modalities": ["sight", "text"]},
        {"dataset": "ds_media", "modalities": ["sound", "sight"], "weight": 2.0},
    ],
    "budget": {"batch_size": 10},
    "seed": 3,
}


@pytest.fixture
def media(bench: Any) -> Dataset:
    """Thirty samples of a picture, a sound of 0.1 to 0.6 s, and a caption; all train."""
    rng = np.random.default_rng(1)
    rows = [
        (
            f"s{at}",
            {
                "sight": png(rng.integers(0, 256, (20 + at, 24, 3)).astype(np.uint8)),
                "sound": wav(rng.normal(size=800 + 130 * at).astype(np.float32) / 10),
                "text": f"number {at}".encode(),
            },
            "",
            False,
        )
        for at in range(30)
    ]
    bench.publish("ds_media", {"sight": "image", "sound": "audio", "text": "text"}, rows)
    return data.open_dataset("ds_media", bench.context("job_media"))


class Run:
    """The pairs of a recipe, and what loaders are told of them."""

    def __init__(self, media: Dataset, num_loaders: int = 0, **changes: Any) -> None:
        recipe = Recipe.model_validate(MEDIA | changes)
        datasets = {"ds_media": media}
        tokenisers = build_tokenisers(recipe, data.train_tokenisers(recipe, datasets))
        batch_size = (recipe.budget or Budget()).batch_size
        self.pairs = reading.open_pairs(recipe, datasets, tokenisers, batch_size)
        self.loaders = [loader.describe(recipe, datasets, tokenisers, num_loaders)] * num_loaders

    def batches(self, drawn: tuple[int, int] = (0, 0), **options: Any) -> Generator[tuple[int, Ragged, Ragged]]:
        return loading.batches(self.pairs, drawn, loaders=self.loaders, **options)


def children() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [one for one in found if one.status() != psutil.STATUS_ZOMBIE and "worker.loader" in one.cmdline()]


def same(first: Ragged, second: Ragged) -> bool:
    owners = first.owners is None if second.owners is None else torch.equal(second.owners, first.owners)  # pyright: ignore[reportArgumentType]
    return owners and torch.equal(first.values, second.values) and torch.equal(first.lengths, second.lengths)


@pytest.mark.parametrize("num_loaders", [1, 3])
def test_processes_prepare_what_a_thread_prepares_and_go_on_from_any_position(num_loaders: int, media: Dataset) -> None:
    with closing(Run(media).batches()) as batches:
        expected = list(islice(batches, 12))
    assert any(second.owners is not None or first.owners is not None for _, first, second in expected)
    with closing(Run(media, num_loaders).batches()) as batches:
        found = list(islice(batches, 7))
        assert len(children()) == num_loaders
    drawn = Counter(at for at, _, _ in found)
    with closing(Run(media, num_loaders).batches((drawn[0], drawn[1]))) as batches:
        found += list(islice(batches, 5))
    assert children() == []
    for (at, *sides), (other, *others) in zip(expected, found, strict=True):
        assert at == other
        assert all(same(one, two) for one, two in zip(sides, others, strict=True))


def test_an_item_is_altered_anew_in_every_epoch_and_read_as_it_is_otherwise(media: Dataset) -> None:
    run = Run(media)
    sight = run.pairs[0].sources[0]
    one = np.array([4])
    first, again, later = (sight.packed(one, epoch).values for epoch in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)
    plain = Run(media, towers={name: {"tokens": tower["tokens"]} for name, tower in MEDIA["towers"].items()})
    assert np.array_equal(sight(one).values, plain.pairs[0].sources[0](one).values)
    assert np.array_equal(plain.pairs[0].sources[0].packed(one, 1).values, plain.pairs[0].sources[0].packed(one).values)
    assert sight._kept == {}
    caption = run.pairs[0].sources[1]
    caption.packed(one, 0)
    assert list(caption._kept) == [4]  # only tokens are left out of it: those are read once
    assert len(caption.packed(one).values) == len("number 4") + 2


def test_more_loaders_than_rows_is_no_harm(media: Dataset) -> None:
    two: dict[str, Any] = {"budget": {"batch_size": 2}}
    with closing(Run(media, 3, **two).batches()) as batches, closing(Run(media, **two).batches()) as expected:
        assert same(next(batches)[1], next(expected)[1])


def test_a_loader_that_is_killed_fails_the_attempt_at_once(media: Dataset) -> None:
    with closing(Run(media, 2).batches()) as batches:
        next(batches)
        children()[0].kill()
        with pytest.raises(Transient, match="a loader process was killed by SIGKILL") as failure:
            list(islice(batches, 20))
        assert failure.value.code == "loader_died"
    assert children() == []


def test_a_sample_that_cannot_be_read_fails_the_job_as_it_would_in_a_thread(bench: Any) -> None:
    rows = [(f"s{at}", {"sight": b"no picture", "text": b"a"}, "", False) for at in range(12)]
    bench.publish("ds_bad", {"sight": "image", "text": "text"}, rows)
    bad = data.open_dataset("ds_bad", bench.context("job_bad"))
    recipe = Recipe.model_validate(
        {
            "towers": {name: MEDIA["towers"][name] for name in ("sight", "text")},
            "pairs": [{"dataset": "ds_bad", "modalities": ["sight", "text"]}],
            "budget": {"batch_size": 10},
        }
    )
    tokenisers = build_tokenisers(recipe, data.train_tokenisers(recipe, {"ds_bad": bad}))
    pairs = reading.open_pairs(recipe, {"ds_bad": bad}, tokenisers, 10)
    messages: list[str] = []
    for num_loaders in (0, 1):
        told = [loader.describe(recipe, {"ds_bad": bad}, tokenisers, num_loaders)] * num_loaders
        with closing(loading.batches(pairs, [0], loaders=told)) as batches, pytest.raises(Permanent) as failure:
            next(batches)
        messages.append(failure.value.message)
    assert messages[0] == messages[1]
    assert "of data set ds_bad, sight: an image is PNG, JPEG or WebP" in messages[0]


def test_whoever_waits_for_a_loader_that_hangs_can_be_asked_to_stop(media: Dataset) -> None:
    class Stopped(Exception):
        pass

    asked = False

    def check() -> None:
        if asked:
            raise Stopped

    with closing(Run(media, 1).batches(check=check)) as batches:
        next(batches)
        children()[0].suspend()
        asked = True
        with pytest.raises(Stopped):
            list(islice(batches, 20))
    assert children() == []


ORPHAN = """
import os, sys, time
from worker.learning.loading import Loader
print(Loader({}).pid, flush=True)
time.sleep(60)
"""


def test_a_loader_ends_with_the_process_that_started_it() -> None:
    script = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert script.stdout is not None
    started = psutil.Process(int(script.stdout.readline()))
    script.kill()
    script.wait()
    script.stdout.close()
    psutil.wait_procs([started], timeout=10)
    assert not started.is_running()


def test_processes_are_for_media_that_are_decoded_again_and_again(
    media: Dataset, recipe: MakeRecipe, datasets: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_only = open_pairs(recipe(), datasets)
    assert loading.num_loaders(tokens_only, 16) == 0
    changed = Run(media).pairs
    assert [loading.num_loaders(changed, cores) for cores in (1, 2, 4, 6, 64)] == [0, 0, 3, 5, 8]
    plain = Run(media, towers={name: {"tokens": tower["tokens"]} for name, tower in MEDIA["towers"].items()}).pairs
    assert loading.num_loaders(plain, 16) == 0
    monkeypatch.setattr(loading, "CACHE_BYTES", 30 * 4 * 192)
    assert loading.num_loaders(plain, 16) == 8
