"""Batches from one process to another through memory that both map: nothing is pickled, and nothing is copied twice.

A message is 4 bytes with the length of a JSON header, the header, and with it the descriptor of an anonymous file that
holds the arrays. Such a file has no name and no folder: what a killed process leaves behind, the kernel takes back, and
the few megabytes of a container's /dev/shm do not matter. Without torch.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import tempfile
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from worker.learning.reading import Packed

if TYPE_CHECKING:
    from collections.abc import Sequence

_ALIGNED: Final = 64
_LENGTH: Final = struct.Struct("<I")


def send_batch(to: socket.socket, sides: Sequence[Packed]) -> None:
    """Send the tokens of a batch."""
    arrays = [array for side in sides for array in (side.values, side.lengths, side.counts)]
    places: list[dict[str, Any] | None] = []
    end = 0
    for array in arrays:
        places.append(None if array is None else {"at": end, "dtype": array.dtype.str, "shape": array.shape})
        end += 0 if array is None else -(-array.nbytes // _ALIGNED) * _ALIGNED
    file = _anonymous_file()
    try:
        os.ftruncate(file, end)
        with mmap.mmap(file, end) as mapped:
            for array, place in zip(arrays, places, strict=True):
                if array is not None and place is not None:
                    np.copyto(_view(mapped, place), array)
        send(to, {"arrays": places}, file)
    finally:
        os.close(file)


def send(to: socket.socket, message: dict[str, Any], file: int | None = None) -> None:
    """Send a message, and perhaps a descriptor."""
    header = json.dumps(message).encode()
    socket.send_fds(to, [_LENGTH.pack(len(header))], [] if file is None else [file])
    to.sendall(header)


def receive(source: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Return the next message, and the descriptor that came with it.

    Raises EOFError if the other side is gone.
    """
    head, files, _, _ = socket.recv_fds(source, _LENGTH.size, 1)
    head += _exactly(source, _LENGTH.size - len(head))
    return json.loads(_exactly(source, *_LENGTH.unpack(head))), files[0] if files else None


def batch_of(message: dict[str, Any], file: int) -> list[Packed]:
    """Return the sides of a batch; their arrays are the shared memory itself, which goes with the last of them."""
    try:
        mapped = mmap.mmap(file, 0)
    finally:
        os.close(file)
    arrays = [None if place is None else _view(mapped, place) for place in message["arrays"]]
    return [
        Packed(cast("np.ndarray", values), cast("np.ndarray", lengths), counts)
        for values, lengths, counts in zip(arrays[::3], arrays[1::3], arrays[2::3], strict=True)
    ]


def _view(mapped: mmap.mmap, place: dict[str, Any]) -> np.ndarray:
    shape = tuple(place["shape"])
    return np.frombuffer(mapped, place["dtype"], int(np.prod(shape)), place["at"]).reshape(shape)


def _exactly(source: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        piece = source.recv(num_bytes - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch")
    with tempfile.TemporaryFile() as file:  # not Linux
        return os.dup(file.fileno())
