"""Excess contrastive risk is insufficiency, and few negatives under-report it: the K-sample risk on a known joint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from service.contract.losses import KSample
from worker.learning import losses
from worker.theory import jghm
from worker.theory.findings import Outcome, Setting, at_least, at_most, curve, finding

if TYPE_CHECKING:
    from jaxtyping import Float64

SIZES: Final = (2, 4, 16, 64)
KERNELS: Final = 7  # the joint on which the figures were measured before
DEVIATIONS: Final = (0.1, 0.3, 1.0)
"""Of what is added to every entry of the best score."""
AT: Final = 0.3
ANCHORS: Final = 200_000
CHUNK: Final = 2000


def num_runs(num_seeds: int) -> int:
    """Return how many steps of progress there are."""
    return len(SIZES) * num_seeds


def run(setting: Setting) -> Outcome:
    """Compare the excess risk of perturbed scores with their sufficiency, exactly and with K samples."""
    joint = jghm.joint_table(jghm.Shape(), KERNELS)
    best = np.log(joint / np.outer(joint.sum(1), joint.sum(0)))
    information = float((joint * best).sum())
    gaps: list[float] = []
    excess: list[list[float]] = []
    ratios: list[list[float]] = []
    sufficiency: list[float] = []
    for seed in setting.seeds:
        noise = np.random.default_rng(seed).normal(size=joint.shape)
        gaps.append(
            max(
                abs(
                    limit_risk(joint, best + deviation * noise)
                    + 2 * information
                    - suff(joint, best + deviation * noise)
                )
                for deviation in DEVIATIONS
            )
        )
        score = best + AT * noise
        sufficiency.append(suff(joint, score))
        excess.append([])
        for size in SIZES:
            num = max(CHUNK, ANCHORS // 100) if setting.quick else ANCHORS
            excess[-1].append(excess_risk(joint, score, best, size, num, seed, setting))
            setting.step()
        ratios.append([sufficiency[-1] / each for each in excess[-1]])
    outcome = Outcome(
        set_up=[
            (
                "Two trees of 4 leaves over 3 symbols with one root (edges flip with p = .25), written out: 81 by 81 "
                f"sequences, {information:.4f} nats of mutual information."
            ),
            f"The best score log p(x, y) / p(x) p(y), plus normal noise of deviation {AT:g} on every entry.",
            (
                "Suff(S) = E KL(p(y | x), p_S(y | x)) + E KL(p(x | y), p_S(x | y)), exactly; the K-sample risk over "
                f"the best score's on the same {ANCHORS:,} draws, with the loss that jobs train with."
            ),
        ]
    )
    outcome.findings.append(
        finding(
            "largest distance of excess risk and insufficiency as K grows without end",
            f"|R + 2 I - Suff|, R the limit of R_K - 2 log K, exactly, for noise of deviation {DEVIATIONS}",
            "0: the excess contrastive risk is the insufficiency; measured before: to 6 decimals",
            gaps,
            at_most(1e-6),
        )
    )
    before = {2: "3.16", 4: "1.71", 16: "1.15", 64: "1.04"}
    for column, size in enumerate(SIZES):
        outcome.findings.append(
            finding(
                f"insufficiency over excess risk, K = {size}",
                "Suff(S) / (R_K(S) - R_K(S*))",
                f"falls to 1 as K grows; measured before: {before[size]}",
                [row[column] for row in ratios],
                at_least(1.3) if size == 4 else None,
            )
        )
    outcome.findings.append(
        finding(
            f"its distance from 1, K = {SIZES[-1]}",
            "|Suff(S) / (R_K(S) - R_K(S*)) - 1|",
            f"small; measured before: {float(before[SIZES[-1]]) - 1:.2f}",
            [abs(row[-1] - 1) for row in ratios],
            at_most(0.05, mean=True),
        )
    )
    outcome.curves.append(
        curve(
            "excess",
            "What K samples see of an insufficient score",
            ("K, the positive included", SIZES),
            "nats",
            {"excess K-sample risk": excess, "insufficiency": [[each] * len(SIZES) for each in sufficiency]},
            log_x=True,
        )
    )
    outcome.notes.append(
        "A small K makes an encoder look better than it is: compare encoders at one K, and at a large one."
    )
    return outcome


def suff(joint: Float64[np.ndarray, "x y"], score: Float64[np.ndarray, "x y"]) -> float:
    """Compute the insufficiency of a score, nats (Oko et al. 2025, definition 1, for both directions)."""
    total = 0.0
    for table, f in ((joint, score), (joint.T, score.T)):
        given, other = table.sum(1, keepdims=True), table.sum(0)
        model = f + np.log(other)
        log_model = model - np.logaddexp.reduce(model, axis=1, keepdims=True)
        total += float((table * (np.log(table / given) - log_model)).sum())
    return total


def limit_risk(joint: Float64[np.ndarray, "x y"], score: Float64[np.ndarray, "x y"]) -> float:
    """Compute the limit of R_K - 2 log K, nats."""
    total = 0.0
    for table, f in ((joint, score), (joint.T, score.T)):
        total += float((table.sum(1) * np.logaddexp.reduce(f + np.log(table.sum(0)), axis=1)).sum() - (table * f).sum())
    return total


def excess_risk(  # noqa: PLR0917 - a score, its reference and how they are compared
    joint: Float64[np.ndarray, "x y"],
    score: Float64[np.ndarray, "x y"],
    best: Float64[np.ndarray, "x y"],
    candidates: int,
    num_anchors: int,
    seed: int,
    setting: Setting,
) -> float:
    """Estimate R_K(score) - R_K(best) from the same draws of pairs, `num_anchors` of each direction."""
    rng = np.random.default_rng([seed, candidates])
    config = KSample(critic="dot", candidates=candidates)
    # A score table as vectors: <row of x, unit vector of y>.
    rows = [torch.from_numpy(table).float() for table in (score, best)]
    units = torch.eye(joint.shape[1])
    flat = joint.ravel() / joint.sum()
    totals: list[float] = []
    for _ in range(0, num_anchors, CHUNK):
        setting.check()
        x, y = np.divmod(rng.choice(flat.size, (candidates + 1) * CHUNK, p=flat), joint.shape[1])
        risks = [losses.compute(config, row[x], units[y], torch.tensor(1.0)) for row in rows]
        totals.append(float(risks[0] - risks[1]))
    return float(np.mean(totals))
