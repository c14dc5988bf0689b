from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from worker.serving.endpoint import BadEndpoint, listen


def test_a_unix_socket_belongs_to_its_owner_alone_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen(f"unix:{path}", None):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_the_socket_of_a_process_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    with listen(f"unix:{path}", None), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))


def test_a_live_socket_is_not_taken_over(tmp_path: Path) -> None:
    endpoint = f"unix:{tmp_path / 'socket'}"
    with listen(endpoint, None), pytest.raises(BadEndpoint, match="another process listens"), listen(endpoint, None):
        pass


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(BadEndpoint, match="no socket"), listen(f"unix:{path}", None):
        pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize("endpoint", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_this_machine_alone_needs_no_token(endpoint: str) -> None:
    with listen(endpoint, None) as sock:
        assert sock.getsockname()[1] > 0


@pytest.mark.parametrize("endpoint", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.invalid:0"])
def test_what_others_can_reach_needs_a_token(endpoint: str) -> None:
    with pytest.raises(BadEndpoint, match="ISTHMUS_WORKER_TOKEN"), listen(endpoint, None):
        pass


def test_with_a_token_any_address_can_be_bound() -> None:
    with listen("0.0.0.0:0", "secret") as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("endpoint", ["", "nonsense", ":8000", "127.0.0.1:http", "127.0.0.1:99999", "192.0.2.1:1"])
def test_what_cannot_be_bound_says_so(endpoint: str) -> None:
    with pytest.raises(BadEndpoint), listen(endpoint, "secret"):
        pass


def test_a_path_that_is_too_long_or_lies_nowhere_says_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "socket", tmp_path / ("s" * 200)):
        with pytest.raises(BadEndpoint), listen(f"unix:{path}", None):
            pass
