from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.contract.artifacts import FolderStore, ObjectStore, Store, code_version, open_store
from service.contract.errors import Conflict, NotFound, Permanent

KEY = "models/model_a/1"
BODY = {"recipe": {"name": "é"}, "scales": [1.0, 2.5]}


@pytest.fixture(params=["folder", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    # memory:// is one file system per process: every test has its own prefix.
    return open_store(f"memory://{tmp_path.as_posix().strip('/')}", cache_dir=tmp_path / "cache")


def make_folder(tmp_path: Path, name: str = "out", text: str = "weights") -> Path:
    folder = tmp_path / name
    (folder / "tokenizers").mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    (folder / "tokenizers" / "text.json").write_text("{}")
    return folder


def publish(store: Store, folder: Path, key: str = KEY):
    return store.publish(folder, key, kind="model", id="model_a", body=BODY)


def test_open_store_takes_paths_file_urls_and_any_fsspec_url(tmp_path: Path):
    assert isinstance(open_store(str(tmp_path)), FolderStore)
    assert isinstance(open_store(f"file://{tmp_path}"), FolderStore)
    assert isinstance(open_store("memory://x", cache_dir=tmp_path), ObjectStore)


def test_a_published_artifact_can_be_read_listed_verified_and_deleted(store: Store, tmp_path: Path):
    assert not store.exists(KEY)
    folder = make_folder(tmp_path)
    manifest = publish(store, folder)
    assert not folder.exists(), "the store takes the folder"
    assert sorted(manifest.files) == ["model.safetensors", "tokenizers/text.json"]
    assert manifest.num_bytes == len("weights") + 2
    assert manifest.body == BODY
    assert manifest.code_version == code_version()

    assert store.exists(KEY)
    assert store.manifest(KEY) == manifest
    assert store.read(KEY, "model.safetensors") == b"weights"
    with store.open(KEY, "tokenizers/text.json") as stream:
        assert stream.read() == b"{}"
    assert b"model.safetensors" in store.read(KEY, "manifest.json")
    store.verify(KEY)
    assert (store.local(KEY) / "tokenizers" / "text.json").read_text() == "{}"
    assert time.time() - store.modified_at(KEY) < 60
    assert store.list("") == store.list("models") == store.list("models/model_a") == [KEY]
    assert store.list("model") == store.list("datasets") == []

    store.delete(KEY)
    assert not store.exists(KEY)
    assert store.list("") == []
    for attempt in (store.manifest, store.local, store.verify, store.modified_at):
        with pytest.raises(NotFound):
            attempt(KEY)
    store.delete(KEY)


def test_the_same_content_may_be_published_twice_and_other_content_is_a_conflict(store: Store, tmp_path: Path):
    first = publish(store, make_folder(tmp_path))
    again = publish(store, make_folder(tmp_path))
    assert again == first
    with pytest.raises(Conflict, match=KEY):
        publish(store, make_folder(tmp_path, text="other"))
    store.verify(KEY)
    assert store.read(KEY, "model.safetensors") == b"weights"


def test_of_many_writers_of_one_key_exactly_one_wins(store: Store, tmp_path: Path):
    def attempt(number: int) -> str:
        try:
            return publish(store, make_folder(tmp_path, f"out-{number}", f"weights {number % 4}")).digest
        except Conflict:
            return "conflict"

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(attempt, range(8)))
    winner = store.manifest(KEY).digest
    assert winner in outcomes
    assert set(outcomes) <= {winner, "conflict"}
    if isinstance(store, FolderStore):
        store.verify(KEY)


@pytest.mark.parametrize(
    "path",
    [
        "../1/model.safetensors",
        "/etc/passwd",
        "nothing",
        "",
        ".",
        "tokenizers",
        "a\0b",
        "./model.safetensors",
        "x/../y",
    ],
)
def test_only_files_that_the_manifest_names_are_opened(store: Store, tmp_path: Path, path: str):
    publish(store, make_folder(tmp_path))
    with pytest.raises(NotFound):
        store.read(KEY, path)


@pytest.mark.parametrize(
    "key",
    ["../outside", "/etc", "models/../../etc", "models//x", "", ".tmp/x", "models/.hidden", "a\0b", "a\n"],
)
def test_keys_that_lead_elsewhere_are_not_found(store: Store, tmp_path: Path, key: str):
    for attempt in (store.manifest, store.local, store.verify, store.exists, store.open_upload, store.delete):
        with pytest.raises(NotFound):
            attempt(key)
    with pytest.raises(NotFound):
        publish(store, make_folder(tmp_path), key)


def test_links_hidden_files_and_bodies_that_json_cannot_hold_are_not_published(store: Store, tmp_path: Path):
    linked = make_folder(tmp_path, "linked")
    (linked / "secret").symlink_to("/etc/passwd")
    hidden = make_folder(tmp_path, "hidden")
    (hidden / ".bashrc").write_text("x")
    for folder in (linked, hidden, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"artifact|folder"):
            publish(store, folder)
    with pytest.raises(ValueError, match="JSON"):
        store.publish(make_folder(tmp_path), KEY, kind="model", id="m", body={"loss": float("nan")})
    assert store.list("") == []


def test_verify_names_the_file_whose_bytes_changed(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    publish(store, make_folder(tmp_path))
    path = store.local(KEY) / "model.safetensors"
    path.write_text("Weights")
    with pytest.raises(Permanent, match=r"model\.safetensors does not match"):
        store.verify(KEY)
    path.write_text("longer weights")
    with pytest.raises(Permanent, match="14 bytes, its manifest says 7"):
        store.verify(KEY)
    path.unlink()
    with pytest.raises(Permanent, match="is missing"):
        store.verify(KEY)
    (store.local(KEY) / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(Permanent, match=r"manifest\.json cannot be read"):
        open_store(str(tmp_path / "store")).manifest(KEY)


def test_a_manifest_that_was_edited_is_damaged(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    publish(store, make_folder(tmp_path))
    manifest = store.local(KEY) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("2.5", "3.5"))
    with pytest.raises(Permanent, match="does not match its digest"):
        open_store(str(tmp_path / "store")).manifest(KEY)


def test_a_remote_artifact_with_wrong_bytes_never_enters_the_cache(tmp_path: Path):
    url = f"memory://{tmp_path.as_posix().strip('/')}"
    store = open_store(url, cache_dir=tmp_path / "cache")
    assert isinstance(store, ObjectStore)
    publish(store, make_folder(tmp_path))
    store.fs.pipe_file(f"{store.root}/{KEY}/model.safetensors", b"WEIGHTS", "overwrite")
    with pytest.raises(Permanent, match=r"model\.safetensors does not match"):
        store.local(KEY)
    assert store.cache.list("") == []
    store.fs.pipe_file(f"{store.root}/{KEY}/model.safetensors", b"weights", "overwrite")
    folder = store.local(KEY)
    # Filled once: what the store holds afterwards does not matter.
    store.fs.pipe_file(f"{store.root}/{KEY}/model.safetensors", b"WEIGHTS", "overwrite")
    assert open_store(url, cache_dir=tmp_path / "cache").local(KEY) == folder
    assert (folder / "model.safetensors").read_text() == "weights"


def test_a_verified_copy_is_read_once_and_fetched_again_if_it_has_rotted(tmp_path: Path):
    store = open_store(f"memory://{tmp_path.as_posix().strip('/')}", cache_dir=tmp_path / "cache")
    assert isinstance(store, ObjectStore)
    publish(store, make_folder(tmp_path))
    weights = store.verified(KEY) / "model.safetensors"
    weights.write_text("Weights")
    assert (store.verified(KEY) / "model.safetensors").read_text() == "weights"
    store.fs.pipe_file(f"{store.root}/{KEY}/model.safetensors", b"WEIGHTS", "overwrite")
    assert store.verified(KEY) == weights.parent, "what is in the store is not read again"
    weights.write_text("Weights")
    with pytest.raises(Permanent, match=r"model\.safetensors does not match"):
        store.verified(KEY)


def test_an_object_store_without_the_manifest_has_no_artifact(tmp_path: Path):
    store = open_store(f"memory://{tmp_path.as_posix().strip('/')}", cache_dir=tmp_path / "cache")
    assert isinstance(store, ObjectStore)
    store.fs.pipe_file(f"{store.root}/{KEY}/model.safetensors", b"half", "overwrite")
    assert not store.exists(KEY)
    assert store.list("") == []
    assert store.sweep_temporary(3600) == 0
    assert store.sweep_temporary(0) == 1
    publish(store, make_folder(tmp_path))
    assert store.sweep_temporary(0) == 0
    store.verify(KEY)


def test_uploads_are_kept_under_our_own_names(store: Store):
    key, num_bytes, sha256 = store.write_upload("../../etc/CON\0.TAR", iter([b"ab", b"", b"c"]))
    assert key.startswith("uploads/up_")
    assert key.endswith("/data.tar")
    assert num_bytes == 3
    assert sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with store.open_upload(key) as stream:
        assert stream.seekable()
        assert stream.read() == b"abc"
    assert store.exists(key)
    assert store.list("uploads") == [key]
    assert time.time() - store.modified_at(key) < 60
    assert store.sweep_temporary(0) == 0
    store.delete(key)
    assert not store.exists(key)
    with pytest.raises(NotFound):
        store.open_upload(key)
    assert store.write_upload("no suffix/", [])[0].endswith("/data")


def test_an_upload_that_breaks_off_leaves_nothing(store: Store):
    def chunks():
        yield b"first"
        raise TimeoutError("the caller hung up")

    with pytest.raises(TimeoutError):
        store.write_upload("x.tar", chunks())
    assert store.list("") == []
    assert store.sweep_temporary(0) == 0


def test_sweeps_leave_young_entries_and_artifacts_alone(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    assert isinstance(store, FolderStore)
    publish(store, make_folder(tmp_path))
    old, young = store.aside(), store.aside()
    old.mkdir()
    (old / "half").write_text("x")
    young.write_text("x")
    for path in (old / "half", old):
        os.utime(path, (0, 0))
    assert store.sweep_temporary(3600) == 1
    assert not old.exists()
    assert young.exists()
    store.verify(KEY)


def test_manifests_are_read_once(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    publish(store, make_folder(tmp_path))
    reader = open_store(str(tmp_path / "store"))
    reader.manifest(KEY)
    started = time.perf_counter()
    for _ in range(1000):
        reader.manifest(KEY)
    assert time.perf_counter() - started < 0.5
    assert reader.manifest(KEY) is reader.manifest(KEY)


PUBLISHER = """
import sys, pathlib
from service.contract.artifacts import open_store
store, scratch = open_store(sys.argv[1]), pathlib.Path(sys.argv[2])
print("ready", flush=True)
for number in range(10_000):
    folder = scratch / f"out-{number}"
    folder.mkdir(parents=True)
    for part in range(12):
        (folder / f"part-{part}").write_bytes(bytes([part]) * 40_000)
    store.publish(folder, f"models/m/{number}", kind="model", id="m", body={"number": number})
"""


def test_a_publisher_killed_at_any_moment_leaves_whole_artifacts_or_none(tmp_path: Path):
    randomly = random.Random(7)
    root = tmp_path / "store"
    root.mkdir()
    num_published = 0
    for attempt in range(6):
        prefix = root / f"round{attempt}"
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(prefix), str(tmp_path / f"scratch-{attempt}")],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(randomly.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
            process.wait()
        store = open_store(str(prefix))
        keys = store.list("")
        num_published += len(keys)
        for key in keys:
            store.verify(key)
        visible = list((prefix / "models" / "m").iterdir()) if (prefix / "models" / "m").exists() else []
        assert len(visible) == len(keys), "a torn artifact became visible"
        store.sweep_temporary(0)
        assert not (prefix / ".tmp").exists() or not list((prefix / ".tmp").iterdir())
        # The key of the interrupted publish is free: the next attempt takes it.
        publish(store, make_folder(tmp_path, f"next-{attempt}"), f"models/m/{len(keys)}")
    assert num_published > 0
