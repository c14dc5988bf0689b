"""The linear probe: how much of the labels a linear classifier reads from frozen vectors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, final

import numpy as np
import torch
from pydantic import Field

from service.contract.word import Word
from worker.evaluation import estimates
from worker.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Float64, Int64
    from torch import Tensor

INVERSE_PENALTIES: Final = (0.01, 0.1, 1.0, 10.0)
MAX_STEPS: Final = 1000
CHOSEN_ON: Final = 0.2  # of the training samples, only to choose the penalty


class Probe(Word):
    """What a logistic regression of the training split reaches on the samples of this evaluation."""

    num_train: int
    num_labels: int
    num_samples: int
    num_left_out: Annotated[int, Field(description="samples without a label, or with one that training has not")]
    accuracy: Estimate
    chance: Annotated[float, Field(description="the accuracy of always naming the commonest training label")]
    cross_entropy: Estimate
    inverse_penalty: Annotated[float, Field(description="C of scikit-learn's LogisticRegression")]
    converged: bool


@final
@dataclass(frozen=True)
class Classifier:
    """Logistic regression of standardised vectors."""

    centre: Float[Tensor, " dim"]
    deviation: Float[Tensor, " dim"]
    model: Any
    converged: bool

    def log_p(self, z: Float[Tensor, "item dim"]) -> Float64[Tensor, "item label"]:
        """Return log p(label | vector)."""
        logits = torch.from_numpy(self.model.decision_function(((z.double() - self.centre) / self.deviation).numpy()))
        if logits.ndim == 1:  # of two labels, only the second has one
            logits = torch.stack([torch.zeros_like(logits), logits], 1)
        return logits.log_softmax(1)


def fit(z: Float[Tensor, "item dim"], truth: Int64[Tensor, " item"], inverse_penalty: float) -> Classifier:
    """Fit multinomial logistic regression with an L2 penalty; `truth` holds every label 0, 1, ... at least once."""
    # 1 s to import, and most evaluations that somebody waits for do without.
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    z = z.double()
    deviation = z.std(0)
    centre, deviation = z.mean(0), torch.where(deviation > 1e-12, deviation, 1.0)
    model = LogisticRegression(C=inverse_penalty, max_iter=MAX_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the report
        model.fit(((z - centre) / deviation).numpy(), truth.numpy())
    return Classifier(centre, deviation, model, converged=int(np.max(model.n_iter_)) < MAX_STEPS)


def measure(
    train: tuple[Float[Tensor, "train dim"], list[str]],
    unseen: tuple[Float[Tensor, "item dim"], list[str]],
    seed: int,
    check: Callable[[], None],
) -> Probe | str:
    """Learn labels from training vectors and read them from unseen ones; items with an empty label are left out.

    The penalty is the one of four that does best on a fifth of the training samples. Returns a reason if there is
    nothing to learn or to measure. `check` may raise to stop the work between two fits.
    """
    kept = [at for at, label in enumerate(train[1]) if label]
    labels = sorted({train[1][at] for at in kept})
    if len(labels) < 2:
        return f"the training split has {len(labels)} label{'s' if len(labels) != 1 else ''}, a probe needs two"
    number = {label: at for at, label in enumerate(labels)}
    z, truth = train[0][kept], torch.tensor([number[train[1][at]] for at in kept])
    found = [at for at, label in enumerate(unseen[1]) if label in number]
    if not found:
        return "no sample has a label of the training split"
    unseen_truth = torch.tensor([number[unseen[1][at]] for at in found])
    inverse_penalty = _choose(z, truth, seed, check)
    check()
    classifier = fit(z, truth, inverse_penalty)
    log_p = classifier.log_p(unseen[0][found])
    commonest = int(torch.bincount(truth).argmax())
    return Probe(
        num_train=len(kept),
        num_labels=len(labels),
        num_samples=len(found),
        num_left_out=len(unseen[1]) - len(found),
        accuracy=estimates.mean((log_p.argmax(1) == unseen_truth).double()),
        chance=float((unseen_truth == commonest).double().mean()),
        cross_entropy=estimates.mean(-log_p.gather(1, unseen_truth[:, None]).squeeze(1)),
        inverse_penalty=inverse_penalty,
        converged=classifier.converged,
    )


def _choose(z: Float[Tensor, "item dim"], truth: Int64[Tensor, " item"], seed: int, check: Callable[[], None]) -> float:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(z)))
    aside = order[: int(len(order) * CHOSEN_ON)]
    rest = order[len(aside) :]
    present = truth[rest].unique()
    aside = aside[torch.isin(truth[aside], present)]
    if len(present) < 2 or not len(aside):
        return 1.0
    costs: list[float] = []
    for inverse_penalty in INVERSE_PENALTIES:
        check()
        classifier = fit(z[rest], torch.searchsorted(present, truth[rest]), inverse_penalty)
        at = torch.searchsorted(present, truth[aside])
        costs.append(-float(classifier.log_p(z[aside]).gather(1, at[:, None]).mean()))
    return INVERSE_PENALTIES[int(np.argmin(costs))]
