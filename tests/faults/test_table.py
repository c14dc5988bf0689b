from __future__ import annotations

import re

from tests.supervisors import ROOT

TABLE = (ROOT / "docs" / "faults.md").read_text()


def test_the_table_of_faults_is_whole_and_names_tests_that_exist() -> None:
    rows = [line.split("|") for line in TABLE.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[1]) for row in rows] == list(range(1, 48))
    for row in rows:
        named = re.findall(r"`([^`:]+)::([^`]+)`", row[4])
        assert named, row[2]
        for file, test in named:
            source = (ROOT / "tests" / "faults" / file).resolve().read_text()
            assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), f"{file}::{test}"
