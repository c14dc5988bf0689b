from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from service.contract.artifacts import open_store
from service.contract.errors import Cancelled, Interrupted, Permanent
from service.contract.jobs import Holdout, IngestArgs, IngestResult, result_adapter
from service.contract.samples import Samples
from service.contract.tokens.decode import array
from worker.jobs import ingest
from worker.runner import Channel, Context
from worker.task import Task

MakeContext = Callable[..., Context]
Members = list[tuple[str, bytes]]


@pytest.fixture
def context(tmp_path: Path) -> Iterator[MakeContext]:
    """Make the runner's own context, with a pipe that nobody minds."""
    reader, writer = os.pipe()
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reader, 65536), b"")])
    drain.start()

    def make(epoch: int = 1) -> Context:
        scratch = tmp_path / f"scratch-{epoch}"
        scratch.mkdir(exist_ok=True)
        task = Task.model_validate(
            {
                "job": "job_a",
                "epoch": epoch,
                "attempt": epoch,
                "args": {"kind": "ingest", "dataset": "ds_a", "source": "x"},
                "inputs": {},
                "store_url": str(tmp_path / "store"),
                "scratch": scratch,
                "device": "cpu",
                "threads": 1,
                "resume": [],
            }
        )
        return Context(task, Channel(writer))

    yield make
    os.close(writer)
    drain.join()
    os.close(reader)


def png(level: int, mode: str = "L") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8, 6), level).save(stream, "PNG")
    return stream.getvalue()


def wav(seconds: float, rate: int = 8000) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(int(seconds * rate), np.float32), rate, format="WAV")
    return stream.getvalue()


def npy(values: object, dtype: type) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values, dtype))
    return stream.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(start: int, stop: int) -> Members:
    return [
        member
        for n in range(start, stop)
        for member in (
            (f"{n:05d}.png", png(n % 256)),
            (f"{n:05d}.txt", f"caption {n % 7}".encode()),
            (f"{n:05d}.cls", str(n % 3).encode()),
        )
    ]


def args(source: object, **changes: object) -> IngestArgs:
    return IngestArgs.model_validate({"dataset": "ds_a", "source": str(source), **changes})


def run(context: Context, source: object, **changes: object) -> IngestResult:
    return ingest.run(args(source, **changes), context)


def test_three_shards_become_a_data_set(tmp_path: Path, context: MakeContext):
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        write_tar(tmp_path / "shards" / f"{shard}.tar", pairs(100 * shard, 100 * shard + 100))
    ctx = context()
    result = run(ctx, tmp_path / "shards", holdout={"fraction": 0.25, "seed": 3})

    assert result.artifact == "datasets/ds_a/1"
    assert (result.num_samples, result.num_rejected, result.rejects) == (300, 0, [])
    assert result.modalities == {"image": "image", "text": "text"}
    assert result.labels == ["0", "1", "2"]
    assert result.splits["train"] + result.splits["holdout"] == 300
    assert 45 <= result.splits["holdout"] <= 105
    assert result.statistics["image"]["width_px_mean"] == 8
    assert result.statistics["image"]["height_px_max"] == 6
    assert result.statistics["text"]["distinct"] == 7
    assert result.statistics["text"]["characters_min"] == 9
    assert result_adapter.validate_json(result.model_dump_json()) == result

    manifest = ctx.store.manifest(result.artifact)
    assert (manifest.kind, manifest.id, manifest.digest) == ("dataset", "ds_a", result.digest)
    assert manifest.body["modalities"] == result.modalities
    ctx.store.verify(result.artifact)
    data = Samples(ctx.store.local(result.artifact))
    assert data.modalities == result.modalities
    assert data.key(123) == "00123"
    assert data.payload("image", 123) == png(123)
    assert data.payload("text", 123) == b"caption 4"
    assert data.label(123) == "0"
    assert len(data.indices("holdout")) == result.splits["holdout"]
    assert not list(ctx.scratch.iterdir())


def test_the_same_source_gives_the_same_data_set_at_every_attempt(tmp_path: Path, context: MakeContext):
    source = write_tar(tmp_path / "x.tar", pairs(0, 40))
    first, second = (run(context(epoch), source, holdout={"fraction": 0.5}) for epoch in (1, 2))
    assert (first.artifact, second.artifact) == ("datasets/ds_a/1", "datasets/ds_a/2")
    assert first.digest == second.digest
    other = run(context(3), source, holdout={"fraction": 0.5, "seed": 1})
    assert other.digest != first.digest


def test_sounds_arrays_and_text_of_any_modality_are_taken(tmp_path: Path, context: MakeContext):
    members: Members = []
    for n in range(4):
        members += [
            (f"{n}.wav", wav(0.5 + n / 4)),
            (f"{n}.txt", b"text"),
            (f"{n}.imu.npy", npy([[n, 0.5]] * (n + 1), np.float64)),
            (f"{n}.codes.ids.npy", npy([n, 2, 3], np.int64)),
            (f"{n}.leaves.json", json.dumps([n, 9]).encode()),
        ]
    ctx = context()
    result = run(ctx, write_tar(tmp_path / "x.tar", members))
    media = {"audio": "audio", "codes": "discrete", "imu": "continuous", "leaves": "discrete", "text": "text"}
    assert result.modalities == media
    assert result.statistics["audio"] == {
        "count": 4,
        "bytes": result.statistics["audio"]["bytes"],
        "seconds_mean": 0.875,
        "seconds_min": 0.5,
        "seconds_max": 1.25,
        "seconds_total": 3.5,
        "sample_rate_hz_mean": 8000,
        "sample_rate_hz_min": 8000,
        "sample_rate_hz_max": 8000,
    }
    assert result.statistics["imu"]["dim"] == 2
    assert result.statistics["leaves"]["max_id"] == 9
    data = Samples(ctx.store.local(result.artifact))
    assert array(data.payload("imu", 3)).tolist() == [[3, 0.5]] * 4
    assert array(data.payload("codes", 3)).dtype == np.int32


def test_bad_samples_are_left_out_and_counted_with_their_reasons(tmp_path: Path, context: MakeContext):
    members = [
        *pairs(0, 40),
        ("bad-image.png", png(1)[:45]),
        ("bad-image.txt", b"x"),
        ("gif.png", b"GIF89a"),
        ("gif.txt", b"x"),
        ("no-text.png", png(1)),
        ("latin.png", png(1)),
        ("latin.txt", b"caf\xe9"),
        ("empty.png", png(1)),
        ("empty.txt", b" \n"),
        ("00003.png", png(1)),
        ("00003.txt", b"again"),
        ("odd-label.png", png(1)),
        ("odd-label.txt", b"x"),
        ("odd-label.cls", b"a\0b"),
    ]
    result = run(context(), write_tar(tmp_path / "x.tar", members), max_bad_fraction=0.2)
    assert result.num_samples == 40
    assert {reject.key: reject.reason for reject in result.rejects} == {
        "bad-image": "image: the image cannot be decoded: it is truncated or damaged",
        "gif": "image: an image is PNG, JPEG or WebP; this is none of them",
        "no-text": "there is no text",
        "latin": "text: not UTF-8 at byte 3",
        "empty": "text: empty",
        "00003": "an earlier sample has the same key",
        "odd-label": "a label is one line of at most 1000 bytes",
    }
    assert result.num_rejected == 7


def test_too_many_bad_samples_fail_the_job_and_publish_nothing(tmp_path: Path, context: MakeContext):
    members = pairs(0, 8) + [(f"bad-{n}.{end}", b"x") for n in range(2) for end in ("png", "txt")]
    ctx = context()
    with pytest.raises(
        Permanent, match=r"2 of 10 samples are bad, more than the 10\.0% allowed.*bad-0: image: an image is"
    ):
        run(ctx, write_tar(tmp_path / "x.tar", members))
    assert ctx.store.list("") == []
    assert run(context(2), tmp_path / "x.tar", max_bad_fraction=0.2).num_samples == 8


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([], "the source holds no samples"),
        ([("1.md", b"x")], "the source holds no samples"),
        ([("1.png", b"x"), ("1.txt", b"a")], "1 of 1 samples are bad"),
        ([("../1.txt", b"x")], "1 of 1 samples are bad. The first: ../1: member '../1.txt' has no proper name"),
    ],
)
def test_a_source_without_a_good_sample_fails(tmp_path: Path, context: MakeContext, members: Members, reason: str):
    with pytest.raises(Permanent) as caught:
        run(context(), write_tar(tmp_path / "x.tar", [*members, ("z.md", b"")]))
    assert reason in caught.value.message


def test_a_table_without_a_known_column_says_what_to_do(tmp_path: Path, context: MakeContext):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(Permanent, match="name extensions or columns in `modalities`"):
        run(context(), tmp_path / "x.csv")
    (tmp_path / "y.csv").write_text("image,text\nx.png,a\ny.png,b\n")
    with pytest.raises(Permanent, match=r"2 of 2 samples are bad.*line 2: image 'x\.png' is not in the data set"):
        run(context(), tmp_path / "y.csv")


def test_modalities_are_what_half_of_the_samples_have(tmp_path: Path, context: MakeContext):
    members = [*pairs(0, 20), ("00019.wav", wav(0.1))]
    assert run(context(), write_tar(tmp_path / "x.tar", members)).modalities == {"image": "image", "text": "text"}
    with pytest.raises(Permanent, match="none of the first 20 samples has a readable audio: there is no such member"):
        run(context(2), write_tar(tmp_path / "y.tar", pairs(0, 20)), modalities={"image": "png", "audio": "wav"})


def test_a_mapping_names_modalities_freely(tmp_path: Path, context: MakeContext):
    members: Members = [
        ("1.left.png", png(1)),
        ("1.right.png", png(2)),
        ("2.left.png", png(3)),
        ("2.right.png", png(4)),
    ]
    ctx = context()
    result = run(ctx, write_tar(tmp_path / "x.tar", members), modalities={"left": "left.png", "right": "right.png"})
    assert result.modalities == {"left": "image", "right": "image"}
    assert Samples(ctx.store.local(result.artifact)).payload("right", 1) == png(4)


def test_vectors_have_one_dimension_and_one_medium_in_a_data_set(tmp_path: Path, context: MakeContext):
    members = [(f"{n}.imu.npy", npy([[1, 2]], np.float32)) for n in range(6)]
    members += [("7.imu.npy", npy([[1, 2, 3]], np.float32)), ("8.imu.npy", npy([1, 2], np.int32))]
    result = run(context(), write_tar(tmp_path / "x.tar", members), max_bad_fraction=0.5)
    assert [reject.reason for reject in result.rejects] == [
        "imu: vectors of 3 values where the data set has 2",
        "imu: discrete where the data set has continuous",
    ]


def test_groups_stay_on_one_side(tmp_path: Path, context: MakeContext):
    rows = [{"text": f"t{n}", "speaker": f"s{n % 12}", "key": f"k{n}"} for n in range(240)]
    rows.append({"text": "x", "key": "alone"})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ctx = context()
    holdout = Holdout(fraction=0.4, group_by="speaker").model_dump()
    result = run(ctx, tmp_path / "x.jsonl", holdout=holdout)
    assert [(reject.key, reject.reason) for reject in result.rejects] == [
        ("alone", "there is no 'speaker' to group by")
    ]
    data = Samples(ctx.store.local(result.artifact))
    sides: dict[str, set[int]] = {}
    for index in range(len(data)):
        sides.setdefault(f"s{int(data.key(index)[1:]) % 12}", set()).add(int(data.split[index]))
    assert all(len(side) == 1 for side in sides.values())
    assert {next(iter(side)) for side in sides.values()} == {0, 1}


def test_named_groups_and_nothing_else_are_held_out(tmp_path: Path, context: MakeContext):
    rows = [{"text": f"t{n}", "speaker": n % 3, "key": f"k{n}", "split": "test"} for n in range(12)]
    rows.append({"text": "x", "key": "alone", "split": "test"})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ctx = context()
    holdout = {"group_by": "speaker", "groups": ["2", "0"]}
    result = run(ctx, tmp_path / "x.jsonl", holdout=holdout)
    assert [reject.reason for reject in result.rejects] == ["there is no 'speaker' to group by"]
    data = Samples(ctx.store.local(result.artifact))
    assert {(int(data.key(at)[1:]) % 3, int(data.split[at])) for at in range(len(data))} == {(0, 1), (1, 0), (2, 1)}


def test_a_group_to_be_held_out_that_no_good_sample_has_fails_naming_those_that_are_there(
    tmp_path: Path, context: MakeContext
):
    members = [
        (f"{n}.{part}", content)
        for n in range(6)
        for part, content in (
            ("png", png(n) if n < 5 else b"broken"),
            ("json", json.dumps({"speaker": f"s{n}"}).encode()),
        )
    ]
    tar = write_tar(tmp_path / "x.tar", members)
    for groups, missing in (["s1", "S2"], "S2"), (["s5"], "s5"):
        with pytest.raises(Permanent, match=f"'{missing}' as its 'speaker'; some have 's0', .*'s4'$") as failure:
            run(context(), tar, holdout={"group_by": "speaker", "groups": groups}, max_bad_fraction=0.5)
        assert failure.value.code == "no_such_group"


def test_a_split_in_the_source_is_kept_unless_a_fraction_is_asked_for(tmp_path: Path, context: MakeContext):
    splits = ["train", "test", "validation", "holdout", "", "Train", "elsewhere"]
    rows = [{"text": f"t{n}", "split": split} for n, split in enumerate(splits)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ctx = context()
    result = run(ctx, tmp_path / "x.jsonl", max_bad_fraction=0.5)
    assert Samples(ctx.store.local(result.artifact)).split.tolist() == [0, 1, 1, 1, 0, 0]
    assert "split is 'elsewhere'" in result.rejects[0].reason
    assert run(context(2), tmp_path / "x.jsonl", holdout={"fraction": 0.5}).num_samples == 7


def test_parquet_as_hugging_face_writes_it_is_ingested(tmp_path: Path, context: MakeContext):
    images = [{"bytes": png(n), "path": None} for n in range(50)]
    table = pa.table({"image": images, "caption": [f"c{n}" for n in range(50)], "label": [n % 2 for n in range(50)]})
    pq.write_table(table, tmp_path / "x.parquet")
    result = run(context(), tmp_path / "x.parquet")
    assert (result.num_samples, result.labels) == (50, ["0", "1"])


def test_an_upload_is_ingested_from_the_store(tmp_path: Path, context: MakeContext):
    ctx = context()
    data = write_tar(tmp_path / "x.tar", pairs(0, 5)).read_bytes()
    key, _, _ = open_store(str(tmp_path / "store")).write_upload("x.tar", [data])
    assert run(ctx, f"store:{key}").num_samples == 5


def test_keys_and_reasons_are_fit_to_be_stored(tmp_path: Path, context: MakeContext):
    rows = [{"text": f"t{n}", "key": f"k{n}"} for n in range(3)]
    rows += [{"text": "x", "key": "a\0b"}, {"text": "x", "key": "\ud800"}, {"text": "x", "key": "y" * 5000}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(context(), tmp_path / "x.jsonl", max_bad_fraction=0.5)
    assert [reject.key for reject in result.rejects[:2]] == ["a\\x00b", "\\ud800"]
    assert len(result.rejects[2].key) == 300
    assert "\0" not in result.model_dump_json()


def test_only_the_first_rejects_and_labels_are_kept(tmp_path: Path, context: MakeContext):
    rows = [{"text": "x" if n % 2 else "", "label": n} for n in range(2600)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(context(), tmp_path / "x.jsonl", max_bad_fraction=0.9)
    assert (result.num_samples, result.num_rejected, len(result.rejects)) == (1300, 1300, 100)
    assert len(result.labels) == 1000


@pytest.mark.parametrize(("asked", "raised"), [("cancel", Cancelled), ("interrupt", Interrupted)])
def test_it_stops_when_asked_to(tmp_path: Path, context: MakeContext, asked: str, raised: type[Exception]):
    ctx = context()
    ctx.ask(asked)  # pyright: ignore[reportArgumentType]
    with pytest.raises(raised):
        run(ctx, write_tar(tmp_path / "x.tar", pairs(0, 200)))
    assert ctx.store.list("") == []


def test_it_loads_neither_torch_nor_without_need_pyarrow():
    code = "import sys, worker.jobs.ingest; print(sorted({'torch', 'pyarrow', 'fastapi'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout == "[]\n"
