"""Train a recipe into a model. One loop, read from top to bottom; the parts it uses live in `worker/learning`.

Where a run starts:
1. At the newest checkpoint of this job that is whole, matches its digests and is of this recipe and these data (an
   earlier attempt was interrupted, or its worker died), with that checkpoint's tokenisers.
2. At the next older one, if that is damaged or gone.
3. From scratch: tokenisers trained on the captions, weights drawn from the seed, vectors measured; or, for a tower with
   `init_from`, all three taken from another model's.
All three lead to the same weights, bit for bit on the CPU.
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from typing import TYPE_CHECKING

import torch

from service.contract.errors import Interrupted, Permanent
from service.contract.jobs import TrainArgs, TrainResult
from service.contract.recipe import Budget, Compute, Optimiser, pair_name
from worker import loader
from worker.cpus import num_cpus
from worker.learning import bank, checkpoints, data, loading, losses, optim, ranks
from worker.learning.checkpoints import Checkpoints, Position
from worker.learning.compiling import compile_towers
from worker.learning.device import be_deterministic, blaming, precision_of
from worker.learning.encoding import BatchEncoder, Pace
from worker.learning.finetuning import build_learner, inherited, published, read_donors, take_over, tokenisers_of
from worker.learning.heldout import final_metrics, loss_floors
from worker.learning.model import build_tokenisers, save_model, vocab_sizes
from worker.learning.reading import open_pairs

if TYPE_CHECKING:
    from worker.learning.group import Group
    from worker.runner import Context


def run(args: TrainArgs, ctx: Context) -> TrainResult:
    """Train, publish the model, and return what the queue writes into its row.

    Raises Permanent if the data do not fit the recipe or the loss stops being a number; Cancelled; Interrupted, after
    a checkpoint was written; Transient if a process that it started is lost.
    """
    num_ranks = (args.recipe.compute or Compute()).devices
    with ranks.together(args, ctx, num_ranks) as (group, device):
        result = _train(args, ctx, group, device)
    assert result is not None, "whoever leads publishes"
    return result


def follow(args: TrainArgs, ctx: Context) -> None:
    """Train beside the runner that started this one: a part of every batch, and nothing is published."""
    num_ranks = (args.recipe.compute or Compute()).devices
    with ranks.together(args, ctx, num_ranks) as (group, device):
        _train(args, ctx, group, device)


def _train(  # noqa: PLR0915 - one loop, told in order
    args: TrainArgs, ctx: Context, group: Group, device: torch.device
) -> TrainResult | None:
    recipe = args.recipe
    optimiser_config = recipe.optimiser or Optimiser()
    budget = recipe.budget or Budget()
    compute = recipe.compute or Compute()
    autocast = precision_of(recipe.precision, device)
    be_deterministic(device)

    # Data and tokenisers
    datasets = {name: data.open_dataset(name, ctx) for name in dict.fromkeys(pair.dataset for pair in recipe.pairs)}
    learned_from = {
        name: {
            "digest": dataset.digest,
            "split": "train",
            "modalities": sorted({m for pair in recipe.pairs if pair.dataset == name for m in pair.modalities}),
        }
        for name, dataset in datasets.items()
    }
    start = checkpoints.find(ctx, recipe, learned_from) if group.leads else None
    donors = read_donors(recipe, ctx) if group.leads and start is None else {}
    if start:
        files = start.tokeniser_files
    else:
        files = data.train_tokenisers(recipe, datasets) | tokenisers_of(donors) if group.leads else {}
    files = group.tokeniser_files(files)
    tokenisers = build_tokenisers(recipe, files)
    pairs = open_pairs(recipe, datasets, tokenisers, budget.batch_size, share=group.share)
    names = [pair_name(*pair.modalities) for pair in recipe.pairs]
    floors = loss_floors(recipe, pairs) if group.leads else {}

    # Model and optimiser
    torch.manual_seed(recipe.seed)
    model = build_learner(recipe, vocab_sizes(recipe, tokenisers)).to(device)
    optimiser = optim.build(optimiser_config, model.named_parameters())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # Start, in the order of the module's docstring
    environment = checkpoints.environment(device)
    metrics: dict[str, float] = {}
    if start:
        checkpoints.restore(start, model, optimiser, device)
        changed = sorted(name for name, value in environment.items() if start.position.environment.get(name) != value)
        about = {"step": start.position.step, "artifact": start.key, "same_environment": not changed}
        ctx.event("resumed", about | ({"changed": changed} if changed else {}))
        position = start.position.model_copy(update={"environment": environment})
        metrics |= start.metrics
    else:
        if group.leads:
            take_over(model, donors, ctx)
            data.measure(model, pairs, donors)
        init_from = {name: donor.origin for name, donor in donors.items()}
        position = Position(drawn=[0] * len(pairs), environment=environment, init_from=init_from)
    position = group.start(model, optimiser, position)
    known_data = inherited(position.init_from) | learned_from
    saved = Checkpoints(ctx, recipe, files, known_data, start, leads=group.leads)
    del start, donors  # their tensors
    compile_towers(model, recipe, device, ctx)

    # Batches ahead
    num_cores = num_cpus() // group.size
    num_loaders = loading.num_loaders(pairs, num_cores) if compute.loaders is None else compute.loaders
    told = loader.describe(recipe, datasets, tokenisers, num_loaders, group.share)
    ahead = loading.batches(pairs, position.drawn, loaders=[told] * num_loaders, check=ctx.check)
    if num_loaders:
        ctx.event("loaders", {"processes": num_loaders})

    # The loop
    encode = BatchEncoder(model, recipe, device, autocast)
    pace = Pace(position.step, encode)
    model.train()
    try:
        with blaming(budget.batch_size), closing(ahead) as batches:
            while position.step < budget.steps:
                ctx.check()
                step_time = time.monotonic()
                rate = optim.learning_rate(optimiser_config, position.step, budget.steps)
                optim.set_learning_rate(optimiser, rate)

                with pace.waiting():
                    at, first, second = next(batches)
                group.seed_step(recipe.seed, position.step)
                a, b = recipe.pairs[at].modalities
                side_a, side_b = encode(a, first), encode(b, second)
                config = recipe.loss_of(recipe.pairs[at])
                every = group.gather(side_a.z, side_b.z)
                loss = losses.compute(config, side_a.z, side_b.z, model.scale(a, b), model.bias(a, b), gathered=every)
                optimiser.zero_grad()
                loss.backward()
                side_a.backward()
                side_b.backward()
                loss = group.average(loss, parameters)
                norm = torch.nn.utils.clip_grad_norm_(parameters, optimiser_config.clip_norm)
                loss_value, norm_value = torch.stack([loss, norm]).tolist()
                if not math.isfinite(loss_value) or not math.isfinite(norm_value):
                    what = f"the loss is {loss_value}, the norm of its gradient {norm_value}"
                    raise Permanent(f"step {position.step + 1}, pair {names[at]}: {what}", code="not_finite")
                optimiser.step()
                model.clamp_scales()

                now = time.monotonic()
                total, num = position.recent.get(names[at], (0.0, 0))
                position = position.model_copy(
                    update={
                        "step": position.step + 1,
                        "drawn": [count + (other == at) for other, count in enumerate(position.drawn)],
                        "recent": {**position.recent, names[at]: (total + loss_value, num + 1)},
                        "trained_s": position.trained_s + now - step_time,
                    }
                )
                if position.step % budget.log_every == 0 or position.step == budget.steps:
                    figures = pace.look(position.step, budget.batch_size)
                    means = {name: total / num for name, (total, num) in position.recent.items()}
                    metrics |= {f"loss/{name}": mean for name, mean in means.items()}
                    metrics |= {
                        f"loss_above_floor/{name}": mean - floors[name]
                        for name, mean in means.items()
                        if name in floors
                    }
                    metrics |= {
                        f"scale/{name}": float(log_scale.detach().exp()) for name, log_scale in model.log_scales.items()
                    }
                    metrics |= {f"bias/{name}": float(bias.detach()) for name, bias in model.biases.items()}
                    metrics |= {"learning_rate": rate, "grad_norm": norm_value} | figures
                    saved.tell(position.step, dict(metrics))
                    ctx.progress(position.step, budget.steps, (budget.steps - position.step) / figures["steps_per_s"])
                    position = position.model_copy(update={"recent": {}})
                if position.step < budget.steps and saved.is_due():
                    saved.save(model, optimiser, position, device, metrics)

        if not group.leads:
            return None

        # The bridge bank and the model, with the final weights
        model.eval()
        final = published(model, recipe, vocab_sizes(recipe, tokenisers))
        encoder = data.Encoder(final, device, lambda _: ctx.check())
        banks = bank.draw_banks(encoder, recipe, pairs)
        metrics |= final_metrics(encoder, pairs)
        metrics |= {f"loss_floor/{name}": least for name, least in floors.items()}
        metrics["trained_s"] = position.trained_s
    except Interrupted:
        saved.save(model, optimiser, position, device, metrics)
        raise
    ctx.metric(position.step, dict(metrics))
    model_id = "model_" + ctx.job.partition("_")[2]
    folder = ctx.scratch / "model"
    body = save_model(
        final,
        folder,
        recipe=recipe,
        tokeniser_files=files,
        banks=banks,
        extra={
            "step": position.step,
            "metrics": metrics,
            "data": known_data,
            "init_from": {name: origin.model_dump(exclude={"data"}) for name, origin in position.init_from.items()},
        },
    )
    manifest = ctx.store.publish(folder, f"models/{model_id}/{ctx.epoch}", kind="model", id=model_id, body=body)
    return TrainResult(
        artifact=f"models/{model_id}/{ctx.epoch}",
        modalities=sorted(recipe.towers),
        dimensions=recipe.dimensions,
        logit_scales=body["logit_scales"],
        logit_biases=body["logit_biases"],
        critic=recipe.critic,
        metrics=metrics,
        digest=manifest.digest,
        num_bytes=manifest.num_bytes,
    )
