"""What all peers of `benchmarks/training.py` learn: a recipe, and a data set that the parent published for them.

Pictures fill their patches and captions their context, so that nobody gains by not computing padding.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from benchmarks.training_peers.turns import Turns
from service.contract.artifacts import open_store
from service.contract.jobs import Input
from service.contract.recipe import Budget, Optimiser, Recipe
from service.contract.samples import Samples, SampleWriter
from service.contract.towers import Tower
from worker.learning.data import train_tokenisers
from worker.learning.model import MultiTower, build_tokenisers, vocab_sizes
from worker.learning.reading import Dataset, TokenSource

NAME: Final = "ds_bench"
ARTIFACT: Final = "datasets/ds_bench/1"
LETTERS: Final = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ", np.uint8)


@final
@dataclass(frozen=True)
class Size:
    """How large the towers and their inputs are; `steps` a turn, which are one epoch."""

    name: str
    width: int
    depth: int
    heads: int
    image: int
    patch: int
    context: int
    dimensions: int
    batch: int
    steps: int

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return self.batch * self.steps

    def recipe(self) -> Recipe:
        """Write the recipe."""
        tower = {"width": self.width, "depth": self.depth, "heads": self.heads}
        image = {"kind": "image", "size": self.image, "patch": self.patch}
        text = {"kind": "text", "method": "bytes", "max_length": self.context}
        return Recipe.model_validate(
            {
                "towers": {
                    "image": tower | {"tokens": image, "pooling": "cls"},
                    "text": tower | {"tokens": text},
                },
                "pairs": [{"dataset": NAME, "modalities": ["image", "text"]}],
                "dimensions": self.dimensions,
                "budget": {
                    "steps": 1_000_000,  # it is stopped before
                    "batch_size": self.batch,
                    "checkpoint_s": 86_400,
                    "log_every": min(self.steps, 10),
                },
                "precision": "fp32",
            }
        )


def tower_of(recipe: Recipe, modality: str) -> Tower:
    """Return the configuration of a tower of ours."""
    tower = recipe.towers[modality]
    assert isinstance(tower, Tower)
    return tower


def publish(folder: Path, size: Size) -> Path:
    """Publish the data set in a store of its own, with the recipe beside it; return the store's folder."""
    root = folder / f"{size.width}-{size.image}"
    rng = np.random.default_rng(0)
    with SampleWriter(root / "making") as writer:
        for at in range(size.num_samples):
            picture = Image.fromarray(rng.integers(0, 256, (size.image, size.image, 3), np.uint8))
            file = io.BytesIO()
            picture.save(file, "PNG")
            caption = rng.choice(LETTERS, 2 * size.context).tobytes()
            writer.add(f"sample-{at}", {"image": file.getvalue(), "text": caption}, "", False)  # noqa: FBT003
        writer.close()
    store = open_store(str(root / "store"))
    media = {"image": "image", "text": "text"}
    manifest = store.publish(root / "making", ARTIFACT, kind="dataset", id=NAME, body={"modalities": media})
    given = Input(artifact=ARTIFACT, digest=manifest.digest, id=NAME, kind="dataset")
    (root / "input.json").write_text(json.dumps(given), encoding="utf-8")
    (root / "recipe.json").write_text(size.recipe().model_dump_json(), encoding="utf-8")
    return root


def read_task(root: Path) -> tuple[Recipe, Input]:
    """Return what was published."""
    recipe, given = ((root / name).read_text(encoding="utf-8") for name in ("recipe.json", "input.json"))
    return Recipe.model_validate_json(recipe), json.loads(given)


@final
@dataclass(frozen=True)
class Ready:
    """The whole data set as tensors, read by our samples and tokenisers; and the weights that our loop starts from."""

    recipe: Recipe
    images: UInt8[Tensor, "sample patch value"]
    ids: Int64[Tensor, "sample token"]
    vocab: int
    weights: dict[str, Tensor]
    indices: Int64[np.ndarray, " sample"]

    @property
    def budget(self) -> Budget:
        """How much it learns."""
        return self.recipe.budget or Budget()

    @property
    def optimiser(self) -> Optimiser:
        """How it learns."""
        return self.recipe.optimiser or Optimiser()

    def epoch(self, at: int) -> Int64[Tensor, "step item"]:
        """Return the samples of each step of an epoch, in the order in which our loop draws them."""
        order = np.random.default_rng([self.recipe.seed, 0, at]).permutation(self.indices)
        return torch.from_numpy(order).view(-1, self.budget.batch_size)


def make_ready(root: Path) -> Ready:
    """Read the data set into memory."""
    recipe, given = read_task(root)
    samples = Samples(root / "store" / given["artifact"])
    dataset = Dataset(NAME, given["digest"], samples)
    tokenisers = build_tokenisers(recipe, train_tokenisers(recipe, {NAME: dataset}))
    indices = samples.indices("train")
    images, ids = (
        TokenSource(dataset, name, tokenisers[name])(indices).values.unflatten(0, (len(indices), -1))
        for name in ("image", "text")
    )
    torch.manual_seed(recipe.seed)
    sizes = vocab_sizes(recipe, tokenisers)
    weights: dict[str, Any] = MultiTower(recipe, sizes).state_dict()
    return Ready(recipe, images, ids, sizes["text"], weights, indices)


def take_turns(ready: Ready, losses: Iterator[float]) -> None:
    """Take steps as told until somebody ends this process; `losses` takes one whenever it is asked for its loss."""
    turns, look = Turns(), ready.budget.log_every
    while True:
        found = [next(losses) for _ in range(turns.begin())]
        turns.end(len(found) * ready.budget.batch_size, sum(found[-look:]) / look)
