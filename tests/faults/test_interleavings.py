"""Whatever is done to the queue in whatever order, the database says what a small model in memory says.

Time moves by hand: the instants of rows are put back, so that a worker has been silent, a job is due, or an end is long
ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeVar

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.dialects.postgresql import insert

from service.contract import leases, outcomes, queue
from service.contract.dialects import after
from service.contract.errors import Conflict, Malformed, NotFound
from service.contract.jobs import KINDS, POLICIES, IngestArgs, IngestResult, Lane, TrainArgs, TrainResult
from service.contract.leases import Claim, WorkerInfo
from service.contract.outcomes import Batch, Saved
from service.contract.recipe import Budget
from service.contract.tables import (
    checkpoint,
    dataset,
    job,
    job_event,
    job_progress,
    job_result,
    metadata,
    metric,
    model,
    tenant_queue,
    worker,
)
from service.contract.word import new_id

T = TypeVar("T")
Kind = Literal["ingest", "train"]
TTL_S: Final = 20.0
HOUR_S: Final = 3600.0
RECENT: Final = st.integers(0, 9)
UNFINISHED: Final = frozenset({"scheduled", "queued", "running"})
ORDER: Final = {False: (job.c.priority, job.c.fair_seq, job.c.id), True: (job.c.fair_seq, job.c.id)}
RECIPE: Final[dict[str, Any]] = {
    "towers": {
        "image": {"tokens": {"kind": "image", "size": 8, "patch": 4}},
        "text": {"tokens": {"kind": "text"}},
    },
}


@dataclass
class Job:
    """What the database has to say of a job, and what may become of it."""

    public_id: str
    tenant: str
    kind: Kind
    key: str | None
    state: str
    made: str | None  # the state of the data set that an ingest job makes
    due: bool = False
    old: bool = False
    overrun: bool = False
    epoch: int = 0
    attempt: int = 0
    owner: str | None = None
    asked: bool = False
    result: int | None = None  # the epoch that it is of
    done: int | None = None
    steps: dict[int, int] = field(default_factory=dict[int, int])  # checkpoint -> the epoch that it is of
    history: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    @property
    def lane(self) -> Lane:
        return POLICIES[self.kind].lane

    def holds(self, held: Held) -> bool:
        return (self.owner, self.epoch) == (held.worker, held.claim.epoch)

    def say(self, what: str) -> None:
        self.history.append((what, self.epoch))

    def start(self, owner: str) -> None:
        self.state, self.owner, self.epoch, self.attempt = "running", owner, self.epoch + 1, self.attempt + 1
        self.say("started")

    def leave(self, state: str, what: str, *, unburnt: int = 0) -> str:
        """Stop running or waiting; whoever was asked to stop does nothing else."""
        if self.asked and self.state == "running":
            state, what, unburnt = "cancelled", "cancelled", 0
        self.state, self.owner, self.due, self.overrun = state, None, False, False
        self.attempt -= unburnt
        if state not in UNFINISHED:
            self.made = self.made and ("ready" if state == "succeeded" else "failed")
        self.result = self.epoch if state == "succeeded" else None
        self.say(what)
        return state

    def give_up(self, *, retry: bool) -> str:
        if retry and self.attempt < POLICIES[self.kind].max_attempts:
            return self.leave("scheduled", "retrying")
        return self.leave("failed", "failed")

    def record(self, step: int) -> bool:
        self.done = step
        if self.kind == "train":
            passed_over = [at for at, epoch in self.steps.items() if epoch < self.epoch and at > step]
            self.steps = {at: epoch for at, epoch in self.steps.items() if at not in passed_over} | {step: self.epoch}
            newest = sorted(self.steps)[-Budget().keep_checkpoints :]
            self.steps = {at: self.steps[at] for at in newest}
        self.say("noted")
        return True

    def cancel(self) -> str:
        if self.state == "running":
            self.asked = True
            self.say("cancelling")
            return "running"
        self.asked = True
        return self.leave("cancelled", "cancelled")

    def retry(self) -> None:
        self.state, self.attempt, self.asked, self.old = "queued", 0, False, False
        self.made = self.made and "ingesting"
        self.say("queued")


def _recent(found: list[T], at: int) -> T:
    """Choose the last but `at`: what is new is of more interest, what is old must be refused."""
    return found[-1 - at % len(found)]


@dataclass(frozen=True)
class Held:
    """A claim and whose it is."""

    claim: Claim
    worker: str


class Interleavings(RuleBasedStateMachine):
    """The moves of callers, of workers and of time, each made in the model and in the database."""

    engine: sa.Engine

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, Job] = {}
        self.names: list[str] = []  # of jobs, also those that were pruned
        self.held: list[Held] = []  # every claim that was ever made
        self.workers: list[str] = []
        self.num_models = 0
        self.alive: dict[str, bool] = {}  # worker -> whether it was heard of within the time to live
        self.draining: set[str] = set()
        self.caps: dict[tuple[str, str], int | None] = {}
        with self.engine.begin() as conn:
            for table in reversed(metadata.sorted_tables):
                conn.execute(sa.delete(table))
            row = {"name": "n", "source": "s", "state": "ready", "digest": "d"}
            for tenant in ("a", "b"):
                own = {"id": f"ds_{tenant}", "tenant_id": tenant, "artifact": f"datasets/ds_{tenant}/1"}
                conn.execute(sa.insert(dataset).values(**row, **own))

    def execute(self, statement: sa.Executable) -> int:
        with self.engine.begin() as conn:
            return conn.execute(statement).rowcount

    def put_back(self, public_ids: Sequence[str], column: sa.Column[datetime], seconds: float) -> None:
        """Move an instant of jobs into the past, or for negative seconds into the future."""
        moved = {column.name: after(sa.literal(-seconds, sa.Double))}
        self.execute(sa.update(job).where(job.c.public_id.in_(public_ids)).values(**moved))

    # What callers do

    @rule(
        tenant=st.sampled_from(["a", "a", "b"]),
        kind=st.sampled_from(["ingest", "ingest", "train"]),
        key=st.sampled_from([None, None, "k"]),
        priority=st.integers(0, 9),
        cost=st.sampled_from([1, 10]),
        later=st.sampled_from([None, None, -HOUR_S, HOUR_S]),
        num=st.integers(1, 3),
    )
    def enqueue(
        self, tenant: str, kind: Kind, key: str | None, priority: int, cost: int, later: float | None, num: int
    ) -> None:
        run_at = None if later is None else datetime.now(UTC) + timedelta(seconds=later)
        for _ in range(num):
            with self.engine.begin() as conn:
                if kind == "train":
                    pair = {"dataset": f"ds_{tenant}", "modalities": ["image", "text"]}
                    args = TrainArgs.model_validate({"recipe": {**RECIPE, "pairs": [pair]}})
                else:
                    args = IngestArgs(dataset=new_id("ds"), source="s")
                    row = {"id": args.dataset, "tenant_id": tenant, "name": "n", "source": "s", "state": "ingesting"}
                    conn.execute(sa.insert(dataset).values(**row))
                public_id = queue.enqueue(
                    conn, tenant=tenant, args=args, priority=priority, run_at=run_at, unique_key=key, cost=cost
                )
            same = self.unfinished(tenant, kind, key)
            event("enqueued again" if same else "enqueued")
            assert [public_id] == same if same else public_id not in self.model
            if not same:
                state = "scheduled" if later is not None and later > 0 else "queued"
                added = Job(public_id, tenant, kind, key, state, made="ingesting" if kind == "ingest" else None)
                added.say("queued")
                self.model[public_id] = added
                self.names.append(public_id)

    def unfinished(self, tenant: str, kind: Kind, key: str | None) -> list[str]:
        """Return the job, if any, that has a unique key."""
        return [
            each.public_id
            for each in self.model.values()
            if key is not None
            and (each.tenant, each.kind, each.key) == (tenant, kind, key)
            and each.state in UNFINISHED
        ]

    @rule(at=RECENT, what=st.sampled_from(["cancel", "retry"]))
    def ask(self, at: int, what: str) -> None:
        public_id = _recent(self.names, at)
        if what == "cancel":
            self.cancel(public_id)
        else:
            self.retry(public_id)

    def cancel(self, public_id: str) -> None:
        each = self.model.get(public_id)
        tenant = each.tenant if each is not None else "a"
        error = NotFound if each is None else Malformed
        with self.engine.begin() as conn:
            if each is None or each.state not in UNFINISHED:
                with pytest.raises(error):
                    queue.cancel(conn, tenant, public_id)
                return
            event(f"cancelled while {each.state}")
            assert queue.cancel(conn, tenant, public_id) == each.cancel()

    def retry(self, public_id: str) -> None:
        each = self.model.get(public_id)
        if each is None:
            expected: type[Exception] | None = NotFound
        elif each.state not in ("failed", "cancelled"):
            expected = Malformed
        else:
            expected = Conflict if self.unfinished(each.tenant, each.kind, each.key) else None
        event(f"retry: {expected.__name__ if expected else 'queued'}")
        tenant = each.tenant if each is not None else "a"
        if each is None or expected is not None:
            with pytest.raises(expected or NotFound), self.engine.begin() as conn:
                queue.retry(conn, tenant, public_id)
            return
        with self.engine.begin() as conn:
            assert queue.retry(conn, tenant, public_id) == "queued"
        each.retry()

    @rule(
        tenant=st.sampled_from(["a", "b"]), lane=st.sampled_from(["bulk", "train"]), cap=st.sampled_from([1, 2, None])
    )
    def cap(self, tenant: str, lane: str, cap: int | None) -> None:
        row = insert(tenant_queue).values(tenant_id=tenant, lane=lane, vtime=0, max_running=cap)
        self.execute(row.on_conflict_do_update(index_elements=["tenant_id", "lane"], set_={"max_running": cap}))
        self.caps[tenant, lane] = cap

    # What workers do

    @initialize()
    def begin(self) -> None:
        """Begin with some work waiting and some under way, of which each worker has lost one and claimed it again."""
        for kind in ("ingest", "ingest", "train"):
            self.enqueue("a", kind, None, 5, 1, None, 2)
        for _ in range(2):
            self.start()
            self.claim(0, "bulk", 1, oldest=False)
            self.work(0, "release", 1, late=False)
            self.claim(0, "bulk", 1, oldest=False)

    def start(self) -> None:
        name = new_id("up")
        leases.register(self.engine, WorkerInfo(name, ["bulk"], list(KINDS), "h", "b", 1, None, "cpu", "0"))
        self.alive[name] = True
        self.workers.append(name)

    @rule(at=RECENT, what=st.sampled_from(["beats", "falls silent", "falls silent", "drains", "leaves", "is killed"]))
    def happens_to(self, at: int, what: str) -> None:
        name = _recent(self.workers, at)
        known = name in self.alive
        event(f"a worker {what}")
        match what:
            case "beats":
                beat = leases.heartbeat(self.engine, name)
                assert (beat.alive, beat.draining) == (known, known and name in self.draining)
                self.alive |= {name: True} if known else {}
            case "falls silent":
                silent = after(sa.literal(-2 * TTL_S, sa.Double))
                self.execute(sa.update(worker).where(worker.c.id == name).values(last_seen=silent))
                self.alive |= {name: False} if known else {}
            case "drains":
                leases.drain(self.engine, name)
                self.draining |= {name} if known else set()
            case "leaves":
                leases.unregister(self.engine, name)
                self.alive.pop(name, None)
            case _:
                self.put_down(leases.forget(self.engine, [name]), [x for x in self.model.values() if x.owner == name])
                self.alive.pop(name, None)
        if not any(heard and each not in self.draining for each, heard in self.alive.items()):
            self.start()

    def rescue(self) -> None:
        dead = {each.owner for each in self.model.values() if not self.alive.get(each.owner or "", False)}
        lost = [x for x in self.model.values() if x.state == "running" and (x.overrun or x.owner in dead)]
        event("rescued" if lost else "nothing to rescue")
        self.put_down(leases.rescue(self.engine, ttl_s=TTL_S), lost)
        self.alive = {name: heard for name, heard in self.alive.items() if heard}

    def put_down(self, found: list[tuple[str, Any]], lost: list[Job]) -> None:
        """Agree on what became of jobs whose worker is gone."""
        assert dict(found) == {each.public_id: each.give_up(retry=True) for each in lost}
        # The delay is drawn and may be next to nothing; here a job is due only by `pass_time`.
        self.put_back([each.public_id for each in lost if each.state == "scheduled"], job.c.run_at, -HOUR_S)

    @rule(at=RECENT, lane=st.sampled_from(["bulk", "bulk", "train"]), limit=st.integers(1, 4), oldest=st.booleans())
    def claim(self, at: int, lane: Lane, limit: int, *, oldest: bool) -> None:
        name = _recent(self.workers, at)
        with self.engine.connect() as conn:
            line = sa.select(job.c.public_id).where(job.c.state == "queued", job.c.lane == lane)
            waiting = [self.model[public_id] for public_id in conn.scalars(line.order_by(*ORDER[oldest]))]
        expected: list[Job] = []
        for each in waiting if self.alive.get(name, False) and name not in self.draining else ():
            running = sum(
                x.owner is not None and (x.tenant, x.lane) == (each.tenant, lane) for x in self.model.values()
            )
            cap = self.caps.get((each.tenant, lane))
            if len(expected) < limit and (cap is None or running < cap):
                each.start(name)
                expected.append(each)
            elif len(expected) < limit:
                event("capped")
        found = leases.claim(
            self.engine, worker_id=name, lane=lane, kinds=KINDS, ttl_s=TTL_S, limit=limit, oldest=oldest
        )
        assert [each.public_id for each in found] == [each.public_id for each in expected]
        for got, each in zip(found, expected, strict=True):
            assert (got.epoch, got.attempt, got.tenant_id) == (each.epoch, each.attempt, each.tenant)
            newest = sorted(each.steps.items(), reverse=True)
            assert got.resume == [f"checkpoints/{each.public_id}/{step}-{epoch}" for step, epoch in newest]
        event(f"claimed {len(found)}")
        self.held += [Held(each, name) for each in found]

    @rule(
        at=RECENT,
        what=st.sampled_from(
            ["finish", "finish all", "fail", "fail", "give up", "release", "snooze", "stop", "record", "record"]
        ),
        step=st.integers(1, 9),
        late=st.booleans(),
    )
    def work(self, at: int, what: str, step: int, *, late: bool) -> None:
        """Let whoever made a claim go on with it, whether or not the job is still its own."""
        wanted = [each for each in self.held if (self.mine(each) is None) is late and self.runs(each)]
        held = _recent(wanted or self.held, at)
        event(f"late: {late}, wanted: {bool(wanted)}")
        claim, me, engine = held.claim, held.worker, self.engine
        mine = self.mine(held)
        event(f"{what} {'held' if mine else 'lost'}")
        error = {"type": "E", "message": "m", "code": None}
        match what:
            case "finish":
                assert outcomes.finish(engine, claim, me, _product(claim)) == self.finish(held)
            case "finish all":
                all_held = [each for each in self.held if each.worker == me]
                ends = [(each.claim, _product(each.claim)) for each in all_held]
                assert outcomes.finish_many(engine, me, ends) == [self.finish(each) for each in all_held]
            case "fail" | "give up":
                found = outcomes.fail(engine, claim, me, error, retry=what == "fail", delay_s=HOUR_S)
                assert found == (mine and mine.give_up(retry=what == "fail"))
            case "release":
                found = outcomes.release(engine, claim, me)
                assert found == (mine and mine.leave("queued", "released", unburnt=1))
            case "snooze":
                found = outcomes.snooze(engine, claim, me, HOUR_S)
                assert found == (mine and mine.leave("scheduled", "snoozed", unburnt=1))
            case "stop":
                assert outcomes.cancelled(engine, claim, me) == (mine and mine.leave("cancelled", "cancelled"))
            case _:
                assert outcomes.record(engine, claim, me, _report(claim, step)) is (
                    mine is not None and mine.record(step)
                )

    def finish(self, held: Held) -> str | None:
        """Finish in the model; who says so again hears so again."""
        mine, each = self.mine(held), self.model.get(held.claim.public_id)
        if mine is None:
            return "succeeded" if each is not None and each.result == held.claim.epoch else None
        state = mine.leave("succeeded", "succeeded")
        self.num_models += state == "succeeded" and mine.kind == "train"
        return state

    def mine(self, held: Held) -> Job | None:
        each = self.model.get(held.claim.public_id)
        return each if each is not None and each.holds(held) else None

    def runs(self, held: Held) -> bool:
        """Tell whether the job of a claim runs, be it under another claim, perhaps of the same worker."""
        each = self.model.get(held.claim.public_id)
        return each is not None and each.owner is not None

    # What time does

    @rule(at=RECENT, what=st.sampled_from(["promote", "rescue", "prune"]), passes=st.booleans())
    def time(self, at: int, what: str, *, passes: bool) -> None:
        if passes:
            self.pass_time(_recent(self.names, at), what)
        match what:
            case "promote":
                self.promote()
            case "rescue":
                self.rescue()
            case _:
                self.prune()

    def pass_time(self, but: str, what: str) -> None:
        """Let jobs, all but one, be due, over their deadlines, or finished long ago."""
        others = [each for each in self.model.values() if each.public_id != but]
        if what == "promote":
            column, found = job.c.run_at, [each for each in others if each.state == "scheduled"]
        elif what == "rescue":
            column, found = job.c.deadline_at, [each for each in others if each.state == "running"]
        else:
            column, found = job.c.finished_at, [each for each in others if each.state not in UNFINISHED]
        self.put_back([each.public_id for each in found], column, HOUR_S)
        for each in found:
            each.due, each.overrun, each.old = what == "promote", what == "rescue", what == "prune"

    def promote(self) -> None:
        due = [each for each in self.model.values() if each.state == "scheduled" and each.due]
        event("promoted" if due else "nothing to promote")
        assert leases.promote(self.engine) == len(due)
        for each in due:
            each.state, each.due = "queued", False

    def prune(self) -> None:
        old = [each.public_id for each in self.model.values() if each.old]
        event("pruned" if old else "nothing to prune")
        assert queue.prune(self.engine, older_than_s=HOUR_S / 2) == len(old)
        for public_id in old:
            del self.model[public_id]

    # What must hold after every one of them

    @invariant()
    def the_database_says_what_the_model_says(self) -> None:
        with self.engine.connect() as conn:
            rows = conn.execute(_JOBS).all()
            events = conn.execute(
                sa.select(job_event.c.job_id, job_event.c.type, job_event.c.epoch).order_by("id")
            ).all()
            steps = conn.execute(sa.select(checkpoint.c.job_id, checkpoint.c.step, checkpoint.c.epoch)).all()
            made = {row.id: row.state for row in conn.execute(sa.select(dataset.c.id, dataset.c.state))}
            results = conn.execute(sa.select(job_result.c.job_id)).all()
            metrics = set(conn.scalars(sa.select(metric.c.job_id)))
            num_models = conn.scalar(sa.select(sa.func.count()).select_from(model))
            registered = set(conn.scalars(sa.select(worker.c.id)))
        assert registered == set(self.alive)
        assert num_models == self.num_models
        assert len(results) == sum(row.state == "succeeded" for row in rows)
        assert {row.public_id for row in rows} == set(self.model)
        assert metrics == {row.id for row in rows if row.done is not None}
        for row in rows:
            each = self.model[row.public_id]
            assert (row.state, row.attempt, row.lease_epoch, row.worker_id) == (
                each.state,
                each.attempt,
                each.epoch,
                each.owner,
            )
            assert (row.asked, row.result, row.done) == (each.asked, each.result, each.done)
            assert made.get(row.args.get("dataset")) == each.made
            assert [(x.type, x.epoch) for x in events if x.job_id == row.id] == each.history
            assert {x.step: x.epoch for x in steps if x.job_id == row.id} == each.steps


_JOBS: Final = (
    sa.select(
        job,
        job.c.cancel_requested_at.is_not(None).label("asked"),
        job_result.c.epoch.label("result"),
        job_progress.c.done,
    )
    .outerjoin(job_result, job_result.c.job_id == job.c.id)
    .outerjoin(job_progress, job_progress.c.job_id == job.c.id)
)


def _product(claim: Claim) -> IngestResult | TrainResult:
    if claim.kind == "train":
        return TrainResult(
            artifact=f"models/{new_id('model')}/{claim.epoch}",
            modalities=["image", "text"],
            dimensions=2,
            logit_scales={},
            metrics={},
            digest="d",
            num_bytes=1,
        )
    return IngestResult(
        artifact=f"datasets/ds_x/{claim.epoch}",
        num_samples=1,
        num_rejected=0,
        rejects=[],
        modalities={"text": "text"},
        splits={"train": 1},
        labels=[],
        statistics={},
        digest="d",
        num_bytes=1,
    )


def _report(claim: Claim, step: int) -> Batch:
    saved = Saved(step, f"checkpoints/{claim.public_id}/{step}-{claim.epoch}", "d", {})
    return Batch(
        progress=(step, 9, None),
        events=[("noted", {})],
        metrics=[(step, {"loss": 1.0})],
        checkpoints=[saved] if claim.kind == "train" else [],
    )


def _run(engine: sa.Engine, *, examples: int, steps: int, derandomize: bool) -> None:
    machine = type("Machine", (Interleavings,), {"engine": engine})
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=derandomize,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    run_state_machine_as_test(machine, settings=profile)


def test_model_and_database_agree_after_every_move(engine: sa.Engine) -> None:
    _run(engine, examples=80, steps=30, derandomize=True)


@pytest.mark.slow
def test_model_and_database_agree_after_every_move_of_many(engine: sa.Engine) -> None:
    _run(engine, examples=400, steps=60, derandomize=False)
