"""Who is who: rows that vanish, and workers that share a host name and a process id."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.contract.host import boot_id, host_name
from service.contract.jobs import KINDS
from service.contract.leases import WorkerInfo, register
from service.contract.tables import job_result, worker
from service.contract.word import new_id
from tests.faults.ledger import Ledger
from tests.supervisors import World

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def test_a_worker_whose_row_is_deleted_gives_its_job_up_and_takes_it_again_under_a_new_id(
    odd_world: World, ledger: Ledger, tmp_path: Path, check_invariants: Callable[..., Counter[str]]
) -> None:
    with odd_world.worker():
        public_id = odd_world.ingest(f"odd:wait:{tmp_path / 'go'}")
        odd_world.until_it_reads(public_id)
        (before,) = odd_world.rows(worker)
        with odd_world.engine.begin() as conn:
            conn.execute(sa.delete(worker))  # and nothing else: the job stays `running` for nobody
        odd_world.until_it_reads(public_id, attempt=2)
        (after,) = odd_world.rows(worker)
        assert after.id != before.id
        (tmp_path / "go").touch()
        row = odd_world.until_state(public_id, "succeeded", "failed")
    assert (row.state, row.lease_epoch) == ("succeeded", 2)
    assert [(entry.what, entry.epoch) for entry in ledger.read()] == [("start", 1), ("start", 2), ("finish", 2)]
    check_invariants(odd_world.engine, [public_id])


def _can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


def test_two_workers_with_the_same_host_name_and_process_id_leave_each_other_alone(
    odd_world: World, ledger: Ledger, tmp_path: Path, check_invariants: Callable[..., Counter[str]]
) -> None:
    # As two containers on one host may be: one boot, one host name, and each is process 1 of its own name space.
    if not _can_unshare():
        pytest.skip("process name spaces are not permitted here")
    with odd_world.worker(*UNSHARE) as first:
        public_id = odd_world.ingest(f"odd:wait:{tmp_path / 'go'}")
        odd_world.until_it_reads(public_id)
        (one,) = odd_world.rows(worker)
        with odd_world.worker(*UNSHARE):
            odd_world.until(lambda: len(odd_world.rows(worker)) == 2)
            (two,) = [row for row in odd_world.rows(worker) if row.id != one.id]
            assert (one.pid, one.boot, one.host.split()[0]) == (two.pid, two.boot, two.host.split()[0])
            assert one.pid == 1
            other = odd_world.ingest("odd:done")  # which the second takes, once it has looked for neighbours
            odd_world.until_state(other, "succeeded")
            assert odd_world.row(public_id).worker_id == one.id
            first.kill()
            odd_world.until_it_reads(public_id, attempt=2)  # by its silence, not by its process id
            (tmp_path / "go").touch()
            odd_world.until_state(public_id, "succeeded", "failed")
    assert check_invariants(odd_world.engine, [public_id, other]) == {"succeeded": 2}
    assert Counter(entry.job for entry in ledger.read("start")) == {public_id: 2, other: 1}


def test_only_the_dead_of_the_same_boot_and_name_space_are_buried_at_once(odd_world: World) -> None:
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, check=True, text=True)
    dead, host, boot = int(gone.stdout), host_name(), boot_id()
    rows = {
        "dead": (host, boot, dead),
        "alive": (host, boot, 1),
        "on another boot": (host, "another boot", dead),
        "in another name space": (f"{host} elsewhere", boot, dead),
    }
    ids = {name: new_id("worker") for name in rows}
    for name, (at_host, at_boot, pid) in rows.items():
        register(
            odd_world.engine, WorkerInfo(ids[name], ["bulk"], list(KINDS), at_host, at_boot, pid, None, "cpu", "0")
        )
    with odd_world.worker(ISTHMUS_WORKER_TTL_S="600"):
        public_id = odd_world.ingest("odd:done")
        odd_world.until_state(public_id, "succeeded")
        left = {row.id for row in odd_world.rows(worker)}
        assert {name for name in rows if ids[name] in left} == rows.keys() - {"dead"}
    assert len(odd_world.rows(job_result)) == 1
