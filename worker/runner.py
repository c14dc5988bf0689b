"""The child that does one job: `python -P -m worker.runner --channel FD --parent PID`.

It has no database. The job comes as the first line of standard input; later lines ask it to stop; end of file means
that the supervisor is gone, and it exits at once. What it has to say goes as JSON lines to the channel, and the last of
them says how the job ended.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, Final, Literal, NoReturn, assert_never, final

from service.contract import logs
from service.contract.artifacts import Store, open_store
from service.contract.errors import Cancelled, Interrupted, IsthmusError, Transient, Unavailable
from service.contract.jobs import (
    ComposeArgs,
    ComposeResult,
    EmbedArgs,
    EmbedResult,
    EvaluateArgs,
    EvaluateResult,
    ExperimentArgs,
    ExperimentResult,
    ImportModelArgs,
    ImportModelResult,
    IngestArgs,
    IngestResult,
    TrainArgs,
    TrainResult,
)
from worker.lifeline import die_with_parent
from worker.task import Task

Args = IngestArgs | TrainArgs | EmbedArgs | EvaluateArgs | ExperimentArgs | ImportModelArgs | ComposeArgs
Result = (
    IngestResult | TrainResult | EmbedResult | EvaluateResult | ExperimentResult | ImportModelResult | ComposeResult
)
_log = logging.getLogger("worker.runner")
_PROGRESS_S: Final = 0.2
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@final
class Channel:
    """The pipe to the supervisor; any thread may send."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        os.set_inheritable(descriptor, False)  # noqa: FBT003  # positional in the standard library

    def send(self, message: dict[str, Any]) -> None:
        """Write one message; without a supervisor to read it this process has no purpose, and ends."""
        line = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except BrokenPipeError:
                os._exit(1)


@final
class Context:
    """What a job's `run` works with: its inputs and its store, and the way to report."""

    def __init__(self, task: Task, channel: Channel) -> None:
        self.task = task
        self.job = task.job
        self.epoch = task.epoch
        self.attempt = task.attempt
        self.inputs = task.inputs
        """What the job reads, by the name its caller gave it: `artifact`, `digest`, `id`, `kind`."""
        self.resume = task.resume
        """Artifacts of the job's own checkpoints, newest first."""
        self.scratch = task.scratch
        """A folder of this attempt's own, removed afterwards."""
        self.import_folders = task.import_folders
        """Where on this machine checkpoints to be imported may lie."""
        self.device = task.device
        """`auto`, `cpu`, `cuda` or `cuda:N`, as configured."""
        self.rank = task.rank
        """Set if another runner started this one to train beside it; then nobody reads what it reports but failures."""
        self.store: Store = open_store(task.store_url)
        self._channel = channel
        self._asked: Literal["cancel", "interrupt"] | None = None
        self._progress_at = -_PROGRESS_S

    def progress(self, done: int, total: int | None, eta_s: float | None = None) -> None:
        """Say how much is done, in the kind's unit, and how many seconds are left; may be called for every item."""
        now = time.monotonic()
        if done == total or now - self._progress_at >= _PROGRESS_S:
            self._progress_at = now
            self._channel.send({"progress": {"done": done, "total": total, "eta_s": eta_s}})

    def metric(self, step: int, values: dict[str, float]) -> None:
        """Record figures at a step."""
        self._channel.send({"metric": {"step": step, "values": values}})

    def event(self, kind: str, detail: dict[str, Any]) -> None:
        """Add to the job's history."""
        self._channel.send({"event": {"type": kind, "detail": detail}})

    def checkpoint(self, step: int, artifact: str, digest: str, metrics: dict[str, float]) -> None:
        """Say that a checkpoint was published."""
        saved = {"step": step, "artifact": artifact, "digest": digest, "metrics": metrics}
        self._channel.send({"checkpoint": saved})

    def check(self) -> None:
        """Raise Cancelled or Interrupted if somebody asked for it; call it often."""
        if self._asked == "cancel":
            raise Cancelled
        if self._asked == "interrupt":
            raise Interrupted

    def give_up(self, error: IsthmusError) -> NoReturn:
        """End attempt and process with an error, from another thread: the job's own hangs where nothing reaches it."""
        permanent = not isinstance(error, Transient | Unavailable)
        self._channel.send(_failed(error, error.message, permanent=permanent, code=error.code))
        os._exit(0)

    def ask(self, what: Literal["cancel", "interrupt"]) -> None:
        """Let the next `check` raise; a cancel is not taken back by an interrupt."""
        if self._asked != "cancel":
            self._asked = what


def main() -> None:
    """Wait for a job, do it, say how it ended, exit."""
    parser = argparse.ArgumentParser(prog="python -P -m worker.runner", description="Do one job for a supervisor.")
    parser.add_argument("--channel", type=int, required=True, metavar="FD", help="where messages go")
    parser.add_argument("--parent", type=int, required=True, metavar="PID", help="the supervisor")
    parser.add_argument("--preload", action="store_true", help="import torch before the job is known")
    options = parser.parse_args()
    die_with_parent(options.parent)
    logs.configure()
    channel = Channel(options.channel)
    if options.preload:
        _load_torch()
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(0)
    task = Task.model_validate_json(line)
    logs.configure({"job": task.job, "attempt": task.attempt, "epoch": task.epoch, "request_id": task.request_id})
    _log.info("working", extra={"fields": {"kind": task.args.kind, "pid": os.getpid(), "device": task.device}})
    context = Context(task, channel)
    # Whoever stops a whole group of processes stops this one first: it has a checkpoint to write.
    signal.signal(signal.SIGTERM, lambda *_: context.ask("interrupt"))
    threading.Thread(target=_obey, args=(context,), name="control", daemon=True).start()
    sys.excepthook = _report_bug(channel)
    message = _attempt(task, context)
    channel.send(message)
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and libraries take their time to go


def _attempt(task: Task, context: Context) -> dict[str, Any]:
    try:
        if not isinstance(task.args, IngestArgs):
            _load_torch(task.threads)
        if task.rank is not None:
            _follow(task.args, context)
            return {"done": None}
        return {"done": _run(task.args, context).model_dump(mode="json")}
    except Cancelled:
        return {"cancelled": True}
    except Interrupted:
        return {"interrupted": True}
    except IsthmusError as error:
        return _failed(error, error.message, permanent=not isinstance(error, Transient | Unavailable), code=error.code)
    except (MemoryError, RuntimeError) as error:
        failure = _failure_of(error)
        if failure is None:
            raise
        return _failed(error, failure.message, permanent=False, code=failure.code)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        return _failed(error, f"no space is left: {error}", permanent=False, code="no_space")


def _run(args: Args, context: Context) -> Result:
    # Imported here: ingest never loads torch.
    match args:
        case IngestArgs():
            from worker.jobs import ingest  # noqa: PLC0415

            return ingest.run(args, context)
        case TrainArgs():
            from worker.jobs import train  # noqa: PLC0415

            return train.run(args, context)
        case EmbedArgs():
            from worker.jobs import embed  # noqa: PLC0415

            return embed.run(args, context)
        case EvaluateArgs():
            from worker.jobs import evaluate  # noqa: PLC0415

            return evaluate.run(args, context)
        case ExperimentArgs():
            from worker.jobs import experiment  # noqa: PLC0415

            return experiment.run(args, context)
        case ImportModelArgs():
            from worker.jobs import import_model  # noqa: PLC0415

            return import_model.run(args, context)
        case ComposeArgs():
            from worker.jobs import compose  # noqa: PLC0415

            return compose.run(args, context)
        case _:
            assert_never(args)


def _follow(args: Args, context: Context) -> None:
    from worker.jobs import train  # noqa: PLC0415

    assert isinstance(args, TrainArgs), "only trainings are shared"
    train.follow(args, context)


def _failure_of(error: MemoryError | RuntimeError) -> Transient | None:
    if "torch" not in sys.modules:  # ingest
        return Transient("out of memory", code="out_of_memory") if isinstance(error, MemoryError) else None
    from worker.learning.device import failure_of  # noqa: PLC0415

    return failure_of(error)


def _load_torch(num_threads: int | None = None) -> None:
    import torch  # noqa: PLC0415

    if num_threads is None:
        torch.set_num_interop_threads(1)
    else:
        torch.set_num_threads(num_threads)


def _obey(context: Context) -> None:
    for line in sys.stdin.buffer:
        try:
            message = json.loads(line)
        except ValueError:
            message = line  # cut off: the supervisor was killed as it wrote
        match message:
            case {"cancel": True}:
                context.ask("cancel")
            case {"interrupt": True}:
                context.ask("interrupt")
            case other:
                _log.warning("unknown control line: %.200r", other)
    os._exit(1)


def _failed(error: BaseException, message: str, *, permanent: bool, code: str | None) -> dict[str, Any]:
    return {"failed": {"type": type(error).__name__, "message": message, "code": code, "permanent": permanent}}


def _report_bug(channel: Channel) -> Any:
    def report(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        failed = _failed(error, f"{kind.__name__}: {error}", permanent=True, code=None)["failed"]
        failed["traceback"] = "".join(traceback.format_exception(kind, error, where))
        channel.send({"failed": failed})
        _log.error("a bug", exc_info=(kind, error, where))
        sys.stderr.flush()
        os._exit(1)

    return report


if __name__ == "__main__":
    main()
