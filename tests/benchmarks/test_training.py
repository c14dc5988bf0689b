"""The benchmark's own arithmetic, and that its peers do the same work."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training
from benchmarks.measuring import Report, interval
from benchmarks.training_peers import bare, loss, open_clip, ours, scale, task, turns
from service.contract.jobs import TrainArgs
from service.contract.losses import InfoNCE
from service.contract.modality import ImageTokens
from service.contract.recipe import Recipe
from service.contract.tokens import image
from worker.jobs import train
from worker.learning import losses
from worker.learning.model import MultiTower

SMALL = task.Size("small", 16, 1, 2, image=8, patch=4, context=16, dimensions=8, batch=16, steps=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_recipe(micro_batch: int | None = None) -> Recipe:
    document = SMALL.recipe().model_dump(mode="json") | {"compute": {"micro_batch": micro_batch}}
    return Recipe.model_validate(document)


def test_an_interval_is_of_the_ratio_of_medians_over_rounds_drawn_pairwise() -> None:
    theirs = [float(value) for value in range(10, 20)]
    assert interval([1.5 * value for value in theirs], theirs) == pytest.approx((1.5, 1.5, 1.5))
    middle, low, high = interval([3.0, 1.0, 2.0])
    assert (middle, low, high) == (2.0, 1.0, 3.0)
    noisy = np.random.default_rng(1).normal(1, 0.1, 200).tolist()
    middle, low, high = interval(noisy)
    assert low < middle < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / 200**0.5, rel=0.35)  # a median's standard error


def test_a_bar_holds_for_the_worse_end_of_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.bar("under", (1.0, 0.9, 1.05), most=1.05)
    report.bar("over in part", (1.0, 0.9, 1.06), most=1.05)
    report.bar("above", (2.0, 1.5, 3.0), least=1.5)
    report.bar("below in part", (2.0, 1.4, 3.0), least=1.5)
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert verdicts == ["pass", "MISSED", "pass", "MISSED"]
    with pytest.raises(SystemExit) as end:
        report.end()
    assert end.value.code
    with pytest.raises(SystemExit) as end:
        Report().end()
    assert not end.value.code


def test_operations_are_counted_as_torch_counts_them() -> None:
    """The gradient by pixels, which nobody needs, is in neither."""
    config, batch = small_recipe(), 16
    model = MultiTower(config, {"text": scale.VOCAB})
    first, second = scale.draw(config, batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        z_a, z_b = model.encode("image", first), model.encode("text", second)
        losses.compute(InfoNCE(), z_a, z_b, model.scale("image", "text")).backward()
    assert counter.get_total_flops() == batch * scale.sample_flops(config, batch)


def test_the_towers_of_the_device_are_as_large_as_clips() -> None:
    """8.82 and 5.96 GFLOP forward, by open_clip's docs/model_profile.csv; thrice that to train."""
    config = scale.recipe(None)
    pictures, text = (scale.tower_flops(task.tower_of(config, name), 512) / 3e9 for name in ("image", "text"))
    assert pictures == pytest.approx(8.82, rel=0.02)
    assert text == pytest.approx(5.96, rel=0.02)


def test_utilisation_is_the_models_work_over_what_the_device_can_do() -> None:
    assert scale.utilisation(1000.0, 5 * 10**11, peak_tflops=1000.0) == pytest.approx(0.5)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_step_at_scale_runs_whole_and_in_micro_batches(micro_batch: int | None) -> None:
    found = scale.measure(small_recipe(micro_batch), 10, torch.device("cpu"), num_steps=1)
    assert found.rate > 0


def test_the_bare_loop_has_the_losses_of_our_train_job(tmp_path: Path) -> None:
    root = task.publish(tmp_path, SMALL)
    document = json.loads((root / "recipe.json").read_text())
    document["budget"] |= {"steps": 8, "log_every": 1}
    document["optimiser"] = {"warmup_steps": 3, "learning_rate": 3e-3}
    document["bank"] = {"size": 16}
    (root / "recipe.json").write_text(json.dumps(document))
    told: dict[int, float] = {}
    args = TrainArgs(recipe=Recipe.model_validate(document))
    context = ours.make_context(root, args)

    def note(step: int, values: dict[str, float]) -> None:
        told.setdefault(step, values["loss/image+text"])

    context.metric = note
    train.run(args, context)
    theirs = list(islice(bare.losses(task.make_ready(root)), 8))
    assert [told[step] for step in range(1, 9)] == pytest.approx(theirs, rel=1e-5)
    assert theirs[-1] < theirs[0]


def test_the_losses_of_every_kind_are_one_loss() -> None:
    given = loss.operands(1100)  # more than fit one matrix
    found = {kind: loss.run(kind, *given) for kind in ("dense", "ours")}
    assert found["ours"] == pytest.approx(found["dense"], rel=1e-5)
    assert loss.run("products", *given) != loss.run("products", *given)  # no loss
    assert given[0].grad is not None


def test_patches_become_the_picture_that_they_were_cut_from() -> None:
    config = ImageTokens(size=12, patch=4)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    patches = torch.from_numpy(image.patches(Image.fromarray(pixels), config))
    whole = open_clip.pictures(patches[None], config)[0]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (open_clip.MEAN, open_clip.DEVIATION))
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / deviation
    torch.testing.assert_close(whole, expected)


@pytest.mark.skipif(not open_clip.is_installed(), reason="open_clip is installed for the benchmark alone")
def test_open_clips_loss_is_ours_and_its_towers_are_as_large(tmp_path: Path) -> None:
    try:
        clip_loss = open_clip.load("loss").ClipLoss()
        z_a, z_b, temperature, _ = loss.operands(32)
        theirs = clip_loss(z_a, z_b, temperature)
        torch.testing.assert_close(theirs, losses.compute(InfoNCE(), z_a, z_b, temperature))
        ready = task.make_ready(task.publish(tmp_path, SMALL))
        blocks = [
            sum(value.numel() for name, value in weights if "blocks." in name)
            for weights in (ready.weights.items(), open_clip.Clip(ready).named_parameters())
        ]
        assert blocks[0] == blocks[1]
        assert len(list(islice(open_clip.losses(ready), 2))) == 2
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in {"open_clip", "torchvision"}]:
            del sys.modules[name]


def test_peak_memory_is_of_what_ran_since_it_was_forgotten() -> None:
    turns.forget_peak()
    before = turns.resident()
    del_me = torch.ones(50 << 18)  # 50 MiB
    del del_me
    assert turns.peak() - before >= 45 << 20
    if sys.platform == "linux":
        turns.forget_peak()
        assert turns.peak() - before < 45 << 20


def test_without_a_gpu_the_device_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        training.on_device(Report(), 1, None)
