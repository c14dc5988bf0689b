"""`isthmus experiments`: the claims of papers, checked here or by a service, and a table of what came out.

The exit code says what became of it: 0 every bar was reached, 1 one was missed, 2 it could not be done, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Final, Never, get_args

import httpx
from pydantic import ValidationError

from service.client.api import Api, ApiError
from service.client.local import Work, run_here
from service.client.progress import Advance, progress
from service.client.text import as_json, plain, span, table
from service.contract.artifacts import open_store
from service.contract.experiments import EXPERIMENTS, PAPERS, Experiment, ExperimentName, ExperimentReport, Finding
from service.contract.jobs import ExperimentArgs, ExperimentResult

TIMEOUT_S: Final = 30.0
PATIENCE_S: Final = 600.0
MAX_AT_ONCE: Final = 4  # each takes some 300 MiB
REPORT: Final = "report.json"
PAGE: Final = "report.html"
COLUMNS: Final = ("EXPERIMENT", "FIGURE", "EXPECTED", "MEASURED", "VERDICT")


def run(options: argparse.Namespace, key: str | None) -> int:
    """Do what `isthmus experiments` was asked to and return the exit code."""
    try:
        if options.action == "list":
            return _list(options)
        chosen = _chosen(options)
        with _interruptible():
            return _run(options, chosen, key)
    except ApiError as error:
        more = "; the environment variable ISTHMUS_API_KEY takes a key" if error.status == 401 else ""
        return _refuse(f"{error.reason}{more}")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        return _refuse(f"{options.url!r} is not an http:// or https:// URL: {error}")
    except httpx.RequestError as error:
        return _refuse(f"{options.url} does not answer ({error or type(error).__name__})")
    except OSError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running", file=sys.stderr)
        return 130


def _refuse(reason: str) -> int:
    print("isthmus: " + "\n".join(plain(line) for line in reason.splitlines()), file=sys.stderr)
    return 2


def _list(options: argparse.Namespace) -> int:
    wanted = [each for each in EXPERIMENTS.values() if options.paper in {None, each.paper}]
    if options.json:
        print(as_json([each.model_dump(mode="json") for each in wanted]))
        return 0
    for paper, title in PAPERS.items():
        if options.paper not in {None, paper}:
            continue
        print(f"{paper}: {title}")
        for each in wanted:
            if each.paper == paper:
                print(f"\n  {each.name}  (about {span(each.duration_s)}, {each.seeds} seeds; {each.place})")
                print(f"    {each.claim}")
    return 0


def _chosen(options: argparse.Namespace) -> list[Experiment]:
    """Return what is to be run, in the order of the list.

    Raises ApiError for names that nothing has, or that do not go together.
    """
    names: list[str] = options.names
    if unknown := [name for name in names if name not in get_args(ExperimentName)]:
        msg = f"there is no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}"
        raise ApiError(msg)
    if bool(names) == bool(options.all):
        msg = f"name experiments or say --all, and not both; there are {', '.join(EXPERIMENTS)}"
        raise ApiError(msg)
    found = [each for each in EXPERIMENTS.values() if options.all or each.name in names]
    if other := [each.name for each in found if names and options.paper not in {None, each.paper}]:
        msg = f"{other[0]} is not of {options.paper}"
        raise ApiError(msg)
    return [each for each in found if options.paper in {None, each.paper}]


def _run(options: argparse.Namespace, chosen: Sequence[Experiment], key: str | None) -> int:
    work = _work(options, chosen)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    reports: list[ExperimentReport] = []
    for files in _here(work, options.at_once or _cores()) if options.url is None else _there(work, options.url, key):
        report = ExperimentReport.model_validate_json(files[REPORT])
        folder = out / report.experiment
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        met = sum(each.verdict == "holds" for each in report.findings)
        asserted = sum(each.verdict != "reported" for each in report.findings)
        print(
            f"  {report.experiment}: {report.verdict}"
            + (f", {met} of {asserted} bars reached" if asserted else "")
            + f", {report.seconds:.0f} s ({report.cpu_seconds:.0f} s of CPU): {(folder / PAGE).resolve().as_uri()}",
            flush=True,
        )
        reports.append(report)
    order = [each.name for each in chosen]  # they end in another
    _show(sorted(reports, key=lambda report: order.index(report.experiment)))
    return 1 if any(each.verdict == "fails" for each in reports) else 0


def _work(options: argparse.Namespace, chosen: Sequence[Experiment]) -> list[ExperimentArgs]:
    try:
        return [
            ExperimentArgs(experiment=each.name, seeds=options.seeds, seed=options.seed, quick=options.quick)
            for each in chosen
        ]
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        msg = f"--{problem['loc'][0]}: {problem['msg']}"
        raise ApiError(msg) from error


def _here(work: Sequence[ExperimentArgs], at_once: int) -> Generator[dict[str, bytes]]:
    """Run them without a service, and yield the files of each report by name, as it is done."""
    seconds: dict[str, float] = {args.experiment: EXPERIMENTS[args.experiment].duration_s for args in work}
    shares = dict.fromkeys(seconds, 0.0)
    with tempfile.TemporaryDirectory(prefix="isthmus-experiments-") as place, progress("experiments") as advance:
        folder = Path(place)

        def tell(name: str, done: int, total: int) -> None:
            shares[name] = done / total if total else 0.0
            at_work = ", ".join(f"{each} {share:.0%}" for each, share in shares.items() if 0 < share < 1)
            weighed = sum(shares[each] * seconds[each] for each in shares)
            advance(round(100 * weighed / sum(seconds.values())), 100, f"% {at_work}")

        jobs = [Work(args.experiment, args) for args in work]
        for _, found in run_here(jobs, folder, at_once, tell):
            store = open_store(str(folder / "store"))
            artifact = ExperimentResult.model_validate(found).artifact
            yield {each: store.read(artifact, each) for each in store.manifest(artifact).files}


def _cores() -> int:
    return min(MAX_AT_ONCE, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def _there(work: Iterable[ExperimentArgs], url: str, key: str | None) -> Generator[dict[str, bytes]]:
    """Submit all to a service, follow them, and yield the files of each report by name. What is left is cancelled."""
    with Api(url, key=key, timeout_s=TIMEOUT_S) as api:
        jobs: list[tuple[str, str]] = []
        try:
            for args in work:
                job = str(api.post("/v1/jobs", args.model_dump(mode="json"))["id"])
                jobs.append((args.experiment, job))  # at once, so that an interruption cancels it
            while jobs:
                name, job = jobs[0]
                with progress(name) as advance:
                    _follow(api, job, advance)
                jobs.pop(0)
                listed = api.get(f"/v1/jobs/{job}/files")["data"]
                yield {each["id"]: api.download(f"/v1/jobs/{job}/files/{each['id']}") for each in listed}
        finally:
            for _, job in jobs:
                with contextlib.suppress(ApiError, httpx.RequestError):
                    api.post(f"/v1/jobs/{job}/cancel")


def _follow(api: Api, job: str, advance: Advance) -> None:
    for event in api.events(job, patience_s=PATIENCE_S):
        match event.kind:
            case "progress":
                left = f", {span(event.data['eta_s'])} left" if event.data["eta_s"] else ""
                advance(event.data["done"], event.data["total"] or 0, f"runs{left}")
            case "done" if event.data["status"] != "succeeded":
                reason = f": {event.data['error']['message']}" if event.data["error"] else ""
                msg = f"{job} has {event.data['status']}{reason}"
                raise ApiError(msg)
            case _:
                pass


def _show(reports: Sequence[ExperimentReport]) -> None:
    """Print what each claim was judged by."""
    print()
    for report in reports:
        print(f"{report.experiment}: {report.claim}")
    print()
    rows = [
        (report.experiment, each.name, _expected(each), _measured(each), each.verdict)
        for report in reports
        for each in report.findings
        if each.bar is not None
    ]
    print("\n".join(table([COLUMNS, *rows], width=None)))
    if any(report.quick for report in reports):
        print("\na quick run: too little work for the figures to mean anything, so nothing is asserted")


def _expected(each: Finding) -> str:
    assert each.bar is not None
    return f"{each.bar.relation} {each.bar.bound:g}{' (mean)' if each.bar.over == 'mean' else ''}"


def _measured(each: Finding) -> str:
    low, high = min(each.per_seed), max(each.per_seed)
    return f"{each.mean:.3g}" + (f" ({low:.3g} to {high:.3g})" if high > low else "")


@contextlib.contextmanager
def _interruptible() -> Generator[None]:
    """Let SIGTERM end this as Ctrl-C does, and Ctrl-C where the shell started us without it: what runs is ended."""

    def interrupt(_number: int, _frame: object) -> Never:
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, interrupt)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
