"""`python -P -m worker.serving`: the inference process, a child of the supervisor.

Control lines come on standard input, one JSON object each: {"threads": n}, {"memory": fraction}, {"unload": artifact}.
End of file there means that the supervisor is gone: exit at once, whatever runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final, cast

import torch
import uvicorn

from service.contract.artifacts import open_store
from service.contract.settings import Settings
from worker.learning.device import choose_device
from worker.serving.batcher import Batcher
from worker.serving.bridge import Bridges
from worker.serving.operations import Parts
from worker.serving.residency import Residency
from worker.serving.server import create_app

log = logging.getLogger("worker.serving")

KEEP_ALIVE_S: Final = 120  # longer than any client keeps an idle connection, so none is closed as it is being used
BACKLOG: Final = 2048
MAX_WAITING: Final = 1 << 16
UNIX: Final = "unix:"


class BadEndpoint(Exception):
    """Say why an endpoint cannot be served."""


def main() -> int:
    """Serve until the supervisor goes away or a signal asks to stop."""
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    settings = Settings()
    token = os.environ.get(arguments.token_env) or None if arguments.token_env else None
    device = choose_device(arguments.device)
    torch.set_num_interop_threads(1)
    batcher = Batcher(max_tokens=settings.serve_batch_tokens, max_waiting=MAX_WAITING, fatal=(torch.AcceleratorError,))
    batcher.chore(lambda: torch.set_num_threads(arguments.threads))
    residency = Residency(open_store(arguments.store), device=device, max_bytes=settings.model_cache_bytes)
    parts = Parts(residency, batcher, Bridges(residency, batcher, device=device), device)
    app = create_app(parts, timeout_s=settings.request_timeout_s, token=token)
    config = uvicorn.Config(
        app, http="httptools", log_config=None, access_log=False, timeout_keep_alive=KEEP_ALIVE_S, lifespan="on"
    )
    try:
        with (
            _listen(arguments.endpoint, token) as sock,
            asyncio.Runner(loop_factory=config.get_loop_factory()) as runner,
        ):
            runner.run(_serve(uvicorn.Server(config), sock, parts))
    except BadEndpoint as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -P -m worker.serving", description="Serve models to the API.")
    parser.add_argument("--endpoint", required=True, help="unix:/path or host:port")
    parser.add_argument("--store", required=True, help="URL of the store")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="threads of arithmetic on the CPU")
    parser.add_argument("--token-env", help="environment variable that holds the token which every call must bring")
    return parser.parse_args()


async def _serve(server: uvicorn.Server, sock: socket.socket, parts: Parts) -> None:
    loop = asyncio.get_running_loop()
    threading.Thread(target=_obey, args=(loop, parts), name="control", daemon=True).start()
    await server.serve(sockets=[sock])


def _obey(loop: asyncio.AbstractEventLoop, parts: Parts) -> None:
    for line in sys.stdin.buffer:
        try:
            match json.loads(line):
                case {"threads": int(threads)}:
                    parts.batcher.chore(_setting_threads(threads))
                case {"memory": int() | float() as fraction}:
                    parts.batcher.chore(_setting_memory(float(fraction), parts.device))
                case {"unload": str(artifact)}:
                    loop.call_soon_threadsafe(parts.residency.unload, artifact)
                case other:
                    log.warning("unknown control line: %.200r", other)
        except ValueError:
            log.warning("a control line is not JSON")
    os._exit(0)


def _setting_threads(threads: int) -> Callable[[], None]:
    return lambda: torch.set_num_threads(max(1, threads))


def _setting_memory(fraction: float, device: torch.device) -> Callable[[], None]:
    def apply() -> None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, fraction)), device)

    return apply


@contextlib.contextmanager
def _listen(endpoint: str, token: str | None) -> Generator[socket.socket]:
    if endpoint.startswith(UNIX):
        with _listen_unix(Path(endpoint.removeprefix(UNIX))) as sock:
            yield sock
        return
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal():
        msg = f"{endpoint!r} is neither unix:/path nor host:port"
        raise BadEndpoint(msg)
    if token is None and not _is_loopback(host):
        msg = f"{host} can be reached from other machines: set ISTHMUS_WORKER_TOKEN, or listen on 127.0.0.1"
        raise BadEndpoint(msg)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(cast("Any", address))
            sock.listen(BACKLOG)
            yield sock
    except OSError as error:
        msg = f"{endpoint} cannot be bound: {error.strerror}"
        raise BadEndpoint(msg) from error


@contextlib.contextmanager
def _listen_unix(path: Path) -> Generator[socket.socket]:
    # Bound here and not by uvicorn, which opens the socket's mode to everybody.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        except OSError as error:
            msg = f"{path} cannot be bound: {error.strerror or error}"
            raise BadEndpoint(msg) from error
        finally:
            os.umask(mask)
        sock.listen(BACKLOG)
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        msg = f"{path} is there already, and is no socket"
        raise BadEndpoint(msg)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # its owner was killed
            return
    msg = f"another process listens on {path}"
    raise BadEndpoint(msg)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
