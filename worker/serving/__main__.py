"""`python -P -m worker.serving`: the inference process, a child of the supervisor.

Control lines come on standard input, one JSON object each: {"threads": n}, {"memory": fraction}, {"unload": artifact}.
End of file there means that the supervisor is gone: exit at once, whatever runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Final

import torch
import uvicorn

from service.contract import logs
from service.contract.artifacts import open_store
from service.contract.settings import Settings
from worker.learning.device import choose_device
from worker.lifeline import die_with_parent
from worker.serving.batcher import Batcher
from worker.serving.bridge import Bridges
from worker.serving.endpoint import BadEndpoint, listen
from worker.serving.operations import Parts
from worker.serving.residency import Residency
from worker.serving.server import create_app
from worker.serving.sets import Sets

log = logging.getLogger("worker.serving")

KEEP_ALIVE_S: Final = 120  # longer than any client keeps an idle connection, so none is closed as it is being used
MAX_WAITING: Final = 1 << 16


def main() -> int:
    """Serve until the supervisor goes away or a signal asks to stop."""
    arguments = _parse()
    die_with_parent()
    logs.configure()
    settings = Settings()
    token = os.environ.get(arguments.token_env) or None if arguments.token_env else None
    device = choose_device(arguments.device)
    torch.set_num_interop_threads(1)
    batcher = Batcher(max_tokens=settings.serve_batch_tokens, max_waiting=MAX_WAITING, fatal=(torch.AcceleratorError,))
    batcher.chore(lambda: torch.set_num_threads(arguments.threads))
    store = open_store(arguments.store)
    residency = Residency(store, device=device, max_bytes=settings.model_cache_bytes)
    parts = Parts(residency, batcher, Bridges(residency, batcher, device=device), Sets(store), device)
    app = create_app(parts, timeout_s=settings.request_timeout_s, token=token)
    config = uvicorn.Config(
        app, http="httptools", log_config=None, access_log=False, timeout_keep_alive=KEEP_ALIVE_S, lifespan="on"
    )
    try:
        with (
            listen(arguments.endpoint, token) as sock,
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


if __name__ == "__main__":
    sys.exit(main())
