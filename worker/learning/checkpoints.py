"""Checkpoints: everything a run needs to go on as if it had never stopped, published whole or not at all.

    model/                        the layout of a published model, tokenisers included: a checkpoint can be served
    state/optimiser.safetensors   AdamW's moments and step counts, by parameter
    state/rng.safetensors         torch's generators, CPU and CUDA; batches need none, they follow from the position
    state/position.json           the step, how often each pair was drawn, the environment

The learning rate is a function of the step, so the schedule has no state. Resuming is exact, bit for bit on the CPU, in
the same environment: torch build, thread count, CPU capability.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, final

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from service.contract.errors import NotFound, Permanent
from service.contract.manifest import MANIFEST
from service.contract.word import Word
from worker.learning.model import MultiTower, save_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from service.contract.recipe import Recipe
    from worker.runner import Context


class Position(Word):
    """Where a run stands after `step` steps."""

    step: int = 0
    drawn: list[int]
    trained_s: float = Field(default=0.0, description="seconds spent in steps, all attempts together")
    environment: dict[str, str | int]


def environment(device: torch.device) -> dict[str, str | int]:
    """Return what bit-for-bit equality depends on."""
    return {
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def find(ctx: Context) -> Path | None:
    """Return the folder of the newest checkpoint that is whole and matches its digests, None if there is none.

    Those that the queue knows come first. One that was published while the database was away, by a worker that died
    before it came back, is only in the store; the ones that the queue knows may have been removed for it.
    """
    unrecorded = set(ctx.store.list(f"checkpoints/{ctx.job}")) - set(ctx.resume)
    for key in (*ctx.resume, *sorted(unrecorded, key=_step_of, reverse=True)):
        try:
            return ctx.store.verified(key)
        except (NotFound, Permanent) as error:
            ctx.event("checkpoint_skipped", {"artifact": key, "reason": error.message})
    return None


@final
class Checkpoints:
    """Writes the checkpoints of one run and keeps the newest few."""

    def __init__(
        self,
        ctx: Context,
        recipe: Recipe,
        tokeniser_files: Mapping[str, Mapping[str, bytes]],
        data: Mapping[str, Any],
        keep: int,
    ) -> None:
        self._ctx = ctx
        self._recipe = recipe
        self._tokeniser_files = tokeniser_files
        self._data = data
        self._keep = keep
        self._known = list(ctx.resume)
        self._last_step: int | None = None

    def save(
        self,
        model: MultiTower,
        optimiser: torch.optim.Optimizer,
        position: Position,
        device: torch.device,
        metrics: dict[str, float],
    ) -> None:
        """Publish a checkpoint, tell the queue, and remove the ones that are too many."""
        if position.step == self._last_step:
            return
        folder = self._ctx.scratch / f"checkpoint-{position.step}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "state").mkdir(parents=True)
        body = save_model(
            model,
            folder / "model",
            recipe=self._recipe,
            tokeniser_files=self._tokeniser_files,
            banks={},
            extra={"step": position.step, "metrics": metrics, "data": self._data},
        )
        save_file(_optimiser_state(model, optimiser), folder / "state" / "optimiser.safetensors")
        save_file(_generators(device), folder / "state" / "rng.safetensors")
        (folder / "state" / "position.json").write_text(position.model_dump_json(), encoding="utf-8")
        key = f"checkpoints/{self._ctx.job}/{position.step}-{self._ctx.epoch}"
        manifest = self._ctx.store.publish(folder, key, kind="checkpoint", id=self._ctx.job, body=body)
        self._ctx.checkpoint(position.step, key, manifest.digest, metrics)
        self._last_step = position.step
        self._known.insert(0, key)
        for old in self._known[self._keep :]:
            self._ctx.store.delete(old)
        del self._known[self._keep :]


def restore(folder: Path, model: MultiTower, optimiser: torch.optim.Optimizer, device: torch.device) -> Position:
    """Load a checkpoint's weights, optimiser and generators; return its position."""
    model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    moments = load_file(folder / "state" / "optimiser.safetensors", device=str(device))
    for name, parameter in model.named_parameters():
        if f"{name}/step" in moments:
            optimiser.state[parameter] = {
                part: moments[f"{name}/{part}"].clone() for part in ("step", "exp_avg", "exp_avg_sq")
            }
    generators = load_file(folder / "state" / "rng.safetensors")
    torch.set_rng_state(generators["cpu"])
    if device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], device)
    return Position.model_validate(json.loads((folder / "state" / "position.json").read_text(encoding="utf-8")))


def metrics_of(folder: Path) -> dict[str, float]:
    """Return the figures that a checkpoint was saved with."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["body"]["metrics"]


def _step_of(key: str) -> tuple[int, int]:
    """Return the step and the epoch in a checkpoint's key."""
    step, _, epoch = key.rpartition("/")[2].partition("-")
    return int(step), int(epoch)


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
        generators["cuda"] = torch.cuda.get_rng_state(device)
    return generators
