"""The deployment as it is shipped, on a real engine: built, healthy, and the demo through the published port.

Off by default: `make compose-check`. COMPOSE names the engine (default: `docker compose`).
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
URL = "http://127.0.0.1:8000"


@pytest.mark.compose
@pytest.mark.timeout(1800)
def test_the_demo_reaches_its_bars_on_the_shipped_deployment(tmp_path: Path) -> None:
    compose = shlex.split(os.environ.get("COMPOSE", "docker compose"))
    key = "isk_" + secrets.token_hex(16)
    environment = os.environ | {
        "ISTHMUS_DB_PASSWORD": secrets.token_hex(16),
        "ISTHMUS_WORKER_TOKEN": secrets.token_hex(16),
        "ISTHMUS_API_KEY": key,
    }

    def run(*arguments: str) -> None:
        subprocess.run([*compose, *arguments], cwd=ROOT, env=environment, check=True)

    run("up", "-d", "--build")
    try:
        assert httpx.get(f"{URL}/v1/models").status_code == 401
        demo = subprocess.run(
            [sys.executable, "-m", "service.cli", "demo", "--url", URL, "--out", str(tmp_path)],
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert demo.returncode == 0, demo.stdout + demo.stderr
        answer = httpx.get(f"{URL}/v1/models", headers={"authorization": f"Bearer {key}"}).raise_for_status().json()
        assert len(answer["data"]) == 1
    finally:
        run("down", "-v")
