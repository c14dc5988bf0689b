"""A process that prepares batches: `python -P -m worker.loader --socket FD --parent PID`.

The runner that trains starts it and asks for pieces of batches; it reads, decodes, alters and tokenises them, without
torch. It ends with the runner, however that ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from service.contract import logs
from service.contract.errors import IsthmusError
from service.contract.modality import TokeniserConfig
from service.contract.recipe import Budget, Recipe
from service.contract.samples import Samples
from service.contract.tokens import tokenise
from worker.learning import handover
from worker.learning.reading import CACHE_BYTES, WHOLE, Dataset, PairData, Share, open_pairs
from worker.lifeline import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Mapping

_CONFIG: TypeAdapter[TokeniserConfig] = TypeAdapter(TokeniserConfig)


def describe(
    recipe: Recipe,
    datasets: Mapping[str, Dataset],
    tokenisers: Mapping[str, tokenise.Tokeniser],
    num_loaders: int,
    share: Share = WHOLE,
) -> dict[str, Any]:
    """Say in JSON what each of several loaders needs to open the same pairs as the runner."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "datasets": {name: [one.digest, str(one.samples.folder)] for name, one in datasets.items()},
        "tokenisers": {
            modality: {
                "config": tokeniser.config.model_dump(mode="json"),
                "file": None if tokeniser.vocabulary is None else tokeniser.vocabulary.file.decode(),
            }
            for modality, tokeniser in tokenisers.items()
        },
        "batch_size": (recipe.budget or Budget()).batch_size,
        "share": [share.rank, share.size],
        "cache_bytes": CACHE_BYTES // max(1, num_loaders),
    }


def _open(told: dict[str, Any]) -> list[PairData]:
    return open_pairs(
        Recipe.model_validate(told["recipe"]),
        {name: Dataset(name, digest, Samples(Path(folder))) for name, (digest, folder) in told["datasets"].items()},
        {
            modality: tokenise.build(
                _CONFIG.validate_python(one["config"]),
                {} if one["file"] is None else {tokenise.text.FILE: one["file"].encode()},
            )
            for modality, one in told["tokenisers"].items()
        },
        told["batch_size"],
        share=Share(*told["share"]),
        cache_bytes=told["cache_bytes"],
    )


def main() -> None:
    """Serve one runner until it goes."""
    parser = argparse.ArgumentParser(prog="python -P -m worker.loader", description="Prepare batches for a runner.")
    parser.add_argument("--socket", type=int, required=True, metavar="FD", help="to the runner")
    parser.add_argument("--parent", type=int, required=True, metavar="PID", help="the runner")
    options = parser.parse_args()
    die_with_parent(options.parent)
    logs.configure()
    for number in (signal.SIGTERM, signal.SIGINT):  # whoever stops a whole group: the runner still has to save
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=options.socket) as runner:
        try:
            told, _ = handover.receive(runner)
            pairs = _open(told)
            while True:
                asked, _ = handover.receive(runner)
                _answer(runner, pairs, asked)
        except (EOFError, ConnectionError):
            os._exit(0)


def _answer(runner: socket.socket, pairs: list[PairData], asked: dict[str, Any]) -> None:
    try:
        sides = pairs[asked["pair"]].batch(asked["visit"], Share(*asked["piece"]))
        handover.send_batch(runner, sides)
    except IsthmusError as error:
        handover.send(runner, {"failed": {"message": error.message, "code": error.code}})
    except MemoryError:
        handover.send(runner, {"out_of_memory": True})


if __name__ == "__main__":
    main()
