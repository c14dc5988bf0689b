from __future__ import annotations

import http.server
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from service.cli import main

STEERING = "bad\x1b[31m\x9b2J\u202eline\x07"  # steers a terminal, with and without an escape character


def test_a_list_shows_of_every_job_what_one_wants_to_know(served: Any, isthmus: Any) -> None:
    failed = served.ingest(name="first")
    claim = served.claim()
    served.record(claim, progress=(7, 1200, None))
    served.fail(claim, "the tar ends early\nsecond line")
    running = served.evaluate(name="second")
    served.record(served.claim(), progress=(1500, None, 3.0))
    waiting = served.ingest()
    code, out, error = isthmus(served.port, "list")
    assert (code, error) == (0, "")
    header, *lines = out.splitlines()
    assert header.split() == ["ID", "KIND", "NAME", "STATUS", "PROGRESS", "AGE", "ATTEMPT", "ERROR"]
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert [each[:5] for each in cells] == [
        [waiting, "ingest", "-", "queued", "-"],
        [running, "evaluate", "second", "running", "1,500 samples"],
        [failed, "ingest", "first", "failed", "7/1,200 samples"],
    ]
    assert [each[6:] for each in cells] == [["0 of 5"], ["1 of 5"], ["1 of 5", "Permanent: the tar ends early"]]
    assert all(each[5].endswith(" s") for each in cells)


def test_a_list_goes_on_from_page_to_page_until_its_limit(served: Any, isthmus: Any) -> None:
    ids = [served.ingest() for _ in range(123)][::-1]
    _, out, error = isthmus(served.port, "list", "--limit", "110")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ids[:110]
    assert error == "there are more than these 110; --limit says how many to show\n"
    listed = json.loads(isthmus(served.port, "list", "--limit", "500", "--json")[1])
    assert ([each["id"] for each in listed["data"]], listed["has_more"]) == (ids, False)
    assert json.loads(isthmus(served.port, "list", "--json", "--limit", "100")[1])["has_more"] is True
    assert isthmus(served.port, "list", "--limit", "123")[2] == ""


def test_a_list_is_narrowed_by_status_and_kind(served: Any, isthmus: Any) -> None:
    kept, other = served.ingest(), served.evaluate()
    served.cancel(kept)
    assert kept in isthmus(served.port, "list", "--status", "cancelled")[1]
    assert other not in isthmus(served.port, "list", "--status", "cancelled")[1]
    assert [other in isthmus(served.port, "list", "--kind", kind)[1] for kind in ("evaluate", "ingest")] == [
        True,
        False,
    ]


def test_a_job_is_shown_in_full_by_its_id_or_as_the_latest(served: Any, isthmus: Any) -> None:
    served.ingest()
    job_id = served.evaluate(name="mine", meta={"team": "a"})
    claim = served.claim()
    while claim.public_id != job_id:
        claim = served.claim()
    served.record(claim, progress=(5, 10, 200.0))
    _, by_id, _ = isthmus(served.port, "show", job_id)
    code, latest, error = isthmus(served.port, "show", "latest")
    assert (code, error) == (0, "")
    assert latest.splitlines()[:4] == by_id.splitlines()[:4]
    for said in (
        job_id,
        "5/10 samples, 3 min left",
        "1 of 5",
        "running",
        "mine",
        "team             a",
        claim.args.model,
    ):
        assert said in by_id
    shown = json.loads(isthmus(served.port, "show", "latest", "--json")[1])
    assert (shown["id"], shown["progress"]["eta_s"]) == (job_id, 200.0)
    served.fail(claim, "one\ntwo")
    assert "error\n  Permanent: one\n  two\n" in isthmus(served.port, "show", job_id)[1]


@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("show", "latest"), ("follow", "latest")])
def test_no_control_character_of_a_name_or_an_error_reaches_the_terminal(
    arguments: tuple[str, ...], served: Any, isthmus: Any
) -> None:
    served.ingest(name="\x9b31mname\u202e", meta={"note": STEERING})
    served.fail(served.claim(), STEERING + "\u2028" + STEERING)
    _, out, error = isthmus(served.port, *arguments)
    assert "31mname" in out
    assert "line" in out
    assert all(line.isprintable() for line in out.split("\n"))
    assert error == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "job_none"], "there is no such job"),
        (["follow", "job_none"], "there is no such job"),
        (["cancel", "job_none"], "there is no job job_none"),
        (["retry", "job_none"], "there is no job job_none"),
        (["retry", "job_none", "--follow"], "there is no such job"),
        (["show", "../models"], "there is no job '../models'"),
        (["show", ""], "there is no job ''"),
        (["show", "latest"], "there is no job yet"),
        (["cancel", "latest"], "`latest` is for show and follow"),
        (["list", "--status", "lost"], "status: "),
        (["list", "--kind", "sing"], "kind: "),
        (["list", "--url", "127.0.0.1:8000"], "'127.0.0.1:8000' is not an http:// or https:// URL"),
        (["list", "--url", "http://here:port"], "'http://here:port' is not an http:// or https:// URL"),
        (
            ["list", "--url", "http://127.0.0.1:1"],
            "http://127.0.0.1:1 does not answer (",
        ),
    ],
)
def test_what_cannot_be_done_is_a_line_and_a_failure(
    arguments: list[str], said: str, served: Any, isthmus: Any
) -> None:
    code, out, error = isthmus(served.port, *arguments)
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith("isthmus: ")
    assert said in line


@pytest.mark.parametrize(
    "arguments",
    [["list", "--limit", "0"], ["list", "--limit", "x"], ["follow"], ["follow", "latest", "--patience", "nan"]],
)
def test_arguments_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["jobs", *arguments])
    assert "isthmus jobs" in capsys.readouterr().err


def test_a_key_is_asked_for_and_sent(serve: Any, isthmus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "isk_" + "0" * 32
    served = serve(ISTHMUS_API_KEY=key)
    code, out, error = isthmus(served.port, "list")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "ISTHMUS_API_KEY" in error
    for wrong in ("isk_" + "1" * 32, "isk_ä", "isk_\n"):
        monkeypatch.setenv("ISTHMUS_API_KEY", wrong)
        code, out, error = isthmus(served.port, "list")
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert wrong.strip() not in error
    monkeypatch.setenv("ISTHMUS_API_KEY", key)
    assert isthmus(served.port, "list")[0] == 0


@contextmanager
def stranger(port: int, status: int, body: bytes, media_type: str = "application/json") -> Generator[int]:
    """Answer everything in the same way: another program at our address, or a proxy whose service is away."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-type", media_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name it has there
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>welcome</html>"), (200, b'{"data": []}'), (200, b"[]"), (404, b"nothing\x1b[2J here"), (302, b"")],
)
def test_another_program_at_the_address_is_no_traceback(status: int, body: bytes, isthmus: Any) -> None:
    with stranger(0, status, body) as port:
        code, out, error = isthmus(port, "list")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "\x1b" not in error


def test_a_job_that_succeeds_is_followed_as_it_happens(served: Any, watch: Any) -> None:
    job_id = served.evaluate(name="mine")
    following = watch(served.port, "follow", job_id)
    following.until("queued")
    claim = served.claim()
    following.until("started")
    assert following.seen[0] == f"following {job_id}, evaluate mine"
    served.record(claim, metrics=[(1, {"loss/a+b": 2.5})], progress=(10, 200, 190.0))
    following.until("mine 10/200 samples, 3 min left")
    served.record(claim, events=[("resumed", {"step": 3, "why": "tick\u2028tock"})])
    following.until("resumed")
    assert following.seen[-1].endswith("step 3  why tick tock")
    served.record(claim, progress=(200, 200, None))
    following.until("mine 200/200 samples, loss/a+b 2.5")
    served.succeed(claim)
    assert following.end() == 0
    assert following.seen[-1].startswith(f"{job_id} succeeded after ")


def test_a_job_that_fails_is_followed_through_its_attempts_to_a_failure(served: Any, watch: Any) -> None:
    job_id = served.evaluate()
    following = watch(served.port, "follow", job_id)
    following.until("queued")
    claim = served.claim()
    served.fail(claim, "the disk\nis full")
    assert following.end() == 1
    assert following.seen[-2].endswith("failed      error Permanent: the disk")
    assert following.seen[-1] == f"{job_id} failed after 0 s: Permanent: the disk"
    again = watch(served.port, "follow", job_id)  # what has ended is told and judged as well
    assert again.end() == 1
    assert again.seen == following.seen


def test_a_job_that_is_cancelled_is_no_success(served: Any, watch: Any) -> None:
    job_id = served.evaluate()
    following = watch(served.port, "follow", "latest")
    following.until("queued")
    served.cancel(job_id)
    assert following.end() == 1
    assert following.seen[-1] == f"{job_id} cancelled"


@pytest.mark.parametrize(("number", "proxied"), [(signal.SIGTERM, False), (signal.SIGKILL, True)])
def test_a_service_that_goes_away_for_a_while_is_waited_for_and_nothing_is_missed_or_told_twice(
    number: signal.Signals, proxied: bool, serve: Any, watch: Any
) -> None:
    served = serve()
    job_id = served.evaluate()
    following = watch(served.port, "follow", job_id)
    claim = served.claim()
    following.until("started")
    served.stop(number)
    if proxied:
        with stranger(served.port, 502, b"<h1>Bad Gateway</h1>", "text/html"):
            following.until("the service is away")
    else:
        following.until("the service is away")
    served.record(claim, events=[("meanwhile", {})], progress=(1, 2, None))
    served.start()
    following.until("the service is back")
    following.until("meanwhile")
    served.succeed(claim)
    assert following.end() == 0
    events = [line.split()[1] for line in following.seen if line[2:3] == ":"]
    assert events == ["queued", "started", "meanwhile", "succeeded"]


def test_a_service_that_stays_away_is_given_up(serve: Any, watch: Any) -> None:
    served = serve()
    job_id = served.evaluate()
    following = watch(served.port, "follow", job_id, "--patience", "0.5")
    following.until("queued")
    served.stop()
    assert following.end() == 2
    assert following.seen[-1].startswith(f"isthmus: {served.url} does not answer")


def test_ctrl_c_stops_following_and_not_the_job(served: Any, watch: Any) -> None:
    job_id = served.evaluate()
    following = watch(served.port, "follow", job_id)
    claim = served.claim()
    following.until("started")
    following.process.send_signal(signal.SIGINT)
    assert following.end() == 130
    assert following.seen[-1] == f"no longer following; {job_id} goes on, and `isthmus jobs cancel {job_id}` stops it"
    assert (served.row(job_id).state, served.row(job_id).cancel_requested_at) == ("running", None)
    served.succeed(claim)


def test_on_a_terminal_there_is_a_bar_and_events_stand_above_it(served: Any) -> None:
    job_id = served.evaluate(name="[red]mine")
    claim = served.claim()
    served.record(claim, progress=(50, 200, 3.0), events=[("note", {"text": STEERING})])
    ours, theirs = pty.openpty()
    environment = os.environ | {"ISTHMUS_PORT": str(served.port), "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli", "jobs", "follow", job_id], stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        screen = read_until(ours, "25%")
        served.succeed(claim)
        screen += read_until(ours, None)
        assert process.wait(30) == 0
    os.close(ours)
    assert "━" in screen
    assert "[red]mine" in screen
    assert "50/200 samples, 3 s left" in screen
    assert f"{job_id} succeeded" in screen
    assert "\x1b[31m\x9b" not in screen
    assert "\u202e" not in screen


def read_until(terminal: int, what: str | None) -> str:
    """Read what a terminal was sent until it shows something, or to the end."""
    seen = b""
    while what is None or what not in seen.decode(errors="replace"):
        try:
            chunk = os.read(terminal, 65_536)
        except OSError:  # nobody has it open any more
            chunk = b""
        if not chunk:
            assert what is None, seen
            break
        seen += chunk
    return seen.decode()


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_is_asked(served: Any, isthmus: Any, watch: Any) -> None:
    waiting = served.evaluate()
    assert isthmus(served.port, "cancel", waiting, "--wait")[:2] == (0, f"{waiting} cancelled\n")
    code, _, error = isthmus(served.port, "cancel", waiting)
    assert (code, error) == (2, "isthmus: the job has already been cancelled\n")
    running = served.evaluate()
    claim = served.claim()
    assert isthmus(served.port, "cancel", running)[:2] == (0, f"{running} was asked to stop\n")
    stopping = watch(served.port, "cancel", running, "--wait")
    stopping.until("was asked to stop")
    assert stopping.process.poll() is None
    served.cancelled(claim)
    assert stopping.end() == 0
    assert stopping.seen[-1].startswith(f"{running} cancelled")


def test_ctrl_c_stops_waiting_for_a_cancelled_job(served: Any, watch: Any) -> None:
    job_id = served.evaluate()
    claim = served.claim()
    stopping = watch(served.port, "cancel", job_id, "--wait")
    stopping.until("was asked to stop")
    stopping.process.send_signal(signal.SIGINT)
    assert stopping.end() == 130
    assert stopping.seen[-1] == f"no longer waiting; {job_id} has still been asked to stop"
    served.cancelled(claim)


def test_a_job_that_is_tried_again_is_followed_from_there(served: Any, isthmus: Any, watch: Any) -> None:
    job_id = served.evaluate()
    code, _, error = isthmus(served.port, "retry", job_id)
    assert (code, error) == (2, "isthmus: only a failed or cancelled job can be retried\n")
    served.fail(served.claim(), "once")
    assert isthmus(served.port, "retry", job_id)[:2] == (0, f"{job_id} is queued again\n")
    served.fail(served.claim(), "twice")
    following = watch(served.port, "retry", job_id, "--follow")
    following.until("retry true")
    served.succeed(served.claim())
    assert following.end() == 0
    assert [line.split()[1] for line in following.seen if line[2:3] == ":"] == ["queued", "started", "succeeded"]
    assert "once" not in str(following.seen)


def test_a_reader_that_has_seen_enough_is_no_error(served: Any) -> None:
    served.ingest()
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "service.cli", "jobs", "list", "--url", served.url]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_that_knows_few_characters_is_written_to_all_the_same(served: Any) -> None:
    served.ingest(name="Größe")
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "jobs", "list", "--url", served.url],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert b"Gr??e" in done.stdout
