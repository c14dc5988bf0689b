"""The command line: `isthmus serve | api | worker | migrate | keys | demo | health | openapi`.

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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import ArgumentError, OperationalError, ProgrammingError

from service.contract.errors import IsthmusError
from service.contract.settings import Settings
from service.serve import readiness, url_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="isthmus",
        description="Train contrastive models on pairs of modalities, serve them, and compose what was never paired.",
        epilog="Every setting is also an environment variable, ISTHMUS_<NAME>.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start the API and a worker; Ctrl-C stops both")
    api = commands.add_parser("api", help="start the API alone")
    api.add_argument("--fd", type=int, help=argparse.SUPPRESS)  # a listening socket made by `isthmus serve`
    for command in (serve, api):
        command.add_argument("--host", help="address to bind (127.0.0.1)")
        command.add_argument("--port", type=int, help="port to bind; 0: any free one (8000, or the next free one)")
        command.add_argument(
            "--insecure", action="store_true", default=None, help="serve without keys on a bind that is not loopback"
        )
    worker = commands.add_parser("worker", help="start a worker alone")
    for command in (serve, worker):
        command.add_argument("--lanes", help="what the worker does (train,bulk,serve)")
    migrate = commands.add_parser("migrate", help="create the database or bring it up to date")
    keys = commands.add_parser("keys", help="create, list and revoke API keys")
    for command in (serve, api, worker, migrate, *_add_keys(keys)):
        command.add_argument("--data", type=Path, help="folder of the database, the store and sockets (isthmus-data)")

    demo = commands.add_parser("demo", help="learn digits seen and heard, then answer what nobody taught")
    demo.add_argument("--data", dest="tars", type=Path, help="a folder of WebDataset tars to learn from instead")
    demo.add_argument(
        "--only-data", type=Path, metavar="DIR", help="write the demo's data as tars into a folder; no more"
    )
    demo.add_argument("--url", help="ask a service that runs already, with the key in ISTHMUS_API_KEY if it needs one")
    demo.add_argument("--out", type=Path, default=Path(), help="folder for the page with the answers (here)")
    demo.add_argument("--keep", action="store_true", help="keep the service's data in ./isthmus-demo")
    demo.add_argument("--seed", type=int, default=0, help="of the data's captions and noise, and of the training")
    health = commands.add_parser("health", help="say whether a service is ready, and exit with 0 if it is")
    health.add_argument("--url", help="of an API or a worker's inference (http://127.0.0.1:<ISTHMUS_PORT>)")
    commands.add_parser("openapi", help="print the API's description as JSON")
    return parser


def _add_keys(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="create a key and print it, once")
    create.add_argument("name", help="what the key is for")
    create.add_argument("--scopes", default="read,infer,write", help="of read, infer, write, admin (%(default)s)")
    create.add_argument("--requests-per-minute", type=int, help="its rate limit (none)")
    create.add_argument("--expires-days", type=float, help="days until it stops working (never)")
    listing = actions.add_parser("list", help="list the keys, without their secrets")
    revoke = actions.add_parser("revoke", help="make a key stop working")
    revoke.add_argument("id", help="the key's id, as `list` shows it")
    return [create, listing, revoke]


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
    from service.edge.connection import BoundedProtocol
    from service.serve import StartError, bind

    try:
        sock = socket.socket(fileno=fd) if fd is not None else bind(settings.host, settings.port, exactly=True)
    except StartError as error:
        return _refuse(str(error))
    app = create_app(settings)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # uvicorn waits for open connections before it ends the application: event streams must be told first.
            if self.started:
                app.state.service.draining = True
                app.state.service.followers.stop()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
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
    from service.contract.dialects import open_engine
    from service.contract.tables import api_key, owned
    from service.keys import DEFAULT_TENANT, CreateKey, create_key, revoke_key

    engine = open_engine(settings.resolved_database_url(), pool_size=1)
    try:
        match options.action:
            case "create":
                expires_at = None
                if options.expires_days is not None:
                    expires_at = datetime.now(UTC) + timedelta(days=options.expires_days)
                wanted = CreateKey(
                    name=options.name,
                    scopes=[scope.strip() for scope in options.scopes.split(",")],
                    requests_per_minute=options.requests_per_minute,
                    expires_at=expires_at,
                )
                with engine.begin() as conn:
                    key_id, key = create_key(conn, DEFAULT_TENANT, wanted)
                print(f"{key_id} {options.name!r}; the key, which is never shown again:", file=sys.stderr)
                _say(key)
            case "list":
                with engine.connect() as conn:
                    rows = conn.execute(owned(api_key, DEFAULT_TENANT).order_by(api_key.c.created_at)).all()
                for row in rows:
                    state = _state_of(row.revoked_at, row.expires_at)
                    _say(f"{row.id}  {state:16}  {','.join(row.scopes):24}  {row.name}")
            case _:
                with engine.begin() as conn:
                    if not revoke_key(conn, DEFAULT_TENANT, options.id):
                        return _refuse(f"there is no key {options.id}")
                _say(f"revoked {options.id}")
    except ValidationError as error:
        return _refuse("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors()))
    except (OperationalError, ProgrammingError) as error:
        return _refuse(f"the database cannot be used; has `isthmus migrate` been run? ({error.orig})")
    finally:
        engine.dispose()
    return 0


def _state_of(revoked_at: datetime | None, expires_at: datetime | None) -> str:
    if revoked_at is not None:
        return "revoked"
    if expires_at is None:
        return "valid"
    return "expired" if expires_at <= datetime.now(UTC) else f"until {expires_at:%Y-%m-%d}"


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
