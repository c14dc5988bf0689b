"""The zero-shot part of an evaluation: classify by prompts, log prior + log mean exp of the prompts' scores.

With prompts drawn from p(prompt | label) this estimates p(label | sample), with an excess that falls as 1 / prompts
(Oko et al. 2025, figure 5).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from service.contract.errors import IsthmusError, Permanent
from service.contract.tokens.tokenise import TextRaw
from worker.jobs.report import ZeroShot
from worker.learning import retrieval
from worker.learning.data import Dataset, Encoder, Evaluated, TokenSource
from worker.learning.ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Float64
    from torch import Tensor

    from service.contract.jobs import EvaluateArgs
    from worker.learning.model import Loaded

    Prompts = dict[str, Float[Tensor, "prompt dim"]]

PROMPTS_PER_LABEL: Final = 250


def zero_shot(args: EvaluateArgs, loaded: Loaded, evaluated: list[Evaluated], encoder: Encoder) -> Iterator[ZeroShot]:
    """Classify every labelled modality: by text that was trained with it, else by whatever was trained with it.

    Raises Permanent for a given prompt that the model cannot read.
    """
    for one in evaluated:
        for modality in one.vectors:
            found = _prompts_for(args, loaded, one.dataset, modality, encoder)
            if found is None:
                continue
            through, prompts, log_prior = found
            labels = list(prompts)
            kept = [at for at, label in enumerate(one.labels) if label in prompts]
            if len(labels) < 2 or not kept:
                continue
            scale = loaded.model.scale(modality, through).cpu()
            log_posterior = classify(one.vectors[modality][kept], prompts, scale, log_prior)
            truth = torch.tensor([labels.index(one.labels[at]) for at in kept])
            hit, _ = retrieval.hits_at_k(log_posterior, torch.arange(len(labels)) == truth[:, None], 1)
            yield ZeroShot(
                modality=modality,
                dataset=one.dataset.name,
                prompts_modality=through,
                prompts="given" if args.prompts else "training",
                prompts_overlap=not args.prompts and args.split != "holdout",
                num_prompts=sum(map(len, prompts.values())),
                num_labels=len(labels),
                num_samples=len(kept),
                num_left_out=len(one.labels) - len(kept),
                accuracy=float(hit.mean()),
                chance=1 / len(labels),
                cross_entropy=-float(log_posterior.gather(1, truth[:, None]).mean()),
            )


def classify(
    z: Float[Tensor, "item dim"], prompts: Prompts, scale: Float[Tensor, ""], log_prior: Float64[Tensor, " label"]
) -> Float64[Tensor, "item label"]:
    """Return log p(label | item), labels in the order of the prompts."""
    evidence = [
        torch.logsumexp((scale * z @ prompt.T).double(), 1) - math.log(len(prompt)) for prompt in prompts.values()
    ]
    return (torch.stack(evidence, 1) + log_prior).log_softmax(1)


def _prompts_for(
    args: EvaluateArgs, loaded: Loaded, dataset: Dataset, modality: str, encoder: Encoder
) -> tuple[str, Prompts, Float64[Tensor, " label"]] | None:
    """Return the modality of the prompts, the prompts and the log prior; None if no prompt can be had."""
    partners = [name for name in sorted(loaded.recipe.towers) if loaded.model.is_trained(modality, name)]
    texts = [name for name in partners if loaded.recipe.towers[name].tokens.kind == "text"]
    if args.prompts:
        if not texts:
            return None
        prompts = _given_prompts(args.prompts, loaded, texts[0], encoder)
        return texts[0], prompts, torch.zeros(len(prompts), dtype=torch.float64)
    for through in (*texts, *partners):
        if through in dataset.samples.modalities:
            source = TokenSource(dataset, through, loaded.tokenisers[through])
            prompts, counts = _training_prompts(source, args.seed, encoder)
            return through, prompts, torch.tensor([counts[label] for label in prompts]).double().log()
    return None


def _training_prompts(source: TokenSource, seed: int, encoder: Encoder) -> tuple[Prompts, Counter[str]]:
    """Embed what the training samples of each label say in one modality, as often as they say it; count the samples."""
    samples = source.dataset.samples
    counts: Counter[str] = Counter()
    chosen: dict[str, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(samples.indices("train")).tolist():
        if label := samples.label(index):
            counts[label] += 1
            if counts[label] <= PROMPTS_PER_LABEL:
                chosen.setdefault(label, []).append(index)
    return {label: encoder(source, np.array(indices)) for label, indices in sorted(chosen.items())}, counts


def _given_prompts(prompts: dict[str, list[str]], loaded: Loaded, modality: str, encoder: Encoder) -> Prompts:
    vectors: Prompts = {}
    for label, texts in prompts.items():
        try:
            items = [loaded.tokenisers[modality](TextRaw(text)) for text in texts]
        except IsthmusError as error:
            raise Permanent(f"prompts of {label!r}: {error.message}") from error
        vectors[label] = encoder.encode(modality, Ragged.from_sequences(items))
    return vectors
