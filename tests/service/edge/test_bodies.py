from __future__ import annotations

import pytest

from service.contract.errors import Malformed
from service.edge.bodies import MAX_BRACKETS, parse_json


def test_a_body_that_grows_twentyfold_when_it_is_read_is_refused_before_that() -> None:
    with pytest.raises(Malformed, match="arrays and objects"):
        parse_json(b"[" + b"[]," * MAX_BRACKETS + b"[]]")
    assert parse_json(b'{"a": [[1], {}]}') == {"a": [[1], {}]}
