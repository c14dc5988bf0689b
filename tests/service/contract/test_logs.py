from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import logging, warnings
from service.contract.logs import configure
configure({"job": "job_a", "attempt": 1, "epoch": 2, "request_id": None})
log = logging.getLogger("anything")
log.info("claimed", extra={"fields": {"kind": "train", "note": 'two "words"\\nand a line', "path": ROOT}})
warnings.warn("beware", stacklevel=1)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed %s", "here")
""".replace("ROOT", "__import__('pathlib').Path('/x')")


def _run(**options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options
    )


def test_away_from_a_terminal_every_line_is_a_json_object_with_the_fields_of_the_job() -> None:
    lines = [json.loads(line) for line in _run(stderr=subprocess.PIPE).stderr.splitlines()]
    claimed, warned, failed = lines
    assert datetime.fromisoformat(claimed.pop("at")).tzinfo is not None
    job = {"job": "job_a", "attempt": 1, "epoch": 2, "request_id": None}
    note = 'two "words"\nand a line'
    assert claimed == {"level": "info", "event": "claimed", **job, "kind": "train", "note": note, "path": "/x"}
    assert warned["level"] == "warning"
    assert "beware" in warned["event"]
    assert (failed["event"], failed["job"]) == ("failed here", "job_a")
    assert failed["traceback"].splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_on_a_terminal_a_line_is_pairs_and_leaves_out_what_is_unknown() -> None:
    ours, theirs = pty.openpty()
    try:
        _run(stderr=theirs)
        first = os.read(ours, 1 << 16).decode().splitlines()[0]
    finally:
        os.close(ours)
        os.close(theirs)
    _, _, rest = first.partition(" ")
    assert rest == (
        'level=info event=claimed job=job_a attempt=1 epoch=2 kind=train note="two \\"words\\"\\nand a line" path=/x'
    )
