"""`isthmus serve`: the API and a worker as two processes under one parent that stops them together.

1. take the data folder's lock, so that two services never share one by accident
2. bind the port here, so that nobody can take it between the choice and the use
3. start both children, each in a session of its own: Ctrl-C reaches this process alone
4. when /readyz answers, say where
5. a signal stops both; an API that ends by itself stops the rest; a worker is started again, more slowly each time
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from service.contract.settings import Settings

TICK_S: Final = 0.1
PORTS_TRIED: Final = 20
SETTLED_S: Final = 30.0  # a worker that ran this long is started again at once
MAX_QUICK_DEATHS: Final = 5
READY_ANYHOW_S: Final = 10.0  # then a service that still misses something is announced with what it misses
_PR_SET_PDEATHSIG: Final = 1

Say = Callable[[str], None]


class StartError(Exception):
    """The service cannot start here; the message says why and what to do."""


def bind(host: str, port: int, *, exactly: bool) -> socket.socket:
    """Bind and listen; where the port is taken and was not asked for `exactly`, on one of the next ones.

    Raises StartError naming the address.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        msg = f"the host {host!r} cannot be resolved: {error.strerror}"
        raise StartError(msg) from error
    choices = [port] if exactly or port == 0 else [*range(port, min(port + PORTS_TRIED, 65_535) + 1), 0]
    reason = ""
    for choice in choices:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address[0], choice))
            sock.listen(2048)  # only a listening socket keeps the port from the next `isthmus serve`
        except OSError as error:
            sock.close()
            reason = error.strerror or str(error)
        else:
            return sock
    msg = f"{host}:{port} cannot be bound: {reason}"
    raise StartError(msg)


def url_of(host: str, port: int) -> str:
    """Return the URL under which this machine reaches a bind."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104  # a lookup
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


@contextlib.contextmanager
def locked(data: Path) -> Generator[Path]:
    """Hold the data folder, and yield the file that tells others where the service is.

    Raises StartError if another service holds it.
    """
    data.mkdir(parents=True, exist_ok=True)
    path = data / "serve.json"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            where = file.read().strip() or "starting"
            msg = f"{data} is served already ({where}); choose another folder with --data"
            raise StartError(msg) from error
        file.truncate(0)
        try:
            yield path
        finally:
            file.truncate(0)


def _environment(settings: Settings, port: int) -> dict[str, str]:
    """Return the environment of both children: this process's own, with what the command line changed."""
    return os.environ | {
        "ISTHMUS_DATA": str(settings.data.resolve()),
        "ISTHMUS_HOST": settings.host,
        "ISTHMUS_PORT": str(port),
        "ISTHMUS_INSECURE": str(settings.insecure).lower(),
        "ISTHMUS_LANES": settings.lanes,
    }


def _child(
    arguments: list[str], environment: dict[str, str], pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603  # our own modules
        [sys.executable, "-P", "-m", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=die_with(os.getpid()),  # noqa: PLW1509  # this process has one thread
    )


def die_with(parent: int) -> Callable[[], None] | None:
    """Return what makes a new child end when its parent is killed; nothing where the system cannot do it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it went before we asked
            os._exit(1)

    return arrange


class _Stop:
    """How often the outside asked for the end: once is politely, twice is now."""

    def __init__(self) -> None:
        self.asked = 0
        self._before = [
            (number, signal.signal(number, self._ask)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: object) -> None:
        self.asked += 1


def run(settings: Settings, *, prepare: Callable[[], bool], say: Say) -> int:
    """Serve until a signal comes and return the exit code: 0 after a signal, 1 if a child failed.

    `prepare` runs once the folder is ours and before anything starts, and tells whether callers need a key. Raises
    StartError if the folder or the port cannot be had.
    """
    with _Stop() as stop, locked(settings.data) as place:
        needs_key = prepare()
        sock = bind(settings.host, settings.port, exactly="port" in settings.model_fields_set)
        port = int(sock.getsockname()[1])
        if settings.port not in {0, port}:
            say(f"port {settings.port} is taken, using {port}")
        with sock:  # the API gets its own; ours would keep the port open after it
            watch = _Watch(settings, sock, place, say, needs_key=needs_key)
        try:
            while not stop.asked:
                if not watch.tick():
                    return 1
                time.sleep(TICK_S)
            say("stopping")
        finally:
            watch.end(stop)
    return 0


class _Watch:
    """The two children while they run."""

    def __init__(self, settings: Settings, sock: socket.socket, place: Path, say: Say, *, needs_key: bool) -> None:
        port = int(sock.getsockname()[1])
        self._settings = settings
        self._url = url_of(settings.host, port)
        self._place = place
        self._say = say
        self._needs_key = needs_key
        self._environment = _environment(settings, port)
        serving = ["service.cli", "api", "--fd", str(sock.fileno())]
        self._api = _child(serving, self._environment, pass_fds=(sock.fileno(),))
        self._worker: subprocess.Popen[bytes] | None = _child(["worker"], self._environment)
        self._announced = False
        self._began = self._worker_began = time.monotonic()
        self._restart_at = 0.0
        self._quick_deaths = 0

    def tick(self) -> bool:
        """Look at both children once; false when there is no going on."""
        if not self._announced:
            self._announce()
        if self._api.poll() is not None:
            self._say(f"the API ended by itself ({_ending(self._api.returncode)}); its last lines say why")
            return False
        return self._keep_worker()

    def _announce(self) -> None:
        answer = readiness(self._url)
        waited = time.monotonic() - self._began
        if answer is None or (answer.get("status") != "ok" and waited < READY_ANYHOW_S):
            return
        self._announced = True
        if missing := answer.get("missing"):
            self._say(f"still missing: {json.dumps(missing)}")
        self._say(f"Isthmus is ready at {self._url} after {waited:.1f} s")
        if self._settings.docs:
            self._say(f"  docs   {self._url}/docs")
        self._say(f"  data   {self._settings.data.resolve()}")
        self._say(f"  keys   {self._keys()}")
        self._say(f"  demo   isthmus demo --url {self._url}")
        self._say("  stop   Ctrl-C")
        self._place.write_text(json.dumps({"url": self._url, "pid": os.getpid()}) + "\n")

    def _keys(self) -> str:
        if self._needs_key:
            return "needed, as `authorization: Bearer isk_...`; `isthmus keys create NAME` makes one"
        return "none: anybody may call" if self._settings.insecure else "none yet: only this machine may call"

    def _keep_worker(self) -> bool:
        now = time.monotonic()
        if self._worker is None:
            if now >= self._restart_at:
                self._worker, self._worker_began = _child(["worker"], self._environment), now
            return True
        if self._worker.poll() is None:
            return True
        self._quick_deaths = 0 if now - self._worker_began > SETTLED_S else self._quick_deaths + 1
        if self._quick_deaths >= MAX_QUICK_DEATHS:
            self._say(f"the worker ended {self._quick_deaths} times in a row; giving up, its last lines say why")
            return False
        pause_s = 2**self._quick_deaths - 1
        ending = _ending(self._worker.returncode)
        self._say(f"the worker ended by itself ({ending}); starting it again" + (f" in {pause_s} s" if pause_s else ""))
        self._worker, self._restart_at = None, now + pause_s
        return True

    def end(self, stop: _Stop) -> None:
        """Ask both to end, give them the settings' grace, then kill what is left; a second signal shortens it."""
        children = [child for child in (self._api, self._worker) if child is not None]
        for child in children:
            child.terminate()
        deadline = time.monotonic() + self._settings.shutdown_grace_s + 5.0
        while any(child.poll() is None for child in children):
            if time.monotonic() > deadline or stop.asked > 1:
                for child in children:
                    child.kill()
                break
            time.sleep(TICK_S / 2)
        for child in children:
            child.wait()


def readiness(url: str) -> dict[str, object] | None:
    """Return what /readyz answers, or None while nothing useful does.

    Raises ValueError for what is not an http:// or https:// URL.
    """
    place = urlsplit(url)
    if place.scheme not in {"http", "https"} or not place.hostname:
        msg = f"{url!r} is not an http:// or https:// URL"
        raise ValueError(msg)
    kind = http.client.HTTPConnection if place.scheme == "http" else http.client.HTTPSConnection
    connection = kind(place.hostname, place.port, timeout=1.0)
    try:
        connection.request("GET", f"{place.path.rstrip('/')}/readyz")
        response = connection.getresponse()
        body = response.read()
        return json.loads(body) if response.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
