from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from service.contract import samples
from service.contract.artifacts import open_store
from service.contract.samples import Samples, SampleWriter


def write(folder: Path, num_samples: int):
    writer = SampleWriter(folder)
    for index in range(num_samples):
        payloads = {"image": bytes([index % 256]) * (index + 1), "text": f"número {index}".encode()}
        writer.add(f"key-{index}", payloads, "" if index % 3 else f"labél {index}", index % 4 == 0)
    return writer.close()


def test_what_was_written_is_read_back(tmp_path: Path):
    totals = write(tmp_path, 50)
    assert (totals.num_samples, totals.num_holdout, totals.num_shards) == (50, 13, 1)
    data = Samples(tmp_path)
    assert len(data) == 50
    for index in (0, 7, 49, -1):
        position = index % 50
        assert data.payload("image", index) == bytes([position]) * (position + 1)
        assert data.payload("text", index).decode() == f"número {position}"
        assert data.key(index) == f"key-{position}"
        assert data.label(index) == ("" if position % 3 else f"labél {position}")
        assert data.digest("image", index) == hashlib.sha256(data.payload("image", index)).digest()
    assert totals.num_bytes == sum(len(data.payload(name, i)) for name in ("image", "text") for i in range(50))


def test_the_splits_are_disjoint_and_complete(tmp_path: Path):
    write(tmp_path, 50)
    data = Samples(tmp_path)
    train, holdout = data.indices("train"), data.indices("holdout")
    assert train.dtype == holdout.dtype == np.int64
    assert sorted([*train, *holdout]) == list(data.indices("all")) == list(range(50))
    assert list(holdout) == list(range(0, 50, 4))


def test_payloads_span_shards_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "SHARD_BYTES", 1000)
    totals = write(tmp_path, 200)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "shards").iterdir())]
    assert len(sizes) == totals.num_shards > 10
    assert max(sizes) <= 1000
    data = Samples(tmp_path)
    assert all(data.payload("image", index) == bytes([index]) * (index + 1) for index in range(200))
    with pytest.raises(ValueError, match="1001 bytes, a shard holds 1000"):
        SampleWriter(tmp_path / "other").add("k", {"image": bytes(1001)}, "", False)


def test_the_index_is_plain_safetensors(tmp_path: Path):
    write(tmp_path, 5)
    index = load_file(tmp_path / "index.safetensors")
    assert {name: (str(array.dtype), array.shape[0]) for name, array in index.items() if name.startswith("image")} == {
        "image.shard": ("uint16", 5),
        "image.offset": ("uint64", 5),
        "image.length": ("uint32", 5),
        "image.digest": ("uint8", 5),
    }
    assert index["split"].tolist() == [1, 0, 0, 0, 1]
    assert index["key.bytes"][: index["key.ends"][0]].tobytes() == b"key-0"


def test_every_sample_has_the_modalities_of_the_first(tmp_path: Path):
    with SampleWriter(tmp_path) as writer:
        writer.add("a", {"image": b"x", "text": b"y"}, "", False)
        with pytest.raises(ValueError, match="'b'"):
            writer.add("b", {"image": b"x"}, "", False)


def test_strangers_are_errors(tmp_path: Path):
    write(tmp_path, 3)
    data = Samples(tmp_path)
    with pytest.raises(KeyError):
        data.payload("audio", 0)
    with pytest.raises(IndexError):
        data.payload("image", 3)
    with pytest.raises(IndexError):
        data.key(3)


def test_a_data_set_without_samples_or_labels_can_be_opened(tmp_path: Path):
    SampleWriter(tmp_path / "empty").close()
    assert len(Samples(tmp_path / "empty")) == 0
    writer = SampleWriter(tmp_path / "one")
    writer.add("k", {"text": b"t"}, "", False)
    writer.close()
    assert Samples(tmp_path / "one").label(0) == ""


def test_it_travels_to_loader_processes_as_a_path(tmp_path: Path):
    write(tmp_path, 1000)
    packed = pickle.dumps(Samples(tmp_path))
    assert len(packed) < 1000
    assert pickle.loads(packed).key(3) == "key-3"


def test_modalities_come_from_the_published_manifest(tmp_path: Path):
    write(tmp_path / "out", 3)
    store = open_store(str(tmp_path / "store"))
    body = {"modalities": {"image": "image", "text": "text"}}
    store.publish(tmp_path / "out", "datasets/ds_a/1", kind="dataset", id="ds_a", body=body)
    assert Samples(store.local("datasets/ds_a/1")).modalities == {"image": "image", "text": "text"}
