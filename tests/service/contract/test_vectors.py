from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from service.contract.errors import Permanent
from service.contract.vectors import Strings, Vectors, write_index

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["one", "", "drei", "ネ", "one"]


def test_strings_come_back_whole_and_in_any_order() -> None:
    strings = Strings.of(TEXTS)
    assert len(strings) == 5
    assert strings.decoded() == TEXTS
    rows = np.array([4, 0, 3, 3, 1])
    assert strings.take(rows).decoded() == [TEXTS[row] for row in rows]
    assert strings.take(np.array([], np.int64)).decoded() == []
    assert Strings.of([]).decoded() == []
    assert Strings.of(["", ""]).take(np.array([1, 0])).decoded() == ["", ""]


def test_a_set_is_mapped_and_not_read(tmp_path: Path) -> None:
    z = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", z)
    write_index(tmp_path, Strings.of(TEXTS))
    found = Vectors(tmp_path)
    assert isinstance(found.z, np.memmap)
    assert not found.z.flags.writeable
    np.testing.assert_array_equal(found.z, z)
    assert found.keys is not None
    assert found.keys.take(np.array([2])).decoded() == ["drei"]
    assert len(found) == 5


def test_a_set_of_an_earlier_version_has_no_index(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.ones((2, 3), np.float32))
    assert Vectors(tmp_path).keys is None


def test_what_is_no_set_is_said_to_be_damaged(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="no embedding set"):
        Vectors(tmp_path)
    np.save(tmp_path / "vectors.npy", np.ones((2, 3)))
    with pytest.raises(Permanent, match="float32"):
        Vectors(tmp_path)
    whole = (tmp_path / "vectors.npy").read_bytes()
    (tmp_path / "vectors.npy").write_bytes(whole[:-8])
    with pytest.raises(Permanent, match="no embedding set"):
        Vectors(tmp_path)
