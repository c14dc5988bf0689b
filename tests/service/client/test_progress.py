from __future__ import annotations

import pytest

from service.client.progress import progress


def test_without_a_terminal_progress_is_plain_lines_and_few(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("learning") as advance:
        for done in range(1, 1001):
            advance(done, 1000, "loss 2.10")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  learning 1/1,000 loss 2.10"
    assert lines[-1] == "  learning 1,000/1,000 loss 2.10"
    assert len(lines) < 10
    assert "\x1b" not in "".join(lines)
