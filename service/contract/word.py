"""The base of every word in the contract, and the few names that all of them share."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Final

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no letter that reads like another
MODALITY: Final = re.compile(r"^[a-z][a-z0-9_]{0,31}$")

ModalityName = Annotated[str, StringConstraints(pattern=MODALITY.pattern, strict=True)]
"""A free name for a kind of data, such as `image`, `imu` or `state`."""

Real = Annotated[float, Field(strict=True)]
"""A number, whole or not; never a string that reads like one."""

Text = Annotated[str, StringConstraints(strict=True)]
Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A name that people give: one line, no control characters."""

Id = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@:-]{0,127}$")]


def _written_out(value: Any) -> Any:
    # pydantic also takes seconds since 1970, as a number or as a string that reads like one.
    if isinstance(value, int | float) or (isinstance(value, str) and "-" not in value[1:]):
        msg = "a time is written as 2030-01-31T12:00:00Z"
        raise ValueError(msg)
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_written_out)]
"""A date and time with its zone, as RFC 3339 writes it."""


class Word(BaseModel):
    """Frozen, closed to unknown fields, and free of NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def new_id(prefix: str) -> str:
    """Draw a public id: the prefix and 26 random characters (130 bits)."""
    return f"{prefix}_" + "".join(secrets.choice(ALPHABET) for _ in range(26))
