"""The supervisor: claims jobs, gives each to a runner, writes down what it says and how it ends. It loads no torch.

One thread does everything but the heartbeat. It sleeps until a runner writes, a hint comes, a signal comes or a tick is
due. All database work of a turn stands in `_turn`; when the database is away the runners go on, what they say is kept,
and the turn is tried again later.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import selectors
import shutil
import signal
import socket
import time
from collections.abc import Iterable
from typing import Final, cast, final

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.contract import leases, outcomes
from service.contract.dialects import open_engine, risks
from service.contract.jobs import KINDS, Lane
from service.contract.leases import about
from service.contract.outcomes import Batch
from service.contract.settings import Settings
from service.contract.wake import Listener
from service.contract.word import new_id
from worker.cpus import num_cpus
from worker.heartbeat import Heartbeat
from worker.inference import Inference
from worker.metrics import Metrics
from worker.registration import bury_neighbours, describe
from worker.running import Failed, Running
from worker.settling import settle
from worker.slot import Slot
from worker.sweeper import Sweeper

_log = logging.getLogger(__name__)
_HINT_S: Final = 0.02  # between two turns that hints asked for
_HOUSEKEEPING_S: Final = 3600.0
_LAST_WRITES_S: Final = 5.0  # for a database that is away while the supervisor stops


@final
class Supervisor:
    """One worker: its lanes' slots, its inference process, its row."""

    def __init__(self, settings: Settings) -> None:
        lanes = settings.lane_set()
        self._settings = settings
        url = settings.resolved_database_url()
        self._engine = open_engine(url, pool_size=3)
        self._listener = Listener(self._engine)
        self._heartbeat = Heartbeat(url, settings.heartbeat_s)
        self._metrics = Metrics(heartbeat_age_s=self._heartbeat.age_s)
        if settings.metrics_listen is not None:
            self._metrics.serve(settings.metrics_listen)
        self._sweeper = Sweeper(
            self._engine, settings.resolved_store_url(), job_retention_days=settings.job_retention_days
        )
        self._worker_id: str | None = None
        self._first_id = new_id("worker")
        self._scratch = settings.data.resolve() / "scratch" / self._first_id
        environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        cpus = num_cpus()
        self._all_threads, self._job_threads = cpus, max(1, cpus - 1) if "serve" in lanes else cpus
        self._inference = Inference(settings, environment=environment, num_threads=cpus) if "serve" in lanes else None
        job_lanes = cast("list[Lane]", [lane for lane in ("train", "bulk") if lane in lanes])
        self._slots = [Slot(lane, preload=settings.preload, environment=environment) for lane in job_lanes]
        self._signals = 0
        self._stop_at: float | None = None
        self._announced = False
        self._next_tick = self._next_rescue = self._next_housekeeping = 0.0
        self._database_at = 0.0
        self._outages = 0
        self._turn_at = 0.0

    def run(self) -> int:
        """Work until a signal says stop; return the exit status."""
        waker, woken = socket.socketpair()
        for end in (waker, woken):
            end.setblocking(False)  # noqa: FBT003  # positional in the standard library
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._scratch.mkdir(parents=True, exist_ok=True)
        for risk in risks(self._settings.resolved_database_url()):
            _log.warning(risk)
        try:
            while not self._finished():
                self._wait(woken)
                self._look_after_children()
                if self._is_due():
                    self._turn_guarded()
        finally:
            self._close()
            waker.close()
            woken.close()
        return 0

    # Signals and sleep

    def _on_signal(self, number: int, _frame: object) -> None:
        # The second one, or the first from a terminal, waits for nobody.
        self._signals += 2 if number == signal.SIGINT else 1

    def _wait(self, woken: socket.socket) -> None:
        self._listener.open()
        until = self._next_tick if not self._outages else self._database_at
        timeout_s = max(0.0, min(until - time.monotonic(), self._settings.tick_s))
        with selectors.DefaultSelector() as selector:
            selector.register(woken, selectors.EVENT_READ)
            if (hints := self._listener.fileno()) is not None:
                selector.register(hints, selectors.EVENT_READ, "hint")
            for running in self._running():
                if not running.child.ended:
                    selector.register(running.child, selectors.EVENT_READ)
            # A runner whose channel is closed is about to be gone: look again soon.
            leaving = any(running.child.ended and running.status is None for running in self._running())
            ready = selector.select(min(timeout_s, 0.01) if leaving else timeout_s)
        if any(key.data == "hint" for key, _ in ready):
            self._listener.drain()
            pause = self._turn_at + _HINT_S - time.monotonic()
            if pause > 0:
                time.sleep(pause)  # a thousand hints a second are a few dozen turns
            self._next_tick = 0.0
        with contextlib.suppress(BlockingIOError):
            woken.recv(64)

    def _running(self) -> Iterable[Running]:
        return [slot.running for slot in self._slots if slot.running is not None]

    # Processes

    def _look_after_children(self) -> None:
        now = time.monotonic()
        if self._signals and self._stop_at is None:
            self._stop_at = now + self._settings.shutdown_grace_s
            _log.info("stopping", extra={"fields": {"grace_s": self._settings.shutdown_grace_s}})
            for running in self._running():
                running.ask("interrupt", self._settings.shutdown_grace_s)
            self._next_tick = 0.0
        if self._signals > 1 and self._stop_at is not None and self._stop_at > now:
            self._stop_at = now
            for running in self._running():
                running.ask("interrupt", 0)
                running.kill_after(0, "cancel" if running.asked == "cancel" else "interrupt")
        for slot in self._slots:
            if slot.running is not None:
                slot.running.read()
            slot.prepare(stopping=self._stop_at is not None)
            if slot.free():
                self._next_tick = 0.0
        if self._inference is not None:
            if self._stop_at is None:
                self._inference.keep()
            busy = any(slot.running is not None for slot in self._slots)
            self._inference.control("threads", 1 if busy else self._all_threads)
            self._inference.control("memory", self._settings.serve_memory_fraction if busy else 1.0)

    def _finished(self) -> bool:
        if self._stop_at is None:
            return False
        return not any(self._running()) or time.monotonic() > self._stop_at + _LAST_WRITES_S

    def _close(self) -> None:
        for slot in self._slots:
            slot.close()
        if self._inference is not None:
            self._inference.stop(grace_s=0.0 if self._signals > 1 else 2.0)
        if self._worker_id is not None:
            try:
                leases.unregister(self._engine, self._worker_id)
            except (DBAPIError, PoolTimeout) as error:
                _log.warning("the worker's row stays behind", extra={"fields": {"error": _first_line(error)}})
        self._heartbeat.stop()
        self._listener.close()
        self._engine.dispose()
        shutil.rmtree(self._scratch, ignore_errors=True)
        _log.info("stopped", extra={"fields": {"worker": self._worker_id}})

    # The database

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now < self._database_at:
            return False
        return now >= self._next_tick or self._heartbeat.declared_dead or any(x.is_due(now) for x in self._running())

    def _turn_guarded(self) -> None:
        try:
            self._turn()
        except (DBAPIError, PoolTimeout) as error:
            self._metrics.database(is_up=False, was_up=not self._outages)
            self._outages += 1
            pause_s = min(5.0, 0.1 * 2**self._outages) * (0.5 + random.random() / 2)
            self._database_at = time.monotonic() + pause_s
            fields = {"error": _first_line(error), "again_in_s": round(pause_s, 2)}
            _log.error("the database does not answer", extra={"fields": fields})
        else:
            if self._outages:
                _log.info("the database answers again")
            self._metrics.database(is_up=True, was_up=not self._outages)
            self._outages, self._database_at = 0, 0.0

    def _turn(self) -> None:
        now = self._turn_at = time.monotonic()
        if self._worker_id is None or self._heartbeat.declared_dead:
            self._register()
        for slot in self._slots:
            if slot.running is not None:
                self._write(slot.running)
                slot.free()
        if now < self._next_tick:
            return
        if self._stop_at is not None and not self._announced and self._worker_id is not None:
            leases.drain(self._engine, self._worker_id)
            self._announced = True
        leases.promote(self._engine)
        # After a write: on SQLite a hint comes just before its commit, and a reader would not wait for that.
        self._follow_leases()
        self._rescue(now)
        if self._stop_at is None:
            for slot in self._slots:
                if slot.running is None:
                    self._claim(slot)
        self._next_tick = now + self._settings.tick_s

    def _register(self) -> None:
        if self._worker_id is not None:
            _log.error("this worker was declared dead", extra={"fields": {"worker": self._worker_id}})
            for running in self._running():
                running.kill_after(0, "lost")
        first = self._worker_id is None
        endpoint = None if self._inference is None else self._inference.endpoint
        info = describe(self._settings, self._first_id if first else new_id("worker"), endpoint)
        if first:
            for _, state in bury_neighbours(self._engine, info, self._scratch.parent):
                self._metrics.rescues.labels(state).inc()
        leases.register(self._engine, info)
        if self._worker_id is not None:  # if it was only the row that went, nobody need wait for the rest
            for _, state in leases.forget(self._engine, [self._worker_id]):
                self._metrics.rescues.labels(state).inc()
        self._worker_id = info.id
        self._heartbeat.beat_for(info.id)
        fields = {"worker": info.id, "lanes": ",".join(info.lanes), "endpoint": info.endpoint, "device": info.device}
        _log.info("registered", extra={"fields": fields})

    def _follow_leases(self) -> None:
        assert self._worker_id is not None
        held = leases.leases(self._engine, self._worker_id)
        for running in self._running():
            lease = held.pop(running.claim.id, None)
            if running.settled or running.outcome is not None:
                continue
            if lease is None or lease.epoch != running.claim.epoch:
                _log.error("the lease is lost", extra={"fields": about(running.claim)})
                running.kill_after(0, "lost")
            elif lease.cancel_requested:
                running.ask("cancel", self._settings.cancel_grace_s)
        for lease in held.values():
            # Claimed in a transaction whose answer never came: nobody runs it.
            state = outcomes.release(self._engine, lease, self._worker_id)
            _log.warning("released, as nobody runs it", extra={"fields": {**about(lease), "state": state or "lost"}})

    def _rescue(self, now: float) -> None:
        # After an outage everybody looks dead for a moment: only who has been well for a while may judge.
        settings = self._settings
        if now < self._next_rescue or self._heartbeat.well_for_s() < settings.worker_ttl_s:
            return
        self._next_rescue = now + settings.heartbeat_s
        for _, state in leases.rescue(self._engine, ttl_s=settings.worker_ttl_s, by=self._worker_id):
            self._metrics.rescues.labels(state).inc()
        if now >= self._next_housekeeping:
            self._next_housekeeping = now + _HOUSEKEEPING_S
            self._sweeper.start()

    def _claim(self, slot: Slot) -> None:
        assert self._worker_id is not None
        ttl_s = self._settings.worker_ttl_s
        with self._metrics.claim_seconds.labels(slot.lane).time():
            claims = leases.claim(
                self._engine,
                worker_id=self._worker_id,
                lane=slot.lane,
                kinds=KINDS,
                ttl_s=ttl_s,
                oldest=slot.wants_oldest,
            )
        for claim in claims:
            self._metrics.claims.labels(claim.kind).inc()
            _log.info("claimed", extra={"fields": {**about(claim), "kind": claim.kind, "tenant": claim.tenant_id}})
            settings = self._settings
            try:
                slot.start(
                    claim,
                    scratch=self._scratch / f"{claim.public_id}-{claim.epoch}",
                    store_url=settings.resolved_store_url(),
                    import_folders=settings.resolved_import_folders(),
                    device=settings.device,
                    num_threads=self._job_threads,
                )
            except OSError as error:
                _log.error("no runner could be started", extra={"fields": {**about(claim), "error": str(error)}})
                if outcomes.snooze(self._engine, claim, self._worker_id, settings.heartbeat_s) is not None:
                    self._metrics.put_back.labels(claim.kind, "snooze").inc()

    def _write(self, running: Running) -> None:
        assert self._worker_id is not None
        now = time.monotonic()
        if not running.is_due(now):
            return
        claim, worker_id = running.claim, self._worker_id
        if running.batch:
            running.written_at = now
            try:
                kept = outcomes.record(self._engine, claim, worker_id, running.batch)
            except (IntegrityError, DataError) as error:
                _log.error("a report was dropped", extra={"fields": {**about(claim), "error": _first_line(error)}})
                kept = True
            running.batch = Batch()
            if not kept:
                self._metrics.stale_writes.labels("report").inc()
            if not kept and running.outcome is None:
                _log.error("the lease is lost", extra={"fields": about(claim)})
                running.kill_after(0, "lost")
        if running.outcome is None:
            return
        state = settle(self._engine, claim, worker_id, running.outcome)
        running.settled = True
        seconds = now - running.started_at
        self._metrics.ended(claim.kind, running.outcome, state, seconds)
        fields = {**about(claim), "kind": claim.kind, "state": state or "lost", "seconds": round(seconds, 3)}
        if isinstance(running.outcome, Failed):
            fields["error"] = str(running.outcome.error.get("message"))
        _log.log(logging.INFO if state else logging.ERROR, "ended", extra={"fields": fields})


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
