"""Compose: the best targets for each source vector, and how far to trust the numbers.

`Composer` answers one question in steps of bounded arithmetic and memory, in their order, so that the batcher can let
others go first and drop what nobody waits for. Its estimators are those of `worker.composition`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, assert_never, final

import numpy as np
import torch

from worker.composition.chains import Chain, Ending, Offsets, balancing, carry
from worker.composition.choice import choose
from worker.composition.columns import Columns, Look
from worker.composition.diagnostics import spearman
from worker.composition.estimators import Marginal, direct
from worker.composition.search import Best, Ranking
from worker.learning import critics
from worker.serving import ways
from worker.serving.answers import Found, number, write
from worker.serving.batcher import Entry
from worker.serving.encode import within_memory
from worker.serving.sizes import Sizes
from worker.serving.ways import Closed, Compared, Health, Summed, Trained, Way

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

    from service.contract.losses import Critic
    from service.contract.wire import Arrays, Method
    from worker.serving.known import Known

MAX_KEPT_VALUES: Final = 1 << 22
"""Of targets that stay on the device between steps; more are read again from their file."""


@final
class Composer:
    """One question: its vectors, its way, and what it answers. `run` belongs to the engine thread."""

    def __init__(
        self,
        way: Way,
        source: np.ndarray,
        target: np.ndarray,
        *,
        log_prior: np.ndarray | None,
        top_k: int,
        device: torch.device,
        keep: Callable[[Chain], None] | None = None,
        known: Known | None = None,
    ) -> None:
        """Take a question; `keep` is told a chain with the offsets of its links, once they are found.

        `known` is what earlier questions left, and takes what this one finds.
        """
        self.way = way
        self.device = device
        self.top_k = min(top_k, len(target))
        self._source, self._target, self._keep, self._known = source, target, keep, known
        self._log_prior_given = log_prior
        self._log_prior: Tensor | None = None
        self._z_target: Tensor | None = None
        self._health = Health()
        self._reason: str | None = None
        self._found: list[Found] = []
        self._sizes = Sizes.of(way, len(source), target.shape, self.top_k, known)
        self._steps = self._work()
        self._num_done = 0
        self._failure: Exception | None = None

    def entries(self) -> list[Entry]:
        """Return the steps as the batcher's items, alike in length so that they stay in order."""
        return [Entry(at, self._sizes.length) for at in range(self._sizes.num_steps)]

    def about(self, source: np.ndarray) -> Composer:
        """Ask the same of other sources; what was settled and found for these holds for those."""
        way = self.way
        if isinstance(way, Summed) and self._reason is not None:
            way = replace(way, is_open=False)
        known, log_prior = self._known, self._log_prior_given
        return Composer(
            way,
            source,
            self._target,
            log_prior=log_prior,
            top_k=self.top_k,
            device=self.device,
            keep=self._keep,
            known=known,
        )

    def answer_at_once(self) -> tuple[dict[str, Any], Arrays]:
        """Do all steps, and answer."""
        self.run(range(self._sizes.num_steps))
        return self.answer()

    @torch.inference_mode()
    @within_memory()
    def run(self, steps: Sequence[int]) -> list[None]:
        """Do some steps, the next ones; those that are done already are passed over.

        Raises Unavailable if the device has not the memory for it.
        """
        for step in steps:
            if step < self._num_done:
                continue
            if self._failure is not None:
                raise self._failure
            try:
                with self._sizes.threads():
                    self._step(is_last=step == self._sizes.num_steps - 1)
            except (RuntimeError, MemoryError, ValueError) as error:
                self._failure = error
                raise
            self._num_done = step + 1
        return [None] * len(steps)

    def _step(self, *, is_last: bool) -> None:
        next(self._steps, None)
        if is_last:
            for _ in self._steps:  # their number is an estimate, from above
                pass

    def answer(self) -> tuple[dict[str, Any], Arrays]:
        """Write the document and the tensors of a `ComposeCall`, once all steps are done."""
        flat = 0.0 if self._log_prior_given is not None else math.log(len(self._target))
        return write(self.way, self._found, self._health, reason=self._reason, flat=flat)

    # --- the steps ---

    def _work(self) -> Generator[None]:
        """Do everything, and yield after each part of it that is a step."""
        if self._log_prior_given is not None:
            self._log_prior = torch.tensor(self._log_prior_given, device=self.device, dtype=torch.float64)
        # Here, since `answer` belongs to the event loop, where nobody computes.
        self._health = self._look()
        if isinstance(self.way, Summed):
            yield from self._balance(self.way)
        critic, _ = ways.critics_of(self.way)
        for begin in range(0, len(self._source), self._sizes.sources):
            z = self._on_device(critic, self._source[begin : begin + self._sizes.sources])
            self._found.append((yield from self._answer(z)))

    def _answer(self, z_source: Float[Tensor, "source d1"]) -> Generator[None, None, Found]:
        match self.way:
            case Summed() as way:
                return (yield from self._sum(way, z_source))
            case Compared(critic=critic):
                best = yield from self._rank(len(z_source), lambda z_target: direct(critic, z_source, z_target))
                return Found(best, is_ratio=False)
            case Closed() as way:
                if self._health.apart is None:
                    few = self._targets(ways.spread(len(self._target), ways.PROBED_TARGETS, self.device))
                    apart = ways.apart_from_sum(way, z_source, few)
                    self._health = replace(self._health, apart=apart)
                best = yield from self._rank(
                    len(z_source), lambda z_target: ways.in_closed_form(way, z_source, z_target)
                )
                return Found(best, is_ratio=True)
            case Trained() as way:
                return (yield from self._compare_trained(way, z_source))
            case _:
                assert_never(self.way)

    def _compare_trained(self, way: Trained, z_source: Float[Tensor, "source dim"]) -> Generator[None, None, Found]:
        """Remove each source's offset, log mean e^f over the bank, from its scores (Che & Eysenbach 2025, A2)."""
        bank, num = way.bank, len(z_source)

        def f(z: Float[Tensor, "other dim"]) -> Float[Tensor, "source other"]:
            return way.scale * critics.scores(way.critic, z_source, z).double() + way.bias

        if bank is None:
            return Found((yield from self._rank(num, f)), is_ratio=True)
        f_bank = f(bank)
        offset = f_bank.logsumexp(1, keepdim=True) - math.log(len(bank))
        square = f_bank.softmax(1).square().sum(1)
        variance = (square - 1 / len(bank)).clamp(min=0)
        best = yield from self._rank(num, lambda z_target: f(z_target) - offset)
        return Found(
            best,
            is_ratio=True,
            standard_error=variance.sqrt()[:, None].expand_as(best.score),
            bias=(variance / 2)[:, None].expand_as(best.score),  # the offset is subtracted
            sample_size=(1 / square).clamp(1.0, float(len(bank))),
        )

    def _sum(self, way: Summed, z_source: Float[Tensor, "source d1"]) -> Generator[None, None, Found]:
        chain = way.chain
        masses = [chain.start(z_source)]
        for at in range(1, len(chain.bridges)):
            found = yield from carry(chain.leave(at - 1, masses[-1]), chain.bridges[at].left, width=self._sizes.carried)
            masses.append(chain.arrive(at, found))
        num_targets = len(self._target)
        columns = ways.spread(num_targets, self._sizes.probe, self.device)
        kept = yield from self._columns(chain, columns)
        seen = None if kept is None else (yield from self._look_up(kept, masses[-1]))
        if seen is None:
            kept, seen = None, (yield from self._weigh(chain, masses, columns))
        sizes = seen.effective_sample_size.median(1).values
        ratios = seen.log_ratio[:, columns] if isinstance(seen, Look) else seen.log_ratio
        agreement = None
        if way.comparable:
            compared = direct(chain.links[0].critic, z_source, self._targets(columns))
            agreement = spearman(compared, ratios)
        if way.is_open and self._reason is None and self._choose(way, sizes, agreement) == "direct":
            self.way = Compared(chain.links[0].critic, is_trained=False, bridge=chain.bridges[0].left)
            found = yield from self._answer(z_source)
            return replace(found, sample_size=sizes, rank_agreement=agreement)
        if isinstance(seen, Marginal) and len(columns) == num_targets:
            best = self._best_of(seen.log_ratio)
            error, bias = (each.gather(1, best.index) for each in (seen.standard_error, seen.bias))
        else:
            if isinstance(seen, Look):
                best = self._best_of(seen.log_ratio)
            else:
                best = yield from self._rank(len(z_source), Ending(chain, masses[-1]).log_ratios)
            error, bias = yield from self._weigh_best(chain, masses, best.index, kept)
        return Found(best, is_ratio=True, standard_error=error, bias=bias, sample_size=sizes, rank_agreement=agreement)

    def _columns(self, chain: Chain, probe: Int64[Tensor, " target"]) -> Generator[None, None, Columns | None]:
        """Return the scores of a set with the bridge, found first if need be; None if they are not to be kept."""
        known, width = self._known, self._sizes.added
        if known is None or not width:
            return None
        kept = known.columns
        if kept is None:
            num = len(self._target)
            kept = Columns(chain.bridges[-1], probe, num_targets=num, normalise=chain.normalise)
            for begin in range(0, num, width):
                kept.add(chain.links[-1], self._targets(slice(begin, begin + width)))
                yield
            known.keep_columns(kept)
        return kept

    def _look_up(self, kept: Columns, log_mass: Float[Tensor, "source bridge"]) -> Generator[None, None, Look | None]:
        parts: list[Tensor] = []
        mass = kept.place(log_mass)
        for begin in range(0, len(self._target), self._sizes.taken):
            parts.append(kept.sums(mass, slice(begin, begin + self._sizes.taken)))
            yield
        return kept.look(mass, torch.cat(parts, 1))

    def _best_of(self, log_ratio: Float[Tensor, "source target"]) -> Best:
        ranking = Ranking(len(log_ratio), self.top_k, device=self.device)
        ranking.add(0, log_ratio, self._log_prior)
        return ranking.best()

    def _look(self) -> Health:
        """Look at the bridges, unless somebody did."""
        if self._known is None or not isinstance(self.way, Summed):
            return ways.look_at(self.way)
        health = self._known.health
        if health is None:
            health = ways.look_at(self.way)
            self._known.keep_health(health)
        return health

    def _balance(self, way: Summed) -> Generator[None]:
        """Find the offsets of the links between two bridges, unless they are known."""
        chain = way.chain
        if len(chain.offsets) < len(chain.bridges) - 1:
            offsets: list[Offsets] = []
            for at in range(1, len(chain.bridges)):
                first, second = chain.bridges[at - 1 : at + 1]
                offsets.append((yield from balancing(chain.links[at], first, second, width=self._sizes.carried)))
            chain = replace(chain, offsets=tuple(offsets))
            self.way = replace(way, chain=chain)
            if self._keep is not None:
                self._keep(chain)
        deviation = max((each.deviation for each in chain.offsets), default=0.0)
        self._health = replace(self._health, deviation=deviation)

    def _weigh(
        self, chain: Chain, masses: list[Tensor], columns: Int64[Tensor, " target"]
    ) -> Generator[None, None, Marginal]:
        """Look closely at some targets."""
        parts: list[Marginal] = []
        for chosen in columns.split(self._sizes.weighed):
            parts.append(chain.weigh(masses, self._targets(chosen)))
            yield
        return Marginal(
            *(
                torch.cat([getattr(part, name) for part in parts], 1)
                for name in ("log_ratio", "standard_error", "bias", "effective_sample_size")
            ),
            trusted=parts[0].trusted,
        )

    def _weigh_best(
        self, chain: Chain, masses: list[Tensor], index: Int64[Tensor, "source best"], kept: Columns | None
    ) -> Generator[None, None, tuple[Float[Tensor, "source best"], Float[Tensor, "source best"]]]:
        """Return the standard errors and biases of each source's best targets."""
        error = torch.empty(index.shape, dtype=torch.float64, device=self.device)
        bias = torch.empty_like(error)
        for chosen in index.unique().split(self._sizes.weighed):
            found = None if kept is None else kept.weigh(masses[-1], chosen)
            if found is None:
                found = chain.weigh(masses, self._targets(chosen))
            rows, ranks = ((index >= chosen[0]) & (index <= chosen[-1])).nonzero(as_tuple=True)
            at = torch.searchsorted(chosen, index[rows, ranks])
            error[rows, ranks], bias[rows, ranks] = found.standard_error[rows, at], found.bias[rows, at]
            yield
        return error, bias

    def _rank(
        self, num_sources: int, score: Callable[[Float[Tensor, "target d2"]], Float[Tensor, "source target"]]
    ) -> Generator[None, None, Best]:
        ranking = Ranking(num_sources, self.top_k, device=self.device)
        for begin in range(0, len(self._target), self._sizes.ranked):
            chosen = slice(begin, begin + self._sizes.ranked)
            prior = None if self._log_prior is None else self._log_prior[chosen]
            ranking.add(begin, score(self._targets(chosen)), prior)
            yield
        return ranking.best()

    def _choose(
        self, way: Summed, sizes: Float[Tensor, " source"], agreement: Float[Tensor, " source"] | None
    ) -> Method:
        """Settle what the call leaves open, from what was seen for the first sources."""
        if self._log_prior is not None:
            method, self._reason = "marginal", "a prior weighs ratios, which comparing vectors does not give"
        elif len(way.chain.bridges) > 1:
            method, self._reason = "marginal", "several bridges are summed over"
        else:
            method, self._reason = choose(
                way.chain.links[0].critic,
                comparable=way.comparable,
                resultant=self._health.resultant,
                sample_size=float(sizes.median()),
                rank_agreement=None if agreement is None else number(float(agreement.nanmedian())),
            )
        return method

    def _targets(self, chosen: slice | Int64[Tensor, " target"]) -> Float[Tensor, "target d2"]:
        """Return some targets, prepared; a few stay on the device, many are read where they lie."""
        _, critic = ways.critics_of(self.way)
        if self._target.size > MAX_KEPT_VALUES or self._sizes.added:
            at = chosen if isinstance(chosen, slice) else chosen.cpu().numpy()
            return self._on_device(critic, self._target[at])
        if self._z_target is None:
            self._z_target = self._on_device(critic, self._target)
        return self._z_target[chosen]

    def _on_device(self, critic: Critic, z: np.ndarray) -> Float[Tensor, "row dim"]:
        return critics.prepare(critic, torch.tensor(z, device=self.device))
