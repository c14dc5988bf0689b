"""Towers: what turns the tokens of one modality into vectors of the shared space."""

from __future__ import annotations

from typing import assert_never, overload

from service.contract.towers import PretrainedTower, Tower
from worker.learning.towers.pretrained import Pretrained
from worker.learning.towers.transformer import Transformer

AnyModule = Transformer | Pretrained


@overload
def build(config: Tower, vocab: int | None, dimensions: int) -> Transformer: ...
@overload
def build(config: PretrainedTower, vocab: int | None, dimensions: int) -> Pretrained: ...
def build(config: Tower | PretrainedTower, vocab: int | None, dimensions: int) -> AnyModule:
    """Build the tower that a recipe asks for; `vocab` is None for tokens that are vectors."""
    match config:
        case Tower():
            return Transformer(config, vocab, dimensions)
        case PretrainedTower():
            return Pretrained(config, vocab, dimensions)
        case _:
            assert_never(config)
