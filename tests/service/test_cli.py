from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.cli import main
from service.contract.dialects import open_engine


@pytest.fixture
def isthmus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command on a database, and return its exit code and what it said on both streams."""

    def run(database_url: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("ISTHMUS_DATABASE_URL", database_url)
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize("command", ["serve", "api", "worker", "migrate", "demo", "keys", "tenants", "jobs", "openapi"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: isthmus {command}" in capsys.readouterr().out


def test_help_loads_neither_web_nor_learning() -> None:
    script = (
        "import sys\n"
        "from service.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'alembic', 'sklearn', 'worker', 'httpx', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "serve" in done.stdout


def test_a_database_is_migrated_and_keys_are_made_listed_and_revoked_in_it(
    empty_database_url: str, isthmus: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = isthmus(empty_database_url, "keys", "list")
    assert code == 1
    assert "isthmus migrate" in error
    assert isthmus(empty_database_url, "migrate")[0] == 0
    assert isthmus(empty_database_url, "migrate")[0] == 0

    wanted = ("laptop", "--scopes", "read,infer", "--expires-days", "30")
    _, key, about = isthmus(empty_database_url, "keys", "create", *wanted)
    assert key.startswith("isk_")
    _, listed, _ = isthmus(empty_database_url, "keys", "list")
    assert "laptop" in listed
    assert "infer,read" in listed
    assert "until 20" in listed
    assert key.strip() not in listed
    key_id = listed.split()[0]
    assert key_id in about
    assert isthmus(empty_database_url, "keys", "revoke", key_id)[0] == 0
    assert "revoked" in isthmus(empty_database_url, "keys", "list")[1]

    engine = open_engine(empty_database_url)
    with engine.connect() as conn:
        assert key.strip() not in str(conn.execute(sa.text("SELECT * FROM api_key")).all())
    engine.dispose()


def test_what_keys_cannot_do_is_said(sqlite_template: Path, isthmus: Callable[..., tuple[int, str, str]]) -> None:
    url = f"sqlite:///{sqlite_template}"
    code, out, error = isthmus(url, "keys", "create", "x", "--scopes", "everything")
    assert (code, out) == (1, "")
    assert "'read', 'infer', 'write' or 'admin'" in error
    assert "there is no key key_x" in isthmus(url, "keys", "revoke", "key_x")[2]


def test_a_key_that_is_over_is_listed_as_expired(
    sqlite_template: Path, tmp_path: Path, isthmus: Callable[..., tuple[int, str, str]]
) -> None:
    url = f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'keys.db')}"
    isthmus(url, "keys", "create", "old", "--expires-days", "-1")
    assert "expired" in isthmus(url, "keys", "list")[1]


def test_a_key_belongs_to_its_tenant(empty_database_url: str, isthmus: Callable[..., tuple[int, str, str]]) -> None:
    isthmus(empty_database_url, "migrate")
    assert isthmus(empty_database_url, "keys", "create", "k", "--tenant", "lab-1")[0] == 0
    assert isthmus(empty_database_url, "keys", "list")[1] == ""
    listed = isthmus(empty_database_url, "keys", "list", "--tenant", "lab-1")[1]
    assert "never used" in listed
    key_id = listed.split()[0]
    assert "there is no key" in isthmus(empty_database_url, "keys", "revoke", key_id)[2]
    assert isthmus(empty_database_url, "keys", "revoke", key_id, "--tenant", "lab-1")[0] == 0
    code, out, error = isthmus(empty_database_url, "keys", "create", "k", "--tenant", "Not a name")
    assert (code, out) == (1, "")
    assert "a tenant is named by" in error


def test_a_tenants_share_is_set_piece_by_piece(
    empty_database_url: str, isthmus: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = isthmus(empty_database_url, "tenants", "list")
    assert code == 1
    assert "isthmus migrate" in error
    isthmus(empty_database_url, "migrate")
    share = ("tenants", "set", "lab-1", "--lane", "train")
    assert isthmus(empty_database_url, *share, "--weight", "3", "--max-running", "2")[0] == 0
    _, shown, _ = isthmus(empty_database_url, *share, "--max-queued", "50")
    assert shown.splitlines()[1].split() == ["lab-1", "train", "3", "0", "of", "2", "0", "of", "50"]
    isthmus(empty_database_url, *share, "--max-running", "none")
    _, shown, _ = isthmus(empty_database_url, "tenants", "list")
    assert shown.splitlines()[1].split() == ["lab-1", "train", "3", "0", "0", "of", "50"]
    code, _, error = isthmus(empty_database_url, *share, "--weight", "0")
    assert code == 1
    assert "weight lies between" in error


def test_a_setting_that_makes_no_sense_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_TICK_S", "soon")
    assert main(["migrate"]) == 2
    assert "setting tick_s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://127.0.0.1:1/nobody", "the database cannot be used: connection failed"),
        ("nonsense", "ISTHMUS_DATABASE_URL: Could not parse"),
    ],
)
def test_a_database_that_is_not_there_is_said_in_a_line(
    url: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_DATABASE_URL", url)
    assert main(["migrate"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"isthmus: {said}")


def test_a_lane_that_is_none_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--lanes", "fast", "--data", str(tmp_path / "data")]) == 1
    assert "unknown lane fast" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1", "is not ready"),
        ("https://127.0.0.1:1/isthmus/", "is not ready"),
        ("127.0.0.1:8000", "is not an http:// or https:// URL"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://here:port", "Port could not be cast"),
    ],
)
def test_health_of_what_does_not_answer_is_a_line_and_a_failure(
    url: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["health", "--url", url]) == 1
    assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize("key", [None, "isk_" + "0" * 32])
def test_a_bind_that_others_reach_needs_a_key(
    key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is not None:
        monkeypatch.setenv("ISTHMUS_API_KEY", key)
    with socket.socket() as taken:  # as far as it gets with a key
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--host", "0.0.0.0", "--port", port, "--data", str(tmp_path / "data")]) == 1
    assert ("isthmus keys create" if key is None else "cannot be bound") in capsys.readouterr().err


def test_the_description_of_the_api_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["openapi"]) == 0
    assert "/v1/compose" in json.loads(capsys.readouterr().out)["paths"]
