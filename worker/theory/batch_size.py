"""A batch beyond 1 / min p_k gains nothing: theorem 4.2 and remark 4.5 of Chen et al. (2024).

The theorem turns an excess epsilon of the batch's loss over its floor into a downstream loss epsilon', with a factor
2 + C_B, C_B = max(1 / p_k) / B up to logarithms: it falls as 1 / B until B reaches 1 / min p_k, and not beyond. So

1. the factor itself, epsilon' / epsilon, is measured on one and the same model for batches of every size: no training,
   no optimiser, nothing else that could differ;
2. models are trained with every batch size on as many samples in all (B * steps is constant), the comparison that asks
   what a larger batch buys for the same computation. Beyond 1 / min p_k it may buy nothing;
3. and for as many steps, which gives the larger batch more samples and less noisy gradients. That is no test of the
   remark, which is about minimisers and not about the way there: reported.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from worker.theory import encoders, generators, measures
from worker.theory.findings import Outcome, Setting, at_least, at_most, curve, finding
from worker.theory.temperature_margin import LINEAR

NUM_PAIRS: Final = 40_000
TEMPERATURE: Final = 0.1
CLASSES: Final = 96
STEPS: Final = 1600  # of a batch of CLASSES
SIZES: Final = (12, 24, 48, 96, 192, 384, 768)
STEPWISE: Final = (12, 24, 48, 96, 192, 384)  # the largest would see eight times the samples
FACTOR_CLASSES: Final = 20
FACTOR_STEPS: Final = 300
FACTOR_SIZES: Final = (2, 5, 10, 20, 40, 80, 160, 320)


def num_runs(num_seeds: int) -> int:
    """Return how many steps of progress there are."""
    return num_seeds * (1 + len(SIZES) + len(STEPWISE))


def run(setting: Setting) -> Outcome:
    """Measure the factor, and errors after training with every batch size."""
    outcome = Outcome(
        set_up=[
            (
                "Factor: definition 5.3 with K = 20 equally frequent classes (1 / min p_k = 20), R = 4; linear "
                f"encoders after {FACTOR_STEPS} steps of 64, so that there is an excess to speak of. epsilon is the "
                "loss of fresh batches minus its floor (both directions added up), epsilon' mean log sum_k exp((f(x, "
                "y_k) - f(x, y*)) / temperature) over fresh prompts."
            ),
            (
                "Training: fine-grained classes (K = 96 equally frequent ones, 1 / min p_k = 96), linear encoders of "
                f"16 dimensions, temperature .1. Equal samples: B * steps = {CLASSES * STEPS:,}. Equal steps: "
                f"{STEPS:,}."
            ),
        ]
    )
    _factors(setting, outcome)
    _trained(setting, outcome)
    outcome.notes += [
        "The bars are ours: the paper gives the order of the batch and no figures.",
        (
            "Beyond B = K the learning rate grows with sqrt(B / K), which favours the larger batch; it still takes "
            "fewer steps for the same samples, and the largest ones have not converged."
        ),
        (
            "At equal steps larger batches go on to improve: they see more samples. That is a matter of optimisation "
            "and not of what the loss can tell."
        ),
    ]
    return outcome


def _factors(setting: Setting, outcome: Outcome) -> None:
    factors: list[list[float]] = []
    excesses: list[list[float]] = []
    for seed in setting.seeds:
        generator = generators.case_study(seed, own_norm=4.0, num_classes=FACTOR_CLASSES)
        pairs = generator.draw(8000, np.random.default_rng(seed + 1))
        plan = encoders.Plan(encoders.contrastive(1.0, "dot"), setting.steps(FACTOR_STEPS))
        trained = encoders.train(pairs, plan, seed, setting.check)
        downstream = measures.zero_shot(generator, trained, seed).log_sum_exp
        excesses.append([])
        for size in FACTOR_SIZES:
            setting.check()
            excesses[-1].append(measures.excess(generator, trained, size, seed))
        factors.append([downstream / each for each in excesses[-1]])
        setting.step()
    small, one, two, largest = (FACTOR_SIZES.index(size) for size in (2, 20, 40, 320))
    outcome.findings += [
        finding(
            "factor at B = 2 over that at B = 2K",
            "epsilon' / epsilon of the same model",
            "about K: the factor falls as 1 / B up to B = K (theorem 4.2)",
            [row[small] / row[two] for row in factors],
            at_least(4.0),
        ),
        finding(
            "factor at B = 2K over that at B = 16K",
            "epsilon' / epsilon of the same model",
            "about 1: nothing is gained beyond the order of K (remark 4.5), where 1 / B alone would give 8",
            [row[two] / row[largest] for row in factors],
            at_most(1.5),
        ),
        finding(
            "factor at B = K over that at B = 16K",
            "epsilon' / epsilon of the same model",
            "reported: a small constant",
            [row[one] / row[largest] for row in factors],
        ),
    ]
    marks = {"1 / min p": float(FACTOR_CLASSES)}
    sizes = ("batch size B", FACTOR_SIZES)
    outcome.curves += [
        curve(
            "factor",
            "What an excess of the batch's loss is worth downstream",
            sizes,
            "epsilon' / epsilon",
            {"factor": factors},
            log_x=True,
            log_y=True,
            marks=marks,
        ),
        curve(
            "excess",
            "Loss minus floor of one and the same model",
            sizes,
            "loss minus floor, nats",
            {"excess": excesses},
            log_x=True,
            marks=marks,
        ),
    ]


def _trained(setting: Setting, outcome: Outcome) -> None:
    by_samples: list[list[float]] = []
    by_steps: list[list[float]] = []
    excess: list[list[float]] = []
    for seed in setting.seeds:
        by_samples.append([])
        excess.append([])
        for size in SIZES:
            error, above = _train(setting, seed, size, STEPS * CLASSES // size)
            by_samples[-1].append(error)
            excess[-1].append(above)
        by_steps.append([_train(setting, seed, size, STEPS)[0] for size in STEPWISE])
    enough = SIZES.index(CLASSES)
    for at, size in enumerate(SIZES):
        beyond = size > CLASSES
        outcome.findings.append(
            finding(
                f"equal samples: zero-shot error at B = {size} minus that at B = K = {CLASSES}",
                "top-1 errors with one fresh prompt a class",
                "not below 0: no gain beyond K (remark 4.5)" if beyond else "reported",
                [row[at] - row[enough] for row in by_samples],
                at_least(-0.01) if beyond else None,
            )
        )
        outcome.findings.append(
            finding(
                f"equal samples: loss minus floor at B = {size}",
                "nats, both directions added up, in fresh batches of that size",
                "reported",
                [row[at] for row in excess],
            )
        )
    outcome.curves += [
        curve(
            "error-equal-samples",
            "Zero-shot error for as many samples in all",
            ("batch size B", SIZES),
            "top-1 zero-shot error",
            {"equal samples": by_samples},
            log_x=True,
            marks={"1 / min p": float(CLASSES)},
        ),
        curve(
            "error-equal-steps",
            "Zero-shot error for as many steps: larger batches see more samples",
            ("batch size B", STEPWISE),
            "top-1 zero-shot error",
            {"equal steps": by_steps},
            log_x=True,
            marks={"1 / min p": float(CLASSES)},
        ),
    ]


def _train(setting: Setting, seed: int, batch_size: int, steps: int) -> tuple[float, float]:
    """Return the zero-shot error and the excess of the loss."""
    generator = LINEAR.generator(seed)
    plan = encoders.Plan(
        encoders.contrastive(TEMPERATURE, "cosine"),
        setting.steps(steps),
        batch_size=batch_size,
        dimensions=LINEAR.dimensions,
        # Larger batches get larger steps, or at equal samples they would lose by that alone.
        learning_rate=LINEAR.learning_rate * max(1.0, math.sqrt(batch_size / CLASSES)),
    )
    pairs = generator.draw(NUM_PAIRS, np.random.default_rng(seed + 1))
    trained = encoders.train(pairs, plan, seed, setting.check)
    error = measures.zero_shot(generator, trained, seed).error[1]
    above = measures.excess(generator, trained, batch_size, seed, num_pairs=8000)
    setting.step()
    return error, above
