from __future__ import annotations

import os
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract import wake
from service.contract.host import boot_id, host_name, make_socket_folder
from service.contract.tables import job
from service.contract.transact import read


def test_every_listener_is_woken_by_an_enqueue(world: Any) -> None:
    listeners = [wake.Listener(world.engine) for _ in range(2)]
    for listener in listeners:
        listener.open()
        assert listener.fileno() is not None
        assert not listener.wait(0)
    world.ingest()
    assert [listener.wait(5) for listener in listeners] == [True, True]
    assert [listener.wait(0) for listener in listeners] == [False, False]
    for listener in listeners:
        listener.close()
        assert listener.fileno() is None


def test_who_is_woken_finds_the_job_at_once(world: Any) -> None:
    listener = wake.Listener(world.engine)
    listener.open()
    for num in range(1, 21):
        enqueuer = threading.Thread(target=world.ingest)
        enqueuer.start()
        assert listener.wait(5)
        # A reader waits for no lock, so it would not see what is about to be committed.
        assert read(world.engine, lambda conn: conn.scalar(sa.select(sa.func.count()).select_from(job))) == num
        enqueuer.join()
    listener.close()


def test_a_transaction_of_many_jobs_wakes_once(world: Any) -> None:
    listener = wake.Listener(world.engine)
    listener.open()
    with world.engine.begin() as conn:
        for _ in range(3):
            wake.hint(conn)
        assert not listener.wait(0)
    assert listener.wait(5)
    assert not listener.wait(0.05)
    listener.close()


def test_nobody_is_woken_by_what_is_rolled_back(world: Any) -> None:
    listener = wake.Listener(world.engine)
    listener.open()
    with world.engine.connect() as conn, conn.begin() as transaction:
        wake.hint(conn)
        transaction.rollback()
    assert not listener.wait(0.05)
    listener.close()


def test_the_socket_of_a_killed_supervisor_is_removed(world: Any, tmp_path: Path) -> None:
    if world.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL has no sockets of ours")
    left = make_socket_folder(tmp_path) / "wake-0-left"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(str(left))
    world.ingest()
    assert not left.exists()


def test_a_cut_connection_is_opened_again(world: Any) -> None:
    if world.engine.dialect.name != "postgresql":
        pytest.skip("SQLite has no connection to cut")
    listener = wake.Listener(world.engine)
    listener.open()
    with world.engine.connect() as conn:
        conn.execute(sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"))
    give_up_at = time.monotonic() + 5
    while listener.fileno() is not None and time.monotonic() < give_up_at:
        listener.wait(0.1)
    assert listener.fileno() is None
    listener.open()
    world.ingest()
    assert listener.wait(5)
    listener.close()


def test_the_socket_folder_is_private_and_short_enough(tmp_path: Path) -> None:
    near = make_socket_folder(tmp_path)
    assert near == tmp_path / "run"
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    far = make_socket_folder(deep)
    assert far == make_socket_folder(deep)
    assert len(os.fsencode(far / ("s" * 24))) < 104
    for folder in (near, far):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    far.rmdir()


def test_a_folder_that_was_planted_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    far = make_socket_folder(deep)
    far.rmdir()
    far.symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        make_socket_folder(deep)
    far.unlink()


def test_the_boot_and_the_host_have_names() -> None:
    assert boot_id() == boot_id()
    assert socket.gethostname() in host_name()
