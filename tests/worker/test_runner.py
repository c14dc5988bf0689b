from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.contract.errors import Cancelled, Interrupted
from service.contract.jobs import IngestArgs
from worker.child import BrokenChannel, Child, ending
from worker.runner import Channel, Context
from worker.task import Task

ROOT = Path(__file__).resolve().parents[2]


def _task(folder: Path, **changes: Any) -> Task:
    task: dict[str, Any] = {
        "job": "job_x",
        "epoch": 1,
        "attempt": 1,
        "args": IngestArgs(dataset="ds_x", source="store:uploads/up_00000000000000000000000000/nothing.tar"),
        "inputs": {},
        "resume": [],
        "store_url": str(folder / "store"),
        "scratch": folder / "scratch",
        "device": "cpu",
        "threads": 1,
    }
    return Task(**{**task, **changes})


@contextmanager
def _child(*, preload: bool = False) -> Generator[Child]:
    child = Child(preload=preload, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        yield child
    finally:
        child.close()


def _messages(child: Child, timeout_s: float = 30) -> list[dict[str, Any]]:
    """Read until the runner closes its channel."""
    found: list[dict[str, Any]] = []
    give_up_at = time.monotonic() + timeout_s
    while not child.ended:
        assert time.monotonic() < give_up_at
        found += child.messages()
        time.sleep(0.01)
    return found


def test_a_job_that_cannot_succeed_says_so_without_a_traceback(tmp_path: Path) -> None:
    with _child() as child:
        child.send(_task(tmp_path).model_dump(mode="json"))
        (message,) = _messages(child)
        assert message["failed"]["type"] == "Permanent"
        assert message["failed"]["permanent"]
        assert "traceback" not in message["failed"]


def test_a_bug_fails_the_job_for_good_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"caption": "one"}\n{"caption": "two"}\n')
    (tmp_path / "scratch").write_text("a file where a folder should be")
    args = IngestArgs(dataset="ds_x", source=str(tmp_path / "data.jsonl"))
    with _child() as child:
        child.send(_task(tmp_path, args=args).model_dump(mode="json"))
        message = _messages(child)[-1]
    assert message["failed"]["permanent"]
    assert "Traceback" in message["failed"]["traceback"]


def test_what_a_runner_logs_names_its_job_and_the_request_that_submitted_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scratch").write_text("a file where a folder should be")
    (tmp_path / "data.jsonl").write_text('{"caption": "one"}\n')
    args = IngestArgs(dataset="ds_x", source=str(tmp_path / "data.jsonl"))
    with _child() as child:
        child.send(_task(tmp_path, args=args, request_id="req_x").model_dump(mode="json"))
        _messages(child)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    about = {"job": "job_x", "attempt": 1, "epoch": 1, "request_id": "req_x"}
    assert all({name: line[name] for name in about} == about for line in lines), lines
    events = {line["event"]: line for line in lines}
    assert events["working"]["kind"] == "ingest"
    assert events["a bug"]["traceback"].startswith("Traceback")


def test_the_last_message_is_the_result(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"caption": "one"}\n{"caption": "two"}\n')
    (tmp_path / "scratch").mkdir()
    args = IngestArgs(dataset="ds_x", source=str(tmp_path / "data.jsonl"))
    with _child() as child:
        child.send(_task(tmp_path, args=args, epoch=7).model_dump(mode="json"))
        *reports, last = _messages(child)
    assert all("progress" in report for report in reports)
    assert last["done"]["num_samples"] == 2
    assert last["done"]["artifact"] == "datasets/ds_x/7"


def test_an_idle_runner_ends_with_its_control_pipe(tmp_path: Path) -> None:
    with _child() as child:
        assert child._process.stdin is not None
        child._process.stdin.close()
        assert child._process.wait(30) == 0


def test_a_runner_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from worker.child import Child;"
        "child = Child(preload=False, environment=dict(os.environ));"
        "keep = os.dup(child._process.stdin.fileno()); os.set_inheritable(keep, True);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    supervisor = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert supervisor.stdout is not None
    runner = int(supervisor.stdout.readline())
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    give_up_at = time.monotonic() + 10
    while _runs(runner):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_a_runner_ends_though_the_last_line_of_its_supervisor_was_cut_off(tmp_path: Path) -> None:
    key = "uploads/up_00000000000000000000000000/data.jsonl"
    source = tmp_path / "store" / key
    source.parent.mkdir(parents=True)
    os.mkfifo(source)
    with _child() as child:
        child.send(_task(tmp_path, args=IngestArgs(dataset="ds_x", source=f"store:{key}")).model_dump(mode="json"))
        pipe = os.open(source, os.O_WRONLY)  # once the job reads, which it does for ever
        stdin = child._process.stdin
        assert stdin is not None
        stdin.write(b'{"can')
        stdin.close()
        assert child._process.wait(30) == 1
        os.close(pipe)


def test_a_runner_that_cannot_be_started_leaves_no_pipe_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            Child(preload=False, environment={})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_group_of_a_runner_that_was_waited_for_is_not_killed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be that of another process by then."""
    with _child() as child:
        child.kill()
        while child.exit_status() is None:
            time.sleep(0.01)
        killed: list[int] = []
        monkeypatch.setattr(os, "killpg", lambda group, _signal: killed.append(group))
    assert killed == []


def test_the_group_of_a_runner_dies_with_it() -> None:
    with _child() as child:
        assert os.getpgid(child.pid) == child.pid
        child.kill()
        assert child._process.wait(10) == -signal.SIGKILL


def test_a_channel_that_breaks_its_promise_is_refused() -> None:
    for line in (b"not json\n", b"[1]\n", b"\xff\n"):
        with _child() as child:
            read_end, write_end = os.pipe()
            os.dup2(read_end, child._channel)
            os.set_blocking(child._channel, False)
            os.write(write_end, line)
            with pytest.raises(BrokenChannel):
                child.messages()
            os.close(read_end)
            os.close(write_end)


def test_messages_are_read_whole_however_they_arrive() -> None:
    with _child() as child:
        read_end, write_end = os.pipe()
        os.dup2(read_end, child._channel)
        os.set_blocking(child._channel, False)
        os.write(write_end, b'{"a": 1}\n{"b"')
        assert child.messages() == [{"a": 1}]
        os.write(write_end, b": 2}\n")
        assert child.messages() == [{"b": 2}]
        os.close(read_end)
        os.close(write_end)
        assert child.messages() == []
        assert child.ended


def test_a_context_reports_and_obeys(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    context = Context(_task(tmp_path), Channel(write_end))
    context.check()
    for done in range(100):
        context.progress(done, 100)
    context.progress(100, 100)
    context.metric(3, {"loss": 0.5})
    context.event("note", {"a": 1})
    context.checkpoint(3, "checkpoints/job_x/3-1", "d", {})
    os.close(write_end)
    with os.fdopen(read_end) as stream:
        first, *rest = [json.loads(line) for line in stream]
    assert first == {"progress": {"done": 0, "total": 100, "eta_s": None}}
    assert rest == [
        {"progress": {"done": 100, "total": 100, "eta_s": None}},
        {"metric": {"step": 3, "values": {"loss": 0.5}}},
        {"event": {"type": "note", "detail": {"a": 1}}},
        {"checkpoint": {"step": 3, "artifact": "checkpoints/job_x/3-1", "digest": "d", "metrics": {}}},
    ]
    context.ask("interrupt")
    with pytest.raises(Interrupted):
        context.check()
    context.ask("cancel")
    context.ask("interrupt")
    with pytest.raises(Cancelled):
        context.check()


def test_threads_share_a_channel() -> None:
    read_end, write_end = os.pipe()
    channel = Channel(write_end)
    threads = [threading.Thread(target=channel.send, args=({"x": "y" * 20_000},)) for _ in range(8)]
    for thread in threads:
        thread.start()
    with os.fdopen(read_end) as stream:
        lines = [json.loads(stream.readline()) for _ in threads]
    assert lines == [{"x": "y" * 20_000}] * 8
    for thread in threads:
        thread.join()
    os.close(write_end)


def test_an_ending_is_told_in_words() -> None:
    assert ending(3) == "exited with status 3"
    assert ending(-9) == "was killed by SIGKILL"


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"
