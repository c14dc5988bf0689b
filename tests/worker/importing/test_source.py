"""Checkpoints come from folders that are set up for it, and from a hub that answers."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, final

import huggingface_hub.constants
import pytest

from service.contract.errors import IsthmusError, Permanent, Transient
from service.contract.jobs import ImportModelArgs
from tests import checkpoints
from worker.importing.source import open_source
from worker.jobs import import_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_sentences(tmp_path_factory.mktemp("made") / "bert")


@final
class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    protocol_version = "HTTP/1.1"
    folder: ClassVar[Path]
    asked: ClassVar[list[str]] = []
    broken: ClassVar[dict[str, int]] = {}
    """What a path ends in -> the status to answer."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.command == "GET":
            self.asked.append(path)
        for end, status in self.broken.items():
            if path.endswith(end):
                return self._send(status, b"{}")
        if path == "/api/models/org/bert/revision/main":
            return self._send(200, json.dumps({"id": "org/bert", "sha": COMMIT, "siblings": []}).encode())
        files = {each.relative_to(self.folder).as_posix(): each for each in self.folder.rglob("*") if each.is_file()}
        if path == f"/api/models/org/bert/tree/{COMMIT}":
            listed = [
                {"type": "file", "path": name, "size": each.stat().st_size, "oid": f"{at:040x}"}
                for at, (name, each) in enumerate(files.items())
            ]
            return self._send(200, json.dumps(listed).encode())
        name = path.removeprefix(f"/org/bert/resolve/{COMMIT}/")
        if name in files:
            return self._send(200, files[name].read_bytes(), etag=f'"{zlib.crc32(name.encode()):040x}"')
        return self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"x-repo-commit": COMMIT, "content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine that holds `org/bert`."""
    Hub.folder, Hub.asked, Hub.broken = made, [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_hubs_model_is_fetched_without_what_is_not_read(bench: Any, hub: type[Hub], made: Path) -> None:
    (made / "pytorch_model.bin").write_bytes(b"never asked for")
    (made / "onnx").mkdir()
    (made / "onnx" / "model.onnx").write_bytes(b"never asked for")
    (made / "model.fp16.safetensors").write_bytes(b"never asked for")
    result = import_model.run(ImportModelArgs(source="org/bert"), bench.context("job_hub"))
    fetched = {path.rpartition(f"{COMMIT}/")[2] for path in hub.asked if "/resolve/" in path}
    assert {"config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json", "model.safetensors"} <= fetched
    assert not {name for name in fetched if name.endswith((".bin", ".onnx", "fp16.safetensors"))}
    assert (result.architecture, result.modalities) == ("sentence-transformers Bert", ["text"])
    assert bench.store.manifest(result.artifact).body["imported"]["source"] == "org/bert"


@pytest.mark.parametrize(
    ("source", "broken", "kind", "code"),
    [
        ("org/none", {}, Permanent, "model_not_found"),
        ("org/a..b", {}, Permanent, "model_not_found"),
        ("org/bert", {"revision/main": 401}, Permanent, "model_not_found"),
        ("org/bert", {"revision/main": 403}, Permanent, "model_not_found"),
        ("org/bert", {"revision/main": 501}, Transient, "hub_failed"),
        ("org/bert", {"config.json": 501}, Transient, "hub_failed"),
    ],
)
def test_a_hub_that_says_no_is_told_from_one_that_fails(
    bench: Any, hub: type[Hub], source: str, broken: dict[str, int], kind: type[IsthmusError], code: str
) -> None:
    hub.broken = broken
    with pytest.raises(kind, match="hub") as caught:
        open_source(source, bench.context("job_hub"))
    assert caught.value.code == code


def test_a_hub_that_nobody_answers_for_may_answer_later(
    bench: Any, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Transient, match="could not be reached for org/bert"):
        open_source("org/bert", bench.context("job_hub"))


def test_a_folder_that_is_not_set_up_for_imports_is_not_looked_at(bench: Any, made: Path, tmp_path: Path) -> None:
    context = bench.context("job_a")
    folder = tmp_path / "imports"
    folder.mkdir()
    context.import_folders = (folder.resolve(),)
    (folder / "link").symlink_to(made)
    for outside in (made, tmp_path / "not-there", folder / "link", folder / ".." / "x", Path("/etc/passwd")):
        for source in (str(outside), f"file://{outside}"):
            with pytest.raises(Permanent, match="ISTHMUS_IMPORT_FOLDERS") as caught:
                open_source(source, context)
            assert caught.value.code == "forbidden_path"
    with pytest.raises(Permanent, match="there is no file or folder"):
        open_source(str(folder / "not-there"), context)
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text("{}")
    (folder / "bert" / "modules.json").symlink_to(made / "modules.json")
    source = open_source(str(folder / "bert"), context)
    assert source.document("config.json") == {}
    with pytest.raises(Permanent, match=r"modules\.json is a link that leads out"):
        source.read("modules.json")


def test_a_snapshot_may_not_open_the_folders_above_it(bench: Any, made: Path, tmp_path: Path) -> None:
    """A folder named like a hub's cache widens nothing that was set up."""
    snapshot = tmp_path / "repository" / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    (tmp_path / "repository" / "secret.json").write_text("{}")
    (snapshot / "config.json").symlink_to(tmp_path / "repository" / "secret.json")
    context = bench.context("job_a")
    for folders, is_seen in (([snapshot], False), ([tmp_path / "repository"], True)):
        context.import_folders = tuple(folder.resolve() for folder in folders)
        source = open_source(str(snapshot), context)
        if is_seen:
            assert source.document("config.json") == {}
        else:
            with pytest.raises(Permanent, match="leads out"):
                source.read("config.json")
