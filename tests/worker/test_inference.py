from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from service.contract.host import leave_socket_folder, socket_folder
from service.contract.settings import Settings
from worker.inference import Inference, endpoints


def _settings(folder: Path, **changes: Any) -> Settings:
    return Settings(data=folder, **changes)


def test_a_unix_socket_in_the_data_folder_is_the_default(tmp_path: Path) -> None:
    listen, advertised = endpoints(_settings(tmp_path))
    assert listen == advertised
    assert listen.startswith("unix:")
    assert listen != endpoints(_settings(tmp_path))[0]


def test_a_loopback_address_needs_no_token(tmp_path: Path) -> None:
    for address in ("127.0.0.1:7000", "localhost:7000", "[::1]:7000"):
        assert endpoints(_settings(tmp_path, worker_listen=address)) == (address, f"http://{address}")


def test_an_address_that_others_reach_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TOKEN"):
        endpoints(_settings(tmp_path, worker_listen="10.0.0.1:7000"))
    given = _settings(tmp_path, worker_listen="10.0.0.1:7000", worker_token="secret")
    assert endpoints(given) == ("10.0.0.1:7000", "http://10.0.0.1:7000")


def test_an_address_of_all_interfaces_is_advertised_by_the_hosts_name(tmp_path: Path) -> None:
    everywhere = _settings(tmp_path, worker_listen="0.0.0.0:7000", worker_token="secret")
    assert endpoints(everywhere) == ("0.0.0.0:7000", f"http://{socket.gethostname()}:7000")
    with pytest.raises(ValueError, match="ADVERTISE"):
        endpoints(_settings(tmp_path, worker_listen="0.0.0.0:0", worker_token="secret"))
    given = _settings(
        tmp_path, worker_listen="0.0.0.0:7000", worker_token="secret", worker_advertise="http://gpu-1:7000/"
    )
    assert endpoints(given) == ("0.0.0.0:7000", "http://gpu-1:7000")


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="host:port"):
        endpoints(_settings(tmp_path, worker_listen="nonsense"))


def test_a_process_that_cannot_be_started_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of memory or processes for a moment: the jobs of this worker go on."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    inference = Inference(_settings(tmp_path), environment={}, num_threads=1)
    inference.keep()
    inference.keep()
    assert [record.message for record in caplog.records] == ["the inference process cannot be started"]
    inference.stop(0)


def test_the_folder_of_its_socket_is_made_again_for_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that stops removes it if it is empty, and the next one's process takes seconds to bind its socket."""
    monkeypatch.setattr(sys, "executable", "/bin/true")
    inference = Inference(_settings(tmp_path), environment={}, num_threads=1)
    leave_socket_folder(tmp_path)
    assert not socket_folder(tmp_path).exists()
    inference.keep()
    assert socket_folder(tmp_path).exists()
    inference.stop(5)
