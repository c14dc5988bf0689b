"""Towers: what turns the tokens of one modality into vectors of the shared space."""

from __future__ import annotations

from service.contract.towers import Tower
from worker.learning.towers.transformer import Transformer


def build(config: Tower, vocab: int | None, dimensions: int) -> Transformer:
    """Build the tower that a recipe asks for; `vocab` is None for tokens that are vectors."""
    match config:
        case Tower():
            return Transformer(config, vocab, dimensions)
