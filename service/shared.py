"""Shared memory, for results and for models' files, which are not copied through a socket.

Results are written by a worker and read by the front end. The front end creates each buffer (a sealed memfd, which
cannot be shortened), sends its descriptor with the first batch that uses it, and lends it to one batch at a time: it
is free again when the last array in it is garbage-collected.

A model's file is held once, in memory that nobody can change, and the weights of all workers are views of it.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np

__all__ = ["Buffer", "Buffers", "Sealed", "offsets", "share"]

#: Size of a buffer in bytes, which is also the limit of a batch's results.
BUFFER_BYTES = 8 << 20
#: Bytes of results from which shared memory is faster than a socket.
SHARED_BYTES = 256 << 10
#: Most bytes of all buffers that one worker writes to.
MOST_BYTES = 256 << 20
#: Time after which an idle buffer is closed.
IDLE_S = 1.0
#: Alignment of each array in a buffer.
ALIGNMENT = 64
#: Size of a file in bytes from which workers share its memory; each such file takes a descriptor.
SHARED_FILE_BYTES = 4 << 20
#: F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW; and F_SEAL_WRITE.
_SEALS, _SEAL_WRITE = 1 | 2 | 4, 8


class Buffer:
    """Shared memory of a fixed size.

    Attributes:
        number: Number of the buffer in frames.
        is_sent: Whether the worker has its descriptor.
        since_s: Time when it was last used, on the monotonic clock.
    """

    def __init__(self, number: int, size: int) -> None:
        """Create the memory; pages are allocated when they are first written."""
        self.number, self.size = number, size
        self.is_sent = False
        self.is_lent = False
        self.since_s = 0.0
        self.fd = os.memfd_create("results", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError:
            os.close(self.fd)
            raise
        self._whole: weakref.ref[Any] | None = None

    def arrays(self, shapes: Sequence[tuple[int, ...]], dtype: str) -> list[Any]:
        """Return read-only arrays at :func:`offsets` in the buffer, which stays lent as long as they live."""
        # All arrays are views of this one, which nothing else holds: its end is that of the last of them.
        whole = np.frombuffer(self._mapping, np.uint8)
        self._whole = weakref.ref(whole, lambda _: self.give_back())
        places, _ = offsets(shapes, np.dtype(dtype).itemsize)
        return [np.ndarray(shape, dtype, whole, place) for shape, place in zip(shapes, places, strict=True)]

    def give_back(self) -> None:
        """Mark the buffer as free."""
        self.is_lent, self.since_s = False, time.monotonic()


class Sealed:
    """Bytes in memory that other processes can map by its descriptor, and that nobody can change.

    Args:
        data: The bytes, which are copied.

    Attributes:
        fd: The descriptor; it is closed when the object is garbage-collected.

    Raises:
        OSError: there is no descriptor or no memory left.
    """

    def __init__(self, data: bytes) -> None:
        """Copy the bytes and seal the memory."""
        self.fd = os.memfd_create("file", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.fd, rest) :]
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS | _SEAL_WRITE)


def share(data: bytes) -> bytes | Sealed:
    """Return the bytes of a file, in shared memory if they are many and the system has it.

    Examples:
        >>> share(b"few")
        b'few'
    """
    if len(data) < SHARED_FILE_BYTES:
        return data
    try:
        return Sealed(data)
    except OSError:  # no descriptor or no memory left: each worker gets a copy
        return data


class Buffers:
    """The buffers of one worker.

    Args:
        drop: Called with each buffer that is closed, to notify the worker.
    """

    def __init__(self, drop: Callable[[Buffer], None]) -> None:
        """Start without buffers."""
        self._drop = drop
        self._buffers: dict[int, Buffer] = {}
        self._numbers = count(1)

    def lend(self, size: int) -> Buffer | None:
        """Return a free buffer of at least ``size`` bytes, or ``None`` if the memory limit would be exceeded."""
        buffer = next((one for one in self._buffers.values() if not one.is_lent and one.size >= size), None)
        if buffer is None:
            size = -(-max(size, BUFFER_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
            if size + sum(one.size for one in self._buffers.values()) > MOST_BYTES:
                return None
            try:
                buffer = Buffer(next(self._numbers), size)
            except OSError:  # no descriptor or no memory left: results come through the socket
                return None
            self._buffers[buffer.number] = buffer
        buffer.is_lent = True
        return buffer

    def drop_idle(self) -> None:
        """Close buffers that have been idle for a while."""
        now = time.monotonic()
        for buffer in list(self._buffers.values()):
            if not buffer.is_lent and now - buffer.since_s > IDLE_S:
                self._forget(buffer)
                self._drop(buffer)

    def close(self) -> None:
        """Give up all buffers, for good; arrays made of them stay valid."""
        self._drop = _ignore  # the worker is gone, and who would tell it holds us
        for buffer in list(self._buffers.values()):
            self._forget(buffer)

    def _forget(self, buffer: Buffer) -> None:
        del self._buffers[buffer.number]
        os.close(buffer.fd)


def _ignore(buffer: Buffer) -> None:
    """Tell no worker."""


def offsets(shapes: Sequence[tuple[int, ...]], itemsize: int) -> tuple[list[int], int]:
    """Return the offsets of arrays of these shapes in a buffer, and their total size in bytes.

    Examples:
        >>> offsets([(3, 1), (3, 2)], 8)
        ([0, 64], 112)
    """
    places, end = [], 0
    for shape in shapes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        places.append(start)
        end = start + math.prod(shape) * itemsize
    return places, end
