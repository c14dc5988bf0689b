from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.contract.errors import Permanent
from worker.sources.sample import Value


def test_parquet_as_hugging_face_writes_it(tmp_path: Path, read, png: bytes):
    (tmp_path / "beside.png").write_bytes(png)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": [{"bytes": png, "path": "a.png"}, {"bytes": None, "path": "beside.png"}, None],
            "caption": ["one", "two", "three"],
            "label": [1, 0, 7],
            "codes": pa.array([[1, 2], [3], None], pa.list_(pa.int32())),
            "imu": pa.array([[[0.5, 1.0]], [[1.0, 2.0], [3.0, 4.0]], []], pa.list_(pa.list_(pa.float32()))),
            "speaker": ["ann", "bob", None],
            "score": [1.5, 2.0, 3.0],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "x.parquet")
    first, second, third = read(tmp_path / "x.parquet", fields=("speaker",))
    assert first.values["image"] == Value("image", png)
    assert first.values["text"] == Value("text", "one")
    assert np.asarray(first.values["codes"].data).tolist() == [1, 2]
    assert first.values["imu"].data == [[0.5, 1.0]]
    assert (first.label, second.label, third.label) == ("dog", "cat", "7")
    assert (first.fields, third.fields) == ({"speaker": "ann"}, {})
    assert second.values["image"].data == png
    assert sorted(third.values) == ["text"]
    assert [sample.key for sample in (first, second, third)] == ["00000000", "00000001", "00000002"]


def test_a_folder_of_parquet_files_has_keys_of_its_own_and_a_mapping_works(tmp_path: Path, read):
    for part in range(2):
        table = pa.table({"audio_bytes": [b"RIFF....WAVE"], "transcript": [f"t{part}"], "id": [None if part else "x"]})
        pq.write_table(table, tmp_path / f"train-{part}.bin")
    first, second = read(tmp_path, mapping={"audio": "audio_bytes", "text": "transcript"})
    assert (first.key, second.key) == ("x", "train-1/00000000")
    assert first.values == {"audio": Value("audio", b"RIFF....WAVE"), "text": Value("text", "t0")}
    with pytest.raises(Permanent, match="no column 'speech'"):
        read(tmp_path, mapping={"audio": "speech"})


def test_a_cell_of_the_wrong_type_is_named_by_its_row(tmp_path: Path, read):
    pq.write_table(pa.table({"text": [["a", "b"], ["c"]]}), tmp_path / "x.parquet")
    assert [sample.problem for sample in read(tmp_path / "x.parquet")] == [
        "row 0: column 'text' holds a list, which is no text",
        "row 1: column 'text' holds a list, which is no text",
    ]


def test_what_is_not_parquet_or_unpacks_to_far_more_is_refused(tmp_path: Path, read):
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(5000))
    with pytest.raises(Permanent, match=r"x\.parquet is not a Parquet file"):
        read(tmp_path / "x.parquet")
    bomb = pa.table({"text": ["x" * 1_000_000] * 60})
    pq.write_table(bomb, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    with pytest.raises(Permanent, match=r"bomb\.parquet unpacks to \d+ bytes"):
        read(tmp_path / "bomb.parquet")


def test_noise_never_escapes_the_error_tree(tmp_path: Path, read):
    randomly = random.Random(9)
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(200)], "n": list(range(200))}), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for _ in range(60):
        noisy = bytearray(whole)
        for _ in range(randomly.randint(1, 4)):
            noisy[randomly.randrange(4, len(noisy) - 8)] = randomly.randrange(256)
        (tmp_path / "noisy.parquet").write_bytes(noisy)
        with suppress(Permanent):
            read(tmp_path / "noisy.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path: Path, read):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(Permanent, match="two columns of one name"):
        read(tmp_path / "x.parquet")
