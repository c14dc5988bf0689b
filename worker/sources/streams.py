"""Streams that tell bad luck from bad data: what may come back is Transient, what will not is Permanent."""

from __future__ import annotations

import io
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import BinaryIO, Final, cast, final

from typing_extensions import override

from service.contract.errors import NotFound, Permanent, Transient

BUFFER_BYTES: Final = 1 << 20
MAX_READS_AT_END: Final = 1000


@final
class _Steady(io.RawIOBase):
    """A stream whose faults are Transient or Permanent, and that does not let a parser spin at its end."""

    def __init__(self, inner: BinaryIO | io.FileIO, name: str) -> None:
        self._inner = inner
        self._name = name
        self._reads_at_end = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return self._inner.seekable()

    @override
    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        with translated(self._name):
            block = self._inner.read(len(buffer)) or b""
        buffer[: len(block)] = block
        # Python's tar reader loops for ever on some damaged headers once the data are used up.
        self._reads_at_end = 0 if block else self._reads_at_end + 1
        if self._reads_at_end > MAX_READS_AT_END:
            raise Permanent(f"{self._name} is damaged: it ends too early")
        return len(block)

    @override
    def seek(self, offset: int, whence: int = 0, /) -> int:
        with translated(self._name):
            return self._inner.seek(offset, whence)

    @override
    def tell(self) -> int:
        with translated(self._name):
            return self._inner.tell()

    @override
    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def steady(inner: BinaryIO | io.FileIO, name: str) -> BinaryIO:
    """Buffer a stream; its faults become Transient or Permanent."""
    return cast("BinaryIO", io.BufferedReader(_Steady(inner, name), BUFFER_BYTES))


@contextmanager
def translated(name: str) -> Generator[None]:
    """Tell what will not come back from what may."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, NotFound) as error:
        raise Permanent(f"{name} is not there") from error
    except (PermissionError, IsADirectoryError) as error:
        raise Permanent(f"{name} may not be read: {error.strerror or 'forbidden'}") from error
    except _network_faults() as error:
        raise Transient(f"{name} could not be read: {type(error).__name__}") from error


def _network_faults() -> tuple[type[Exception], ...]:
    """List what the clients of object stores raise: OSError, and what is loaded of their own."""
    own = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
    return (OSError, *(getattr(sys.modules[module], name) for module, name in own if module in sys.modules))
