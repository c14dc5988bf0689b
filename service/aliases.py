"""Aliases: names that people give to models, unique per tenant."""

from __future__ import annotations

import re
from typing import Final

from service.contract.errors import Invalid

ALIAS: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
RESERVED: Final = re.compile(r"^(model|job|ds|emb|key|up)_[0-9a-z]{26}\Z")


def check_alias(name: str, *, param: str) -> None:
    """Raise Invalid for a name that could not stand where a model's id does, or that reads like an id."""
    if not ALIAS.match(name) or RESERVED.match(name):
        raise Invalid(
            "an alias is 1 to 100 letters, digits, dots, hyphens and underscores, and does not look like an id",
            param=param,
        )
