"""Stopping: a running job that is cancelled, and processes that are told to end while there is work."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import sqlalchemy as sa

from service.contract import queue
from service.contract.tables import job_event, worker
from tests.faults.conftest import NoopWorkers
from tests.supervisors import ROOT, World, runner_of

GRACE_S = 10.0  # of a World's workers, and of the API here
HOG_BYTES = 96 << 20  # what the odd jobs' own child keeps


def test_a_running_job_stops_within_two_seconds_of_a_cancel_with_the_tick_of_the_settings(
    odd_world: World, check_invariants: Callable[..., Counter[str]], record_figures: Callable[..., None]
) -> None:
    del odd_world.environment["ISTHMUS_TICK_S"]  # a hint comes before the tick
    with odd_world.worker(ISTHMUS_CANCEL_GRACE_S="60") as process:
        public_id = odd_world.ingest("odd:obey")
        odd_world.until_it_reads(public_id)
        group = _group_of(runner_of(process))
        assert sum(member.memory_info().rss for member in group) > HOG_BYTES
        asked_at = time.monotonic()
        _cancel(odd_world, public_id)
        odd_world.until_state(public_id, "cancelled", "failed", "succeeded")
        seconds = time.monotonic() - asked_at
        odd_world.until(lambda: not any(_is_there(member) for member in group), 2)  # and so is its memory
    record_figures(cancelled_s=round(seconds, 2))
    assert seconds < 2
    assert check_invariants(odd_world.engine, [public_id]) == {"cancelled": 1}


def test_a_job_that_defies_a_cancel_is_killed_with_all_it_started_after_the_grace(
    odd_world: World, check_invariants: Callable[..., Counter[str]], record_figures: Callable[..., None]
) -> None:
    grace_s = 1.0
    with odd_world.worker(ISTHMUS_CANCEL_GRACE_S=str(grace_s)) as process:
        public_id = odd_world.ingest("odd:defy")
        odd_world.until_it_reads(public_id)
        group = _group_of(runner_of(process))
        assert sum(member.memory_info().rss for member in group) > HOG_BYTES
        asked_at = time.monotonic()
        _cancel(odd_world, public_id)
        odd_world.until_state(public_id, "cancelled", "failed", "succeeded")
        seconds = time.monotonic() - asked_at
        odd_world.until(lambda: not any(_is_there(member) for member in group), 2)
        other = odd_world.ingest("odd:done")
        odd_world.until_state(other, "succeeded")
    record_figures(killed_after_s=round(seconds, 2), grace_s=grace_s)
    assert grace_s <= seconds < grace_s + 2
    assert check_invariants(odd_world.engine, [public_id, other]) == {"cancelled": 1, "succeeded": 1}


def _cancel(world: World, public_id: str) -> None:
    with world.engine.begin() as conn:
        assert queue.cancel(conn, "t", public_id) == "running"


def _group_of(process: psutil.Process) -> list[psutil.Process]:
    found = [process, *process.children(recursive=True)]
    assert len(found) > 1
    return found


def _is_there(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]], ids=["twice", "interrupt"])
def test_a_worker_in_a_hurry_kills_what_defies_it_and_gives_the_job_back_unburnt(
    signals: list[signal.Signals],
    odd_world: World,
    noop_workers: NoopWorkers,
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
) -> None:
    with odd_world.worker(ISTHMUS_SHUTDOWN_GRACE_S="60") as process:
        public_id = odd_world.ingest("odd:defy")
        odd_world.until_it_reads(public_id)
        group = _group_of(runner_of(process))
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)  # two pending signals of one kind are one
        started_at = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - started_at < 5
        assert not any(_is_there(member) for member in group)
    row = odd_world.row(public_id)
    assert (row.state, row.attempt, row.lease_epoch) == ("queued", 0, 1)
    assert odd_world.rows(worker) == []
    noop_workers.start()  # whoever comes next has it at once
    until_all_ended(odd_world.engine)
    assert check_invariants(odd_world.engine, [public_id]) == {"succeeded": 1}


class Callers:
    """Threads that upload data sets and read until the API is gone; they keep every answer."""

    def __init__(self, url: str, num: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.acknowledged: list[str] = []
        self.cut: list[str] = []
        self.num = num
        self._url = url
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(index,), daemon=True) for index in range(num)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End them."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, index: int) -> None:
        num = 0
        with httpx.Client(base_url=self._url, timeout=20, trust_env=False) as client:
            while not self._stop.is_set():
                num += 1
                try:
                    if num % 3:
                        response = client.get("/v1/jobs")
                    else:
                        response = client.post(
                            "/v1/datasets", data={"name": f"n{index}"}, files={"file": ("c.tar", b"\0" * 300_000)}
                        )
                except httpx.ConnectError:
                    return  # the port is closed: the end of a stop
                except httpx.HTTPError as error:
                    self.cut.append(repr(error))
                    continue
                with self._lock:
                    self.statuses[response.status_code] += 1
                    if response.status_code == 202:
                        self.acknowledged.append(response.json()["job_id"])


@contextmanager
def _api(world: World, grace_s: float = GRACE_S) -> Generator[tuple[subprocess.Popen[bytes], str]]:
    """Run the API on a port of its own, with the world's settings."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        descriptor = listener.fileno()
        command = [sys.executable, "-P", "-m", "service.cli", "api", "--fd", str(descriptor)]
        environment = {**os.environ, **world.environment, "PYTHONPATH": str(ROOT)}
        environment["ISTHMUS_SHUTDOWN_GRACE_S"] = str(grace_s)
        process = subprocess.Popen(command, env=environment, pass_fds=(descriptor,), cwd=world.data)
    try:
        world.until(lambda: _answers(url), 60)
        yield process, url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_sigterm_under_load_loses_nothing_and_answers_nobody_with_an_error(
    odd_world: World,
    noop_workers: NoopWorkers,
    tmp_path: Path,
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
    record_figures: Callable[..., None],
) -> None:
    with odd_world.worker() as supervisor, _api(odd_world) as (api, url):
        running = odd_world.ingest(f"odd:wait:{tmp_path / 'never'}")
        odd_world.until_it_reads(running)
        callers = Callers(url, 6)
        odd_world.until(lambda: len(callers.acknowledged) >= 20, 60)
        told_at = time.monotonic()
        for process in (api, supervisor):
            process.send_signal(signal.SIGTERM)
        ends: dict[str, float] = {}
        for name, process in (("api", api), ("supervisor", supervisor)):
            assert process.wait(GRACE_S + 5) == 0, name
            ends[name] = time.monotonic() - told_at
        callers.stop()
    record_figures(
        acknowledged=len(callers.acknowledged),
        answers=callers.statuses.total(),
        unavailable=callers.statuses[503],
        cut=len(callers.cut),
        api_s=round(ends["api"], 1),
        supervisor_s=round(ends["supervisor"], 1),
    )
    assert callers.statuses.keys() <= {200, 202, 503}
    # A request that is on its way as an idle connection is closed is cut, as HTTP has it, and was never taken.
    assert all("ReadError" in cut or "RemoteProtocolError" in cut for cut in callers.cut)
    assert len(callers.cut) <= callers.num
    row = odd_world.row(running)
    assert (row.state, row.attempt) == ("queued", 0)
    assert "released" in [event.type for event in odd_world.rows(job_event)]
    with odd_world.engine.connect() as conn:
        assert conn.execute(sa.select(sa.func.count()).select_from(worker)).scalar_one() == 0
    noop_workers.start("--batch", "8")
    until_all_ended(odd_world.engine)
    assert check_invariants(odd_world.engine, [running, *callers.acknowledged])["failed"] == 0


HALF = (
    b"POST /v1/datasets HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    b'content-length: 1000\r\n\r\n--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nabc'
)


def _send_half(url: str) -> socket.socket:
    """Begin a request and never end it."""
    made = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    made.sendall(HALF)
    time.sleep(0.5)
    return made


def test_a_request_that_outlasts_the_grace_of_a_stop_is_answered_503(odd_world: World) -> None:
    with _api(odd_world, grace_s=2) as (api, url), _send_half(url) as half:
        api.send_signal(signal.SIGTERM)
        answer = half.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 503 "), answer
        assert b'"type": "server_error"' in answer
        assert api.wait(GRACE_S) == 0


def test_an_api_that_is_told_twice_does_not_wait_for_a_request_that_never_ends(odd_world: World) -> None:
    with _api(odd_world) as (api, url), _send_half(url):
        api.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert api.poll() is None  # it waits for the request, within its grace
        told_at = time.monotonic()
        api.send_signal(signal.SIGTERM)
        assert api.wait(GRACE_S) == 0
        assert time.monotonic() - told_at < GRACE_S / 2
