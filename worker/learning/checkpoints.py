"""Checkpoints: everything a run needs to go on as if it had never stopped, published whole or not at all.

    model/                        the layout of a published model, tokenisers included: a checkpoint can be served
    state/optimiser.safetensors   AdamW's moments and step counts, by parameter
    state/rng.safetensors         torch's generators, of the CPU and of every CUDA device
    state/position.json           the step, how often each pair was drawn, losses not yet told, the environment

The learning rate is a function of the step, so the schedule has no state. Batches need no generator, they follow from
the position; nothing draws from the generators of Python and NumPy that are global. Resuming is exact, bit for bit on
the CPU, in the same environment.
"""

from __future__ import annotations

import errno
import logging
import platform
import re
import shutil
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file

from service.contract.errors import Invalid, NotFound, Permanent, Unavailable
from service.contract.manifest import code_version
from service.contract.recipe import Budget, Recipe
from service.contract.word import Word
from worker.learning.finetuning import Origin, build_learner
from worker.learning.model import MultiTower, build_tokenisers, read_tokenisers, save_model, vocab_sizes
from worker.learning.tensors import save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from worker.runner import Context

_log = logging.getLogger(__name__)
GRACE_S: Final = 20.0
"""How long a checkpoint that is no longer listed can still be read by those who looked it up before."""
RETRY_S: Final = 2.0  # at least, after a save that failed
TOLD_S: Final = 5.0
_MAX_TOLD: Final = 200
_NAME: Final = re.compile(r"(\d+)-(\d+)\Z")


class Position(Word):
    """Where a run stands after `step` steps."""

    step: int = 0
    drawn: list[int]
    recent: dict[str, tuple[float, int]] = Field(
        default_factory=dict[str, tuple[float, int]],
        description="sum and number of the losses since the last metrics, by pair",
    )
    told: list[tuple[int, dict[str, float]]] = Field(
        default_factory=list[tuple[int, dict[str, float]]],
        description="metrics of the last seconds, by step: a supervisor that is killed has not written them all",
    )
    trained_s: float = Field(default=0.0, description="seconds spent in steps, all attempts together")
    environment: dict[str, str | int]
    init_from: dict[str, Origin] = Field(
        default_factory=dict[str, Origin], description="where towers come from that did not start from the seed"
    )


@final
@dataclass(frozen=True)
class Start:
    """A checkpoint to go on from, read whole: whoever removes its files afterwards disturbs nobody."""

    key: str
    digest: str
    position: Position
    metrics: dict[str, float]
    tokeniser_files: dict[str, dict[str, bytes]]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    generators: dict[str, Tensor]


def environment(device: torch.device) -> dict[str, str | int]:
    """Return what bit-for-bit equality depends on."""
    return {
        "isthmus": code_version(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def find(ctx: Context, recipe: Recipe, data: Mapping[str, Mapping[str, Any]]) -> Start | None:
    """Read the newest checkpoint that is whole, matches its digests and belongs to this recipe and these data.

    The store counts as well as the queue: one that was published while the database was away, by a worker that died
    before it came back, is only there. Each that cannot be used leaves an event that says why. None if there is none.
    """
    listed = [key for key in ctx.store.list(f"checkpoints/{ctx.job}") if _NAME.search(key)]
    for key in sorted({*ctx.resume, *listed}, key=_step_and_epoch, reverse=True):
        try:
            return _read(ctx, key, recipe, data)
        except (NotFound, Invalid, Permanent) as error:
            reason = error.message
        except FileNotFoundError:
            reason = "it was removed while it was read"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            reason = str(error)
        ctx.event("checkpoint_skipped", {"artifact": key, "reason": reason})
    return None


def _read(ctx: Context, key: str, recipe: Recipe, data: Mapping[str, Mapping[str, Any]]) -> Start:
    """Read a checkpoint.

    Raises NotFound or FileNotFoundError if it is gone, Permanent if it is damaged or another run's.
    """
    folder = ctx.store.verified(key)
    manifest = ctx.store.manifest(key)
    try:
        saved_recipe = Recipe.model_validate(manifest.body["recipe"])
        position = Position.model_validate_json((folder / "state" / "position.json").read_bytes())
    except ValidationError as error:
        raise Permanent(f"it was saved by another version: {manifest.code_version}") from error
    if saved_recipe != recipe:
        raise Permanent("its recipe is another")
    saved_data = manifest.body["data"]
    for name in data:
        if name not in saved_data or saved_data[name]["digest"] != data[name]["digest"]:
            raise Permanent(f"data set {name} has changed since")
    files = read_tokenisers(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    with torch.device("meta"):
        expected = build_learner(recipe, vocab_sizes(recipe, build_tokenisers(recipe, files))).state_dict()
    if {name: value.shape for name, value in weights.items()} != {name: x.shape for name, x in expected.items()}:
        raise Permanent(f"its model was built by another version: {manifest.code_version}")
    return Start(
        key=key,
        digest=manifest.digest,
        position=position,
        metrics=manifest.body["metrics"],
        tokeniser_files=files,
        weights=weights,
        moments=load_file(folder / "state" / "optimiser.safetensors"),
        generators=load_file(folder / "state" / "rng.safetensors"),
    )


def restore(start: Start, model: MultiTower, optimiser: torch.optim.Optimizer, device: torch.device) -> None:
    """Take over a checkpoint's weights, moments and generators."""
    model.load_state_dict(start.weights)
    for name, parameter in model.named_parameters():
        if f"{name}/step" in start.moments:
            optimiser.state[parameter] = {
                part: start.moments[f"{name}/{part}"].to(device, copy=True)
                for part in ("step", "exp_avg", "exp_avg_sq")
            }
    torch.set_rng_state(start.generators["cpu"])
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            if (state := start.generators.get(f"cuda:{number}")) is not None:
                torch.cuda.set_rng_state(state, number)


@final
class Checkpoints:
    """Writes the checkpoints of one run and keeps the newest few."""

    def __init__(
        self,
        ctx: Context,
        recipe: Recipe,
        tokeniser_files: Mapping[str, Mapping[str, bytes]],
        data: Mapping[str, Any],
        start: Start | None,
        *,
        leads: bool = True,
        grace_s: float = GRACE_S,
    ) -> None:
        """Go on from `start`: what is older stays until its turn comes, what was passed over does not count.

        Of several processes that train together only the one that leads writes any, and tells of them.
        """
        budget = recipe.budget or Budget()
        self._ctx = ctx
        self._leads = leads
        self._recipe = recipe
        self._tokeniser_files = tokeniser_files
        self._data = data
        self._keep = budget.keep_checkpoints
        self._interval_s = budget.checkpoint_s
        self._grace_s = grace_s
        self._saved_at = time.monotonic()
        self._failed = False
        self._last_step: int | None = None
        self._kept: list[str] = []  # newest first
        self._retired: list[tuple[float, str]] = []  # when, oldest first
        self._told: deque[tuple[float, int, dict[str, float]]] = deque(maxlen=_MAX_TOLD)
        if start is not None:
            self._last_step = start.position.step
            first = _step_and_epoch(start.key)
            listed = [key for key in ctx.store.list(f"checkpoints/{ctx.job}") if _NAME.search(key)]
            for key in sorted(listed, key=_step_and_epoch):
                if _step_and_epoch(key) <= first:
                    self._keep_only_newest(key)
            if ctx.resume[:1] != [start.key]:
                # The queue does not know it, or knows newer ones that cannot be used: from now on it is the newest.
                ctx.checkpoint(start.position.step, start.key, start.digest, start.metrics)
            for step, values in start.position.told:
                self.tell(step, values)

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Record figures at a step, and again after a crash that may have lost them."""
        if not self._leads:
            return
        self._ctx.metric(step, values)
        self._told.append((time.monotonic(), step, values))

    def is_due(self) -> bool:
        """Tell whether as much work is at risk as the recipe allows."""
        interval_s = max(self._interval_s, RETRY_S) if self._failed else self._interval_s
        return time.monotonic() - self._saved_at >= interval_s

    def save(
        self,
        model: MultiTower,
        optimiser: torch.optim.Optimizer,
        position: Position,
        device: torch.device,
        metrics: dict[str, float],
    ) -> None:
        """Publish a checkpoint, tell the queue, and let go of the ones that are too many.

        A store that is full or away leaves an event and the checkpoints that there are: the run goes on, and tries
        again when the next one is due.
        """
        if not self._leads or position.step == self._last_step:
            return
        self._remove_retired(self._grace_s)
        since = time.monotonic() - TOLD_S
        told = [(step, values) for at, step, values in self._told if at >= since]
        position = position.model_copy(update={"told": told})
        try:
            try:
                self._publish(model, optimiser, position, device, metrics)
            except OSError:
                if not self._retired:
                    raise
                self._remove_retired(0.0)  # they may be what fills the disk
                self._publish(model, optimiser, position, device, metrics)
        except (OSError, Unavailable) as error:
            self._failed = True
            self._ctx.event("checkpoint_failed", {"step": position.step, "reason": str(error)})
            _log.warning("checkpoint %d of %s was not saved: %s", position.step, self._ctx.job, error)
        else:
            self._failed = False
            self._last_step = position.step
        self._saved_at = time.monotonic()

    def _publish(
        self,
        model: MultiTower,
        optimiser: torch.optim.Optimizer,
        position: Position,
        device: torch.device,
        metrics: dict[str, float],
    ) -> None:
        folder = self._ctx.scratch / f"checkpoint-{position.step}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            (folder / "state").mkdir(parents=True)
            body = save_model(
                model,
                folder / "model",
                recipe=self._recipe,
                tokeniser_files=self._tokeniser_files,
                banks={},
                extra={"step": position.step, "metrics": metrics, "data": self._data},
            )
            save_tensors(_optimiser_state(model, optimiser), folder / "state" / "optimiser.safetensors")
            save_tensors(_generators(device), folder / "state" / "rng.safetensors")
            (folder / "state" / "position.json").write_text(position.model_dump_json(), encoding="utf-8")
            key = f"checkpoints/{self._ctx.job}/{position.step}-{self._ctx.epoch}"
            manifest = self._ctx.store.publish(folder, key, kind="checkpoint", id=self._ctx.job, body=body)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._ctx.checkpoint(position.step, key, manifest.digest, metrics)
        self._keep_only_newest(key)

    def _keep_only_newest(self, key: str) -> None:
        """Count a checkpoint that is newer than all others; of one step, only the last attempt's is kept."""
        step, _ = _step_and_epoch(key)
        kept = [key, *(old for old in self._kept if _step_and_epoch(old)[0] != step)][: self._keep]
        self._retired += [(time.monotonic(), old) for old in self._kept if old not in kept]
        self._kept = kept

    def _remove_retired(self, grace_s: float) -> None:
        while self._retired and time.monotonic() - self._retired[0][0] >= grace_s:
            _, key = self._retired.pop(0)
            try:
                self._ctx.store.delete(key)
            except (OSError, Unavailable) as error:
                _log.warning("%s was not removed: %s", key, error)  # a sweep will, once the job has ended


def _step_and_epoch(key: str) -> tuple[int, int]:
    """Return the step and the epoch in a checkpoint's key; those of another form come last."""
    found = _NAME.search(key)
    return (int(found.group(1)), int(found.group(2))) if found else (-1, -1)


def _optimiser_state(model: MultiTower, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{part}": value.detach().cpu().contiguous()
        for parameter, state in optimiser.state.items()
        for part, value in state.items()
    }


def _generators(device: torch.device) -> dict[str, Tensor]:
    generators = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        generators |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return generators
