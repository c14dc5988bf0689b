from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.cli import main
from service.contract.dialects import open_engine


def isthmus(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "service.cli", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["serve", "api", "worker", "migrate", "demo", "keys", "openapi"])
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
        "heavy = {'torch', 'fastapi', 'uvicorn', 'alembic', 'sklearn', 'worker'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "serve" in done.stdout


def test_a_database_is_migrated_and_keys_are_made_listed_and_revoked_in_it(empty_database_url: str) -> None:
    there = {"ISTHMUS_DATABASE_URL": empty_database_url}
    early = isthmus("keys", "list", **there)
    assert early.returncode == 1
    assert "isthmus migrate" in early.stderr
    assert isthmus("migrate", **there).returncode == 0
    assert isthmus("migrate", **there).returncode == 0

    made = isthmus("keys", "create", "laptop", "--scopes", "read,infer", "--expires-days", "30", **there)
    key = made.stdout.strip()
    assert key.startswith("isk_")
    listed = isthmus("keys", "list", **there).stdout
    assert "laptop" in listed
    assert "infer,read" in listed
    assert key not in listed
    key_id = listed.split()[0]
    assert isthmus("keys", "revoke", key_id, **there).returncode == 0
    assert "revoked" in isthmus("keys", "list", **there).stdout

    engine = open_engine(empty_database_url)
    with engine.connect() as conn:
        assert key not in str(conn.execute(sa.text("SELECT * FROM api_key")).all())
    engine.dispose()


def test_what_keys_cannot_do_is_said(sqlite_template: Path) -> None:
    there = {"ISTHMUS_DATABASE_URL": f"sqlite:///{sqlite_template}"}
    wrong = isthmus("keys", "create", "x", "--scopes", "everything", **there)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "'read', 'infer', 'write' or 'admin'" in wrong.stderr
    assert "there is no key key_x" in isthmus("keys", "revoke", "key_x", **there).stderr


def test_a_setting_that_makes_no_sense_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_TICK_S", "soon")
    assert main(["migrate"]) == 2
    assert "setting tick_s" in capsys.readouterr().err


def test_a_bind_that_others_reach_needs_a_key(tmp_path: Path) -> None:
    refused = isthmus("serve", "--host", "0.0.0.0", "--port", "0", "--data", str(tmp_path / "data"))
    assert refused.returncode == 1
    assert "isthmus keys create" in refused.stderr


def test_the_description_of_the_api_is_printed_as_json() -> None:
    done = isthmus("openapi")
    assert done.returncode == 0
    assert "/v1/compose" in json.loads(done.stdout)["paths"]
