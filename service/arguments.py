"""What the command line takes. Nothing but argparse is needed to explain it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal


def parser() -> argparse.ArgumentParser:
    """Return the parser of `isthmus`."""
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
    tenants = commands.add_parser("tenants", help="show and set what a tenant may take of the queue")
    for command in (serve, api, worker, migrate, *_add_keys(keys), *_add_tenants(tenants)):
        command.add_argument("--data", type=Path, help="folder of the database, the store and sockets (isthmus-data)")

    _add_jobs(commands.add_parser("jobs", help="list, show, follow, cancel and retry jobs"))
    _add_experiments(commands.add_parser("experiments", help="check what papers claim, on data whose truth is known"))
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
    for action in (create, listing, revoke):
        action.add_argument("--tenant", help="whose data and jobs it reaches (default)")
    return [create, listing, revoke]


def _add_tenants(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list every tenant's share of each lane, and what it has there now")
    share = actions.add_parser("set", help="set a tenant's share of a lane; what is not given stays")
    share.add_argument("tenant")
    share.add_argument("--lane", choices=("train", "bulk"), required=True)
    share.add_argument("--weight", type=int, help="its part against the others' (1)")
    share.add_argument("--max-running", type=_cap, metavar="N", help="jobs at once; `none` lifts the cap")
    share.add_argument("--max-queued", type=_cap, metavar="N", help="jobs waiting, more are refused; `none` lifts it")
    return [listing, share]


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 0, or 1 if a job failed or was cancelled, 2 if that is not known, 130 after Ctrl-C."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list jobs, newest first")
    listing.add_argument("--status", help="queued, running, cancelling, succeeded, failed or cancelled")
    listing.add_argument("--kind", help="ingest, train, embed, evaluate or experiment")
    listing.add_argument("--limit", type=_count, default=20, metavar="N", help="at most so many (%(default)s)")
    show = actions.add_parser("show", help="show everything about a job")
    follow = actions.add_parser("follow", help="follow a job to its end; Ctrl-C leaves it running")
    cancel = actions.add_parser("cancel", help="cancel a waiting job, ask a running one to stop")
    cancel.add_argument("--wait", action="store_true", help="until it has stopped")
    retry = actions.add_parser("retry", help="queue a failed or cancelled job again")
    retry.add_argument("--follow", action="store_true", help="follow it to its end")
    for action in (show, follow):
        action.add_argument("id", metavar="ID", help="the job's id, or `latest` for the newest job")
    for action in (cancel, retry):
        action.add_argument("id", metavar="ID", help="the job's id, as `list` shows it")
    for action in (follow, cancel, retry):
        action.add_argument(
            "--patience",
            type=_seconds,
            default=600.0,
            metavar="S",
            help="seconds to wait for a service that went away (%(default).0f)",
        )
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="write what the API says, for programs")
    for action in (listing, show, follow, cancel, retry):
        action.add_argument(
            "--url", help="of the API (http://127.0.0.1:<ISTHMUS_PORT>); ISTHMUS_API_KEY holds a key if it needs one"
        )


def _add_experiments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 0, or 1 if a bar was missed, 2 if it could not be done, 130 after Ctrl-C."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the experiments: what is claimed, where, how long it takes")
    listing.add_argument("--json", action="store_true", help="for programs")
    run = actions.add_parser("run", help="run experiments, write their reports, compare with what is expected")
    run.add_argument("names", nargs="*", metavar="NAME", help="as `list` shows them")
    run.add_argument("--all", action="store_true", help="all of them, or all of a paper")
    run.add_argument("--seeds", type=_count, metavar="N", help="repetitions (each experiment's own number)")
    run.add_argument("--seed", type=int, default=0, help="of the first repetition (%(default)s)")
    run.add_argument("--quick", action="store_true", help="a tenth of the work, to see it run; asserts nothing")
    run.add_argument("--at-once", type=_count, metavar="N", help="experiments at a time here (the cores, at most 4)")
    run.add_argument(
        "--out", type=Path, default=Path("isthmus-experiments"), help="folder for the reports (%(default)s)"
    )
    run.add_argument("--url", help="of a service that runs them as jobs; without, they run here and need no service")
    for action in (listing, run):
        action.add_argument("--paper", choices=("clip-transfer", "sufficiency"), help="only what this paper claims")


def _cap(text: str) -> int | Literal["none"]:
    return "none" if text == "none" else int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        msg = "a whole number from 1 on is wanted"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        msg = "a number of seconds is wanted"
        raise argparse.ArgumentTypeError(msg)
    return seconds
