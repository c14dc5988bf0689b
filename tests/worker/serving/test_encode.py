from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.modality import TextTokens
from service.contract.recipe import Recipe
from service.contract.tokens import text
from worker.learning.finetuning import build_learner
from worker.learning.model import Loaded, build_tokenisers, load_model, save_model, vocab_sizes
from worker.serving.encode import Item, encode_items

CPU = torch.device("cpu")
KINDS = [
    {"positions": positions, "pooling": pooling}
    for positions, pooling in itertools.product(("learned", "rotary"), ("mean", "cls", "attention"))
]


def checkpointed(folder: Path, options: dict[str, Any], precision: str) -> Loaded:
    """Load a model whose towers are of one kind from a checkpoint's files, low-rank updates as factors among them."""
    size = {"width": 16, "heads": 2, "depth": 2, "dropout": 0.3} | options
    recipe = Recipe.model_validate(
        {
            "towers": {
                "text": size
                | {"tokens": {"kind": "text", "max_length": 32}, "init_from": {"model": "m"}, "lora": {"rank": 2}},
                "state": size | {"tokens": {"kind": "continuous", "dim": 3, "max_length": 16}},
            },
            "pairs": [{"dataset": "ds_a", "modalities": ["state", "text"]}],
            "dimensions": 8,
            "precision": precision,
        }
    )
    files = {"text": text.train([], TextTokens(max_length=32))}
    torch.manual_seed(0)
    model = build_learner(recipe, vocab_sizes(recipe, build_tokenisers(recipe, files)))
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_b", "pool.query")):
            torch.nn.init.normal_(parameter)
    save_model(model, folder, recipe=recipe, tokeniser_files=files, banks={}, extra={})
    return load_model(folder, "cpu")


def items_of(modality: str, lengths: tuple[int, ...]) -> list[Item]:
    rng = np.random.default_rng(1)
    values = [
        rng.integers(4, 260, length) if modality == "text" else rng.normal(size=(length, 3)).astype(np.float32)
        for length in lengths
    ]
    return [Item(one, np.array([len(one)])) for one in values]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("options", KINDS)
def test_batch_mates_and_padding_change_nothing_but_rounding(
    options: dict[str, Any], precision: str, tolerance: float, tmp_path: Path
) -> None:
    loaded = checkpointed(tmp_path / "model", options, precision)
    assert not any("lora" in name for name in loaded.model.state_dict())
    for modality in ("text", "state"):
        items = items_of(modality, (3, 16, 1, 7, 7))
        together = np.stack([z for z in encode_items(loaded, modality, CPU, items) if isinstance(z, np.ndarray)])
        alone = np.stack(
            [z for item in items for z in encode_items(loaded, modality, CPU, [item]) if isinstance(z, np.ndarray)]
        )
        assert together.shape == (5, 8)
        np.testing.assert_allclose(together, alone, atol=tolerance)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
