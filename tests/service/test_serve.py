from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from service.serve import StartError, bind, locked, url_of


@contextlib.contextmanager
def taken() -> Generator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield int(sock.getsockname()[1])


def test_a_taken_port_gives_way_to_a_free_one_unless_it_was_asked_for() -> None:
    with taken() as port:
        with bind("127.0.0.1", port, exactly=False) as sock:
            assert sock.getsockname()[1] != port
        with pytest.raises(StartError, match=f"127.0.0.1:{port}"):
            bind("127.0.0.1", port, exactly=True)


def test_two_services_that_start_at_once_get_two_ports() -> None:
    with bind("127.0.0.1", 0, exactly=False) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port, exactly=False) as second:
            assert second.getsockname()[1] != port


def test_an_unknown_host_is_an_error_that_names_it() -> None:
    with pytest.raises(StartError, match="nowhere"):
        bind("nowhere.invalid", 0, exactly=True)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("::", "http://[::1]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_a_bind_is_shown_as_an_address_that_answers(host: str, url: str) -> None:
    assert url_of(host, 80) == url


def test_a_data_folder_is_served_once(tmp_path: Path) -> None:
    with locked(tmp_path) as place:
        place.write_text(json.dumps({"url": "http://127.0.0.1:8000", "pid": 1}))
        with pytest.raises(StartError, match=r"served already .*8000"), locked(tmp_path):
            pass
    with locked(tmp_path) as place:
        assert place.read_text() == ""


class Served:
    """A real `isthmus serve`, ready."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.data = folder / "data"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service.cli", "serve", "--port", "0", "--data", str(self.data)],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"ISTHMUS_SHUTDOWN_GRACE_S": "10"},
            )
        self.url = ""
        deadline = time.monotonic() + 40
        while not self.url and time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                self.url = json.loads((self.data / "serve.json").read_text())["url"]
            time.sleep(0.05)
        assert self.url, self.log.read_text()

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, module: str) -> psutil.Process:
        (found,) = [each for each in psutil.Process(self.process.pid).children() if module in each.cmdline()]
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Served]]:
    started: list[Served] = []

    def begin() -> Served:
        started.append(Served(tmp_path))
        return started[-1]

    yield begin
    for served in started:
        for process in (*(served.family() if served.process.poll() is None else ()), served.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        served.process.wait()


def gone(processes: list[psutil.Process], within_s: float) -> bool:
    return not psutil.wait_procs(processes, timeout=within_s)[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_is_no_failure(number: signal.Signals, start: Callable[[], Served]) -> None:
    served = start()
    family = served.family()
    assert len(family) >= 3  # the API, the worker and its inference process at least
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        assert client.get("/readyz").json()["status"] == "ok"
    os.kill(served.process.pid, number)
    assert served.process.wait(20) == 0, served.log.read_text()
    assert gone(family, 5)
    log = served.log.read_text()
    for said in (f"{served.url}/docs", str(served.data), "only this machine may call", f"demo --url {served.url}"):
        assert said in log
    assert "Traceback" not in log


def test_a_killed_service_leaves_nothing_behind(start: Callable[[], Served]) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells children that their parent was killed")
    served = start()
    family = served.family()
    served.process.kill()
    served.process.wait()
    assert gone(family, 30), served.log.read_text()


def test_a_worker_that_dies_is_started_again_and_an_api_that_dies_ends_it_all(start: Callable[[], Served]) -> None:
    served = start()
    first = served.child("worker")
    first.kill()
    deadline = time.monotonic() + 20
    while "starting it again" not in served.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    second: psutil.Process | None = None
    while second is None and time.monotonic() < deadline:
        with contextlib.suppress(ValueError, psutil.NoSuchProcess):
            second = served.child("worker")
        time.sleep(0.1)
    assert second is not None
    assert second.pid != first.pid
    family = served.family()
    served.child("service.cli").kill()
    assert served.process.wait(40) == 1
    assert "the API ended by itself (signal SIGKILL)" in served.log.read_text()
    assert gone(family, 5)
