"""Models as this process knows them: names five seconds fresh, manifests and tokenisers for good.

An artifact never changes, so what was read of it is kept. Weights are never opened here.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, final

import anyio
import anyio.to_thread
from pydantic import TypeAdapter

from service.contract.errors import Invalid, IsthmusError, NotFound, Unavailable
from service.contract.losses import Critic
from service.contract.manifest import Manifest
from service.contract.modality import (
    AudioTokens,
    ContinuousTokens,
    DiscreteTokens,
    ImageTokens,
    TextTokens,
    TokeniserConfig,
)
from service.contract.recipe import pair_name
from service.contract.references import Input, resolve_model
from service.contract.store import Store
from service.contract.tokens.decode import Limits
from service.contract.tokens.tokenise import Tokeniser, build
from service.contract.wire import ModelRef
from service.database import Database

FRESH_S: Final = 5.0
MAX_NAMES: Final = 10_000
MAX_MODELS: Final = 64
THREADS: Final = 4
TOKENISER_FILE: Final = "tokenizer.json"

AnyConfig = ImageTokens | TextTokens | AudioTokens | DiscreteTokens | ContinuousTokens
_configs: TypeAdapter[dict[str, AnyConfig]] = TypeAdapter(dict[str, TokeniserConfig])


@final
@dataclass(frozen=True)
class Model:
    """A model as its manifest describes it, with its tokenisers."""

    ref: ModelRef
    body: dict[str, Any]
    modalities: dict[str, AnyConfig]
    tokenisers: dict[str, Tokeniser]

    @property
    def dimensions(self) -> int:
        """Values in a vector."""
        return int(self.body["dimensions"])

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """The trained pairs, names in the order of the alphabet."""
        return sorted((first, second) for first, second in (sorted(pair) for pair in self.body["pairs"]))

    def is_trained(self, first: str, second: str) -> bool:
        """Tell whether two modalities were trained together."""
        return pair_name(first, second) in self.body["logit_scales"]

    def scale(self, first: str, second: str, *, param: str) -> float:
        """Return the trained logit scale of a pair.

        Raises Invalid, naming the trained pairs, if it is none of them.
        """
        scale = self.body["logit_scales"].get(pair_name(first, second))
        if scale is None:
            raise Invalid(
                f"the model was not trained on {first} with {second}; trained: {self.described_pairs()}",
                param=param,
                code="pair_not_trained",
            )
        return float(scale)

    @property
    def critic(self) -> Critic:
        """How two vectors are compared."""
        return self.body.get("critic", "cosine")

    def bias(self, first: str, second: str) -> float | None:
        """Return the bias of a pair that was trained with the sigmoid loss; None for other pairs."""
        bias = self.body.get("logit_biases", {}).get(pair_name(first, second))
        return None if bias is None else float(bias)

    def gives_ratios(self, first: str, second: str) -> bool:
        """Tell whether the scores of a trained pair are log-ratios but for an offset: the square loss gives none."""
        return pair_name(first, second) not in self._regressed

    @cached_property
    def _regressed(self) -> set[str]:
        recipe = self.body["recipe"]
        losses = {pair_name(*pair["modalities"]): pair.get("loss") or recipe.get("loss") for pair in recipe["pairs"]}
        return {name for name, loss in losses.items() if loss is not None and loss["kind"] == "square"}

    def has_bank(self, first: str, second: str) -> bool:
        """Tell whether the model keeps a bridge bank of a trained pair."""
        return pair_name(first, second) in self.body.get("banks", {})

    def described_pairs(self) -> str:
        """Name the trained pairs in a sentence."""
        return ", ".join(f"{first} with {second}" for first, second in self.pairs)

    def partners(self, modality: str) -> list[str]:
        """List the modalities that were trained together with this one."""
        return [second if first == modality else first for first, second in self.pairs if modality in {first, second}]

    def space(self, modality: str) -> set[str]:
        """Return the modalities whose vectors can be added to this one's: those that trained pairs join with it."""
        found, new = {modality}, [modality]
        while new:
            new = [each for each in self.partners(new.pop()) if each not in found] + new
            found |= set(new)
        return found

    def check_modality(self, modality: str, *, param: str) -> None:
        """Raise Invalid for a modality that the model does not have."""
        if modality not in self.modalities:
            known = ", ".join(sorted(self.modalities))
            raise Invalid(f"the model has no such modality; it has {known}", param=param)


@dataclass
class _Name:
    found: Input
    at: float


@final
class Catalogue:
    """Look up models by id, alias or checkpoint."""

    def __init__(self, database: Database, store: Store, limits: Limits) -> None:
        self._database = database
        self._store = store
        self._limits = limits
        self._names: OrderedDict[tuple[str, str], _Name] = OrderedDict()
        self._models: OrderedDict[tuple[str, str], Model] = OrderedDict()
        self._limiter = anyio.CapacityLimiter(THREADS)

    async def find(self, tenant: str, name: str, *, param: str = "model") -> Model:
        """Return a model.

        Raises NotFound for a name that the tenant does not have, Unavailable if neither the database nor this process
        knows.
        """
        try:
            return await self._load(await self._resolve(tenant, name))
        except IsthmusError as error:
            raise error.at(param) from None

    def forget(self, tenant: str) -> None:
        """Ask the database again for a tenant's names: aliases have moved, or a model is gone."""
        for key in [key for key in self._names if key[0] == tenant]:
            del self._names[key]

    async def _resolve(self, tenant: str, name: str) -> Input:
        at = time.monotonic()
        known = self._names.get((tenant, name))
        if known is not None and at - known.at <= FRESH_S:
            return known.found
        try:
            found = await self._database.read(lambda conn: resolve_model(conn, tenant, name))
        except NotFound:  # not kept: its model may be there a second later
            self._names.pop((tenant, name), None)
            raise NotFound("there is no model by that name", code="model_not_found") from None
        except Unavailable:
            if known is None:
                raise
            found = known.found
        self._names[tenant, name] = _Name(found, at)
        while len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)
        return found

    async def _load(self, found: Input) -> Model:
        key = found["artifact"], found["digest"]  # two models can be equal, and one of them be deleted
        if (model := self._models.get(key)) is not None:
            self._models.move_to_end(key)
            return model
        model = await anyio.to_thread.run_sync(_read, self._store, found, self._limits, limiter=self._limiter)
        self._models[key] = model
        while len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        return model


def _read(store: Store, found: Input, limits: Limits) -> Model:
    key = found["artifact"]
    manifest = store.manifest(key)
    configs = _configs.validate_python(manifest.body["modalities"])
    tokenisers = {
        name: build(config, _tokeniser_files(store, key, manifest, name), limits) for name, config in configs.items()
    }
    return Model(
        ref=ModelRef(artifact=key, digest=found["digest"]),
        body=manifest.body,
        modalities=configs,
        tokenisers=tokenisers,
    )


def _tokeniser_files(store: Store, key: str, manifest: Manifest, modality: str) -> dict[str, bytes]:
    # A checkpoint is the same layout one level down, in model/.
    for path in (f"tokenizers/{modality}.json", f"model/tokenizers/{modality}.json"):
        if path in manifest.files:
            return {TOKENISER_FILE: store.read(key, path)}
    return {}
