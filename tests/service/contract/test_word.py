from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from service.contract.word import Moment

moments: TypeAdapter[datetime] = TypeAdapter(Moment)


def test_a_moment_is_a_date_and_time_with_its_zone() -> None:
    noon = datetime(2030, 1, 31, 12, tzinfo=UTC)
    assert moments.validate_python("2030-01-31T12:00:00Z") == noon
    assert moments.validate_python("2030-01-31T13:00:00+01:00") == noon
    assert moments.validate_python(noon) == noon


@pytest.mark.parametrize("value", [0, 1.9e9, True, "0", "-1", "1900000000", "+1900000000.5", "2030-01-31T12:00:00", ""])
def test_seconds_since_1970_and_times_without_a_zone_are_no_moments(value: Any) -> None:
    with pytest.raises(ValidationError):
        moments.validate_python(value)
