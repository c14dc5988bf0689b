from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.contract.artifacts import Manifest, Store, open_store
from service.contract.errors import NotFound, Unavailable
from service.contract.wire import ModelRef
from worker.learning.model import Loaded, load_model
from worker.serving.residency import Residency

pytestmark = pytest.mark.anyio
CPU = torch.device("cpu")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Loading:
    """Loads models as ever, but one folder only when it is told to, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slow: str | None = None
        self.go = threading.Event()
        self.num = 0
        monkeypatch.setattr("worker.serving.residency.load_model", self.load)

    def load(self, folder: Path, device: torch.device) -> Loaded:
        self.num += 1
        if self.slow is not None and folder.as_posix().endswith(self.slow):
            self.go.wait(10)
        return load_model(folder, device)


async def test_everybody_who_waits_for_a_model_waits_for_one_loading(
    store: Store, publish_model: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = Loading(monkeypatch)
    ref = publish_model(store, "models/a/1")
    residency = Residency(store, device=CPU, max_bytes=1 << 30)
    loading.slow = ref.artifact
    waiting = [asyncio.create_task(residency.get(ref)) for _ in range(5)]
    await asyncio.sleep(0.05)
    waiting[0].cancel()  # one who gives up stops it for nobody else
    loading.go.set()
    found = await asyncio.gather(*waiting[1:])
    assert all(each is found[0] for each in found)
    assert loading.num == 1


async def test_a_slow_model_holds_back_no_other(
    store: Store, publish_model: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = Loading(monkeypatch)
    slow, quick = publish_model(store, "models/a/1"), publish_model(store, "models/b/1")
    residency = Residency(store, device=CPU, max_bytes=1 << 30)
    loading.slow = slow.artifact
    waiting = asyncio.create_task(residency.get(slow))
    await asyncio.wait_for(residency.get(quick), 5)
    assert not waiting.done()
    loading.go.set()
    await waiting


async def test_a_loading_that_failed_is_tried_again(store: Store, publish_model: Callable[..., ModelRef]) -> None:
    residency = Residency(store, device=CPU, max_bytes=1 << 30)
    with pytest.raises(NotFound):
        await residency.get(ModelRef(artifact="models/a/1", digest="0" * 64))
    ref = publish_model(store, "models/a/1")
    assert await residency.get(ref) is await residency.get(ref)
    assert residency.artifacts == ["models/a/1"]
    assert residency.num_bytes > 0


async def test_memory_is_made_for_the_newest(store: Store, publish_model: Callable[..., ModelRef]) -> None:
    refs = [publish_model(store, f"models/m{at}/1", seed=at) for at in range(4)]
    one = store.manifest(refs[0].artifact).num_bytes
    residency = Residency(store, device=CPU, max_bytes=int(2.5 * one))
    for ref in (refs[0], refs[1], refs[0], refs[2]):
        await residency.get(ref)
    assert residency.artifacts == [refs[0].artifact, refs[2].artifact]
    small = Residency(store, device=CPU, max_bytes=1)
    await small.get(refs[3])  # larger than the whole cache: served, alone
    assert small.artifacts == [refs[3].artifact]


async def test_a_checkpoint_is_a_model(store: Store, tmp_path: Path, publish_model: Callable[..., ModelRef]) -> None:
    ref = publish_model(store, "models/a/1")
    folder = tmp_path / "checkpoint"
    shutil.copytree(store.local(ref.artifact), folder / "model")
    (folder / "model" / "manifest.json").unlink()
    (folder / "state").mkdir()
    (folder / "state" / "step.json").write_text("{}")
    key = "checkpoints/job_a/10-1"
    manifest: Manifest = store.publish(folder, key, kind="checkpoint", id="job_a", body={})
    residency = Residency(store, device=CPU, max_bytes=1 << 30)
    loaded = await residency.get(ModelRef(artifact=key, digest=manifest.digest))
    assert set(loaded.recipe.towers) == {"image", "text", "state", "code"}
    path = "tokenizers/text.json"
    assert residency.file_digest(key, path) is not None
    await residency.get(ref)
    assert residency.file_digest(key, path) == residency.file_digest(ref.artifact, path)
    assert residency.file_digest(key, "tokenizers/image.json") is None


async def test_what_is_no_model_cannot_be_served(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    manifest = open_store(str(tmp_path / "store")).publish(folder, "datasets/a/1", kind="dataset", id="a", body={})
    residency = Residency(store, device=CPU, max_bytes=1 << 30)
    with pytest.raises(Unavailable, match="cannot be loaded"):
        await residency.get(ModelRef(artifact="datasets/a/1", digest=manifest.digest))
