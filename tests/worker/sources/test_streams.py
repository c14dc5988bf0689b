from __future__ import annotations

import io

import pytest

from service.contract.errors import Permanent, Transient
from worker.sources.streams import steady


class FlakyDisk(io.RawIOBase):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def read(self, size: int = -1) -> bytes:
        raise self.error


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (ConnectionResetError(), Transient),
        (TimeoutError(), Transient),
        (OSError(5, "Input/output error"), Transient),
        (FileNotFoundError(), Permanent),
        (PermissionError(13, "forbidden"), Permanent),
    ],
)
def test_trouble_on_the_way_is_told_from_what_will_not_come_back(error: Exception, meaning: type[Exception]):
    with pytest.raises(meaning, match=r"shard\.tar"):
        steady(FlakyDisk(error), "shard.tar").read()  # pyright: ignore[reportArgumentType]


def test_a_parser_that_keeps_reading_at_the_end_is_stopped():
    stream = steady(io.BytesIO(b"data"), "shard.tar")
    assert stream.read() == b"data"

    def spin() -> None:
        while True:
            stream.read(512)

    with pytest.raises(Permanent, match=r"shard\.tar is damaged: it ends too early"):
        spin()
