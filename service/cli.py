"""The command line: `isthmus serve | api | worker | migrate | keys | tenants | jobs | experiments | demo | ...`.

Every command imports what it needs when it runs, so that `isthmus --help` is instant and no command loads another's
dependencies. The worker is always a process of its own and never imported.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import ArgumentError, OperationalError

from service.arguments import parser
from service.contract.errors import IsthmusError
from service.contract.settings import Settings
from service.serve import readiness, url_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = parser().parse_args(arguments)
    try:
        settings = _settings(options)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            print(f"isthmus: setting {'.'.join(map(str, problem['loc']))}: {problem['msg']}", file=sys.stderr)
        return 2
    try:
        return _run(options, settings)
    except IsthmusError as error:
        return _refuse(error.message)
    except OperationalError as error:
        return _refuse(f"the database cannot be used: {str(error.orig).splitlines()[0]}")
    except ArgumentError as error:
        return _refuse(f"ISTHMUS_DATABASE_URL: {error}")


def _settings(options: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {}
    for name in ("host", "port", "insecure", "lanes", "data"):
        value = getattr(options, name, None)
        if value is not None:
            given[name] = value
    return Settings(**given)


def _run(options: argparse.Namespace, settings: Settings) -> int:
    match options.command:
        case "serve":
            return _serve(settings)
        case "api":
            return _api(settings, options.fd)
        case "worker":
            return _worker(settings)
        case "migrate":
            return _migrate(settings)
        case "keys":
            return _keys(options, settings)
        case "tenants":
            return _tenants(options, settings)
        case "jobs":
            return _jobs(options, settings)
        case "experiments":
            return _experiments(options, settings)
        case "openapi":
            return _openapi(settings)
        case "health":
            return _health(options.url or url_of(settings.host, settings.port))
        case _:
            return _demo(options)


def _say(line: str) -> None:
    print(line, flush=True)


def _serve(settings: Settings) -> int:
    from service.migrate import upgrade
    from service.serve import StartError, run

    def prepare() -> bool:
        upgrade(settings.resolved_database_url())
        return _needs_key(settings)

    try:
        settings.lane_set()
    except ValueError as error:
        return _refuse(str(error))
    try:
        return run(settings, prepare=prepare, say=_say)
    except StartError as error:
        return _refuse(str(error))


def _needs_key(settings: Settings) -> bool:
    """Tell whether callers need a key.

    Raises StartError for a bind that others can reach while there is none.
    """
    from service.contract.dialects import open_engine
    from service.keys import any_key, check_bind
    from service.serve import StartError

    engine = open_engine(settings.resolved_database_url(), pool_size=1)
    try:
        with engine.connect() as conn:
            has_key = settings.api_key is not None or any_key(conn)  # the API makes the one of the settings
        check_bind(settings, has_key=has_key)
    except RuntimeError as error:
        raise StartError(str(error)) from error
    finally:
        engine.dispose()
    return has_key


def _api(settings: Settings, fd: int | None) -> int:
    import socket

    import uvicorn

    from service.app import create_app
    from service.contract import logs
    from service.edge.connection import BoundedProtocol
    from service.serve import StartError, bind

    try:
        sock = socket.socket(fileno=fd) if fd is not None else bind(settings.host, settings.port, exactly=True)
    except StartError as error:
        return _refuse(str(error))
    logs.configure()
    app = create_app(settings)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # uvicorn waits for open connections before it ends the application: event streams must be told first.
            if self.started:
                app.state.service.draining = True
                app.state.service.followers.stop()
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # uvicorn hurries for a second SIGINT only.
            self.force_exit = self.should_exit
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
    )
    # uvicorn raises the signal that ended it once more; this turns it into a clean exit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)
    server = Server(config)
    server.run(sockets=[sock])
    return 0 if server.started else 1


def _exit(_number: int, _frame: object) -> None:
    sys.exit(0)


def _refuse(reason: str) -> int:
    print(f"isthmus: {reason}", file=sys.stderr)
    return 1


def _worker(settings: Settings) -> int:
    environment = os.environ | {"ISTHMUS_DATA": str(settings.data.resolve()), "ISTHMUS_LANES": settings.lanes}
    os.execve(sys.executable, [sys.executable, "-P", "-m", "worker"], environment)  # noqa: S606  # becomes the worker


def _migrate(settings: Settings) -> int:
    from service.migrate import upgrade

    upgrade(settings.resolved_database_url())
    _say("the database is up to date")
    return 0


def _openapi(settings: Settings) -> int:
    from service.app import create_app

    _say(json.dumps(create_app(settings).openapi(), indent=2, ensure_ascii=False))
    return 0


def _keys(options: argparse.Namespace, settings: Settings) -> int:
    from service import key_commands

    return key_commands.run(options, settings)


def _tenants(options: argparse.Namespace, settings: Settings) -> int:
    from service import tenant_commands

    return tenant_commands.run(options, settings)


def _jobs(options: argparse.Namespace, settings: Settings) -> int:
    from service.client import jobs

    return jobs.run(options, options.url or url_of(settings.host, settings.port), _key(settings))


def _experiments(options: argparse.Namespace, settings: Settings) -> int:
    from service.client import experiments

    return experiments.run(options, _key(settings))


def _key(settings: Settings) -> str | None:
    return settings.api_key.get_secret_value() if settings.api_key is not None else None


def _health(url: str) -> int:
    try:
        answer = readiness(url)
    except ValueError as error:
        return _refuse(str(error))
    print(json.dumps(answer) if answer is not None else f"{url} is not ready")
    return 0 if answer is not None else 1


def _demo(options: argparse.Namespace) -> int:
    try:
        from service.demo.tour import make_data, run
    except ModuleNotFoundError as error:
        return _refuse(f"the demo needs {error.name}: pip install 'isthmus[all]'")
    if options.only_data:
        return make_data(options.only_data, seed=options.seed)
    return run(tars=options.tars, out=options.out, keep=options.keep, seed=options.seed, url=options.url)


if __name__ == "__main__":
    sys.exit(main())
