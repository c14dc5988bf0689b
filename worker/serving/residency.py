"""Which models are in memory: loaded when first asked for, in threads of their own; the least recently used leave."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, final

from safetensors import SafetensorError

from service.contract.errors import Permanent, Unavailable
from worker.learning.model import Loaded, load_model

if TYPE_CHECKING:
    import torch

    from service.contract.store import Store
    from service.contract.wire import ModelRef

log = logging.getLogger(__name__)

LOADERS: Final = 2  # a long download must not hold back a small model


@final
class Residency:
    """The models in memory, by artifact key. Every method belongs to the event loop."""

    def __init__(self, store: Store, *, device: torch.device, max_bytes: int) -> None:
        self._store = store
        self._device = device
        self._max_bytes = max_bytes
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # least recently used first
        self._loading: dict[str, asyncio.Task[Loaded]] = {}
        self._threads = ThreadPoolExecutor(LOADERS, thread_name_prefix="loader")

    @property
    def num_bytes(self) -> int:
        """Bytes of the models in memory."""
        return sum(loaded.num_bytes for loaded in self._loaded.values())

    @property
    def artifacts(self) -> list[str]:
        """Keys of the models in memory, least recently used first."""
        return list(self._loaded)

    def file_digest(self, artifact: str, path: str) -> str | None:
        """Return the digest of a file of a model that was loaded; None if it has no such file."""
        files = self._store.manifest(artifact).files
        entry = files.get(path) or files.get(f"model/{path}")  # a checkpoint keeps its model one level below
        return entry.sha256 if entry else None

    async def get(self, ref: ModelRef) -> Loaded:
        """Return a model, loading it first if need be; everybody who waits for one model waits for one loading.

        Raises NotFound if the store has no such artifact, Unavailable if it is damaged, is not the one that the
        reference means, or does not fit.
        """
        if loaded := self._loaded.get(ref.artifact):
            self._loaded.move_to_end(ref.artifact)
        else:
            task = self._loading.get(ref.artifact)
            if task is None:
                task = asyncio.create_task(self._load(ref.artifact))
                self._loading[ref.artifact] = task
                task.add_done_callback(lambda done: self._settle(ref.artifact, done))
            # Shielded: one caller who gives up must not stop the loading for the others.
            loaded = await asyncio.shield(task)
        if self._store.manifest(ref.artifact).digest != ref.digest:
            raise Unavailable(f"{ref.artifact} is not the model that was asked for", code="digest_mismatch")
        return loaded

    def unload(self, artifact: str) -> None:
        """Forget a model; calls that hold it finish with it."""
        self._loaded.pop(artifact, None)

    async def _load(self, artifact: str) -> Loaded:
        loop = asyncio.get_running_loop()
        num_bytes = await loop.run_in_executor(self._threads, self._weigh, artifact)
        self._make_room(num_bytes)
        loaded = await loop.run_in_executor(self._threads, self._read, artifact)
        self._make_room(loaded.num_bytes)
        self._loaded[artifact] = loaded
        return loaded

    def _settle(self, artifact: str, task: asyncio.Task[Loaded]) -> None:
        del self._loading[artifact]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s was not loaded: %s", artifact, error)

    def _make_room(self, num_bytes: int) -> None:
        while self._loaded and self.num_bytes + num_bytes > self._max_bytes:
            artifact, _ = self._loaded.popitem(last=False)
            log.info("%s leaves the memory", artifact)

    # --- in the loader threads ---

    def _weigh(self, artifact: str) -> int:
        try:
            return self._store.manifest(artifact).num_bytes
        except Permanent as error:
            raise Unavailable(error.message, code=error.code) from error

    def _read(self, artifact: str) -> Loaded:
        try:
            # Verified: a flipped bit would be served as a wrong vector for weeks.
            return load_model(self._store.verified(artifact), self._device)
        except Permanent as error:
            raise Unavailable(error.message, code=error.code) from error
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            log.exception("%s cannot be loaded", artifact)
            raise Unavailable(f"{artifact} cannot be loaded: {type(error).__name__}", code="load_failed") from error
