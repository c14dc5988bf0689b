from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from service.contract.errors import Permanent
from worker.sources import tables
from worker.sources.sample import Value


def test_csv_with_paths_base64_data_uris_tokens_labels_and_splits(tmp_path: Path, read, png: bytes):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png)
    encoded = base64.b64encode(png).decode()
    (tmp_path / "table.csv").write_text(
        "image,caption,codes,label,split,key\n"
        'images/a.png,"one, with a comma","[1, 2, 3]",7,train,k1\n'
        f'{encoded},"two\nlines",[],8,test,k2\n'
        f'"data:image/png;base64,{encoded}",=cmd()|x,[4],9,,\n'
    )
    first, second, third = read(tmp_path / "table.csv", fields=("split",))
    assert first.values == {
        "image": Value("image", png),
        "text": Value("text", "one, with a comma"),
        "codes": Value("list", [1, 2, 3]),
    }
    assert (first.key, first.label, first.fields) == ("k1", "7", {"split": "train"})
    assert second.values["image"].data == png
    assert second.values["text"].data == "two\nlines"
    assert third.values["image"].data == png
    assert third.values["text"].data == "=cmd()|x", "a formula is text"
    assert third.key == "00000005"


def test_a_byte_order_mark_semicolons_and_crlf_are_no_obstacle(tmp_path: Path, read):
    (tmp_path / "x.csv").write_bytes("\ufefftext;label\r\né, a;1\r\n\r\nb;2\r\n".encode())
    assert [(found.values["text"].data, found.label) for found in read(tmp_path / "x.csv")] == [
        ("é, a", "1"),
        ("b", "2"),
    ]


def test_ragged_rows_and_other_encodings_are_named_by_their_line(tmp_path: Path, read):
    (tmp_path / "x.csv").write_bytes(b'text,label\na,1\nb\nc,1,2\n"d\nd",4\ncaf\xe9,5\n"e\ne",5,6\ng,7\n')
    found = read(tmp_path / "x.csv")
    assert [sample.problem for sample in found] == [
        None,
        "line 3: 1 cells where the header has 2",
        "line 4: 3 cells where the header has 2",
        None,
        "line 7: not UTF-8",
        "lines 8 to 9: 3 cells where the header has 2",
        None,
    ]
    assert found[-1].key == "00000010"


def test_a_quote_that_is_never_closed_fails_instead_of_hiding_the_rest(tmp_path: Path, read):
    (tmp_path / "x.csv").write_text("text,label\na,1\n" + '"b,2\n' + "c,3\n" * 50)
    with pytest.raises(Permanent, match=r"x\.csv, line 3: .*never closed"):
        read(tmp_path / "x.csv")


def test_a_row_without_end_is_refused_with_its_line(tmp_path: Path, read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 10_000)
    (tmp_path / "x.csv").write_text("text,label\na,1\n" + "x" * 20_000)
    with pytest.raises(Permanent, match=r"x\.csv, line 3: more than 10000 bytes"):
        read(tmp_path / "x.csv")
    (tmp_path / "y.csv").write_text('text,label\na,1\n"' + "x\n" * 20_000)
    with pytest.raises(Permanent, match=r"y\.csv, line \d+: more than 10000 bytes in one row"):
        read(tmp_path / "y.csv")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("text,text\na,b\n", "each of its own name"),
        ("image,Image\na,b\n", "are both image"),
        ("text,caption\na,b\n", "columns 'text' and 'caption' are both text"),
    ],
)
def test_headers_that_cannot_be_read_are_refused(tmp_path: Path, read, table: str, reason: str):
    (tmp_path / "x.csv").write_text(table)
    with pytest.raises(Permanent, match=reason):
        read(tmp_path / "x.csv")


def test_a_mapping_chooses_columns_and_names_the_one_that_is_missing(tmp_path: Path, read, png: bytes):
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "x.csv").write_text("file_name,text,caption\na.png,one,two\n")
    (found,) = read(tmp_path / "x.csv", mapping={"photo": "file_name", "text": "caption"})
    assert found.values == {"photo": Value("image", png), "text": Value("text", "two")}
    with pytest.raises(Permanent, match=r"no column 'filename'; it has 'file_name', 'text', 'caption'"):
        read(tmp_path / "x.csv", mapping={"photo": "filename"})
    with pytest.raises(Permanent, match="two modalities name the same"):
        read(tmp_path / "x.csv", mapping={"a": "text", "b": "text"})


def test_jsonl_with_one_bad_line_names_it(tmp_path: Path, read):
    lines = [json.dumps({"text": f"t{number}", "imu": [[0.5, 1], [2, 3]], "meta": {"a": 1}}) for number in range(300)]
    lines[150] = '{"text": "broken'
    lines[200] = "[1, 2]"
    lines[220] = ""
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    found = read(tmp_path / "x.jsonl")
    assert len(found) == 299
    bad = [sample for sample in found if sample.problem]
    assert [sample.problem.split(":")[0] for sample in bad] == ["line 151", "line 201"]
    assert found[0].values == {"text": Value("text", "t0"), "imu": Value("list", [[0.5, 1], [2, 3]])}


def test_jsonl_that_is_not_utf8_nests_without_end_or_holds_huge_numbers_is_named(tmp_path: Path, read):
    lines = [b'{"text": "a"}', b'{"text": "\xff"}', b'{"text": ' + b"[" * 100_000, b'{"text": ' + b"1" * 5000 + b"}"]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    assert [sample.problem and sample.problem[:6] for sample in read(tmp_path / "x.jsonl")] == [
        None,
        "line 2",
        "line 3",
        "line 4",
    ]


def test_paths_never_leave_the_folder_not_even_through_a_link(tmp_path: Path, read, png: bytes):
    (tmp_path / "secret.png").write_bytes(png)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "good.png").write_bytes(png)
    paths = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "x/../../secret.png",
        "none.png",
        ".",
        "good.png",
    ]
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"image": path}) for path in paths))
    *bad, good = read(folder)
    assert all(sample.problem for sample in bad)
    assert good.values["image"].data == png


def test_several_tables_of_a_folder_are_read_one_after_the_other(tmp_path: Path, read):
    (tmp_path / "README.md").write_text("About\nthis\n")
    (tmp_path / "test.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "dataset_info.json").write_text('{\n "text": "a"\n}\n')
    assert [sample.key for sample in read(tmp_path)] == ["test/00000001", "train/00000001"]
