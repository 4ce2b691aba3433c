"""Frames between the front and its workers: lengths, a JSON head, raw arrays and texts. Nothing is pickled.

4 bytes   length of the head         little-endian
8 bytes   length of the body
head      JSON object, filled up with blanks; "fields" has [name, dtype, shape] of each field in the body
body      the fields one after the other: arrays in C order and native byte order, or, with dtype uint8, plain bytes
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

__all__ = ["Array", "Field", "Frame", "FrameProtocol", "FrameReader", "WireError", "cut", "encode", "receive", "send"]

Array = NDArray[Any]
Field = Array | bytes | memoryview
Frame = tuple[dict[str, Any], dict[str, Any]]

_LENGTHS = struct.Struct("<IQ")
MAX_HEAD_BYTES = 4 << 20
MAX_BODY_BYTES = 4 << 30
#: Bytes of a frame up to which its pieces are joined, and of a receiver's scratch buffer.
SMALL_BYTES = 64 << 10
#: Heads are filled up to multiples of this many bytes, so that the numbers behind them lie as processors like them.
ALIGNMENT = 64
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8"), "uint8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PLAIN = _DTYPES["uint8"]


class WireError(Exception):
    """The other side sent something that is no frame."""


def encode(head: Mapping[str, Any], fields: Mapping[str, Field]) -> list[bytes | memoryview]:
    """The pieces of a frame, to be sent one after the other; large fields are not copied if they are contiguous."""
    table: list[tuple[str, str, Sequence[int]]] = []
    data: list[bytes | memoryview] = []
    for name, field in fields.items():
        if isinstance(field, np.ndarray):
            table.append((name, _NAMES[field.dtype], field.shape))
            if field.nbytes <= SMALL_BYTES:
                data.append(field.tobytes())
            else:
                data.append(np.ascontiguousarray(field).reshape(-1).view(np.uint8).data)
        else:
            table.append((name, "uint8", (len(field),)))
            data.append(field)
    text = orjson.dumps({**head, "fields": table})
    text += b" " * (-len(text) % ALIGNMENT)
    body_bytes = sum(map(len, data))
    prefix = _LENGTHS.pack(len(text), body_bytes)
    if len(text) + body_bytes <= SMALL_BYTES:
        return [b"".join((prefix, text, *data))]
    return [prefix + text, *filter(len, data)]


def _lengths(prefix: bytes | bytearray | memoryview) -> tuple[int, int]:
    head_bytes, body_bytes = _LENGTHS.unpack(prefix)
    if head_bytes > MAX_HEAD_BYTES or body_bytes > MAX_BODY_BYTES:
        raise WireError(
            f"expected at most {MAX_HEAD_BYTES} and {MAX_BODY_BYTES} bytes, got {head_bytes}, {body_bytes}"
        )
    return head_bytes, body_bytes


def _decode_head(text: memoryview) -> dict[str, Any]:
    try:
        head = orjson.loads(text)
    except ValueError:
        head = None
    if not isinstance(head, dict):
        raise WireError("expected a JSON object as head")
    return head


def _decode(frame: Array, head_bytes: int) -> Frame:
    """Head and fields, which are views into the frame."""
    text = frame.data
    head = _decode_head(text[:head_bytes])
    try:
        table = [(str(name), _DTYPES[dtype], tuple(map(int, shape))) for name, dtype, shape in head.pop("fields")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WireError(f"expected a JSON head with a table of fields ({type(error).__name__})") from None
    fields: dict[str, Any] = {}
    start = head_bytes
    for name, dtype, shape in table:
        if min(shape, default=0) < 0:
            raise WireError("expected no negative lengths")
        stop = start + math.prod(shape) * dtype.itemsize
        if stop > frame.size:
            raise WireError(f"expected fields within {frame.size - head_bytes} bytes, got {stop - head_bytes}")
        try:
            fields[name] = text[start:stop] if dtype is _PLAIN else np.ndarray(shape, dtype, frame, start)
        except ValueError:  # such as 0 × 2⁶³
            raise WireError("expected a shape that an array can have") from None
        start = stop
    if start != frame.size:
        raise WireError(f"expected {frame.size - head_bytes} bytes of fields, got {start - head_bytes}")
    return head, fields


def cut(whole: Any, sizes: Iterable[int]) -> list[Any]:
    """Consecutive stretches of something, of the given sizes.

    Example:
        >>> cut("abcdef", [1, 3, 2])
        ['a', 'bcd', 'ef']
    """
    return [whole[start:end] for start, end in pairwise([0, *accumulate(sizes)])]


class FrameReader:
    """Cuts a stream of bytes into frames.

    What comes is received into a scratch buffer, many small frames at once; the rest of a frame that does not fit
    there is received straight into the memory that its arrays will be views of.
    """

    def __init__(self) -> None:
        """Wait for the first frame."""
        self._scratch = memoryview(bytearray(SMALL_BYTES))
        self._start = self._end = 0
        self._frame: Array | None = None
        self._head_bytes = self._filled = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._frame is not None:
            return self._frame.data[self._filled :]
        return self._scratch[self._end :]

    def received(self, count: int) -> Iterator[Frame]:
        """Take note of bytes that were put there, and yield the frames that are whole.

        Raises:
            WireError: what came is no frame.
        """
        if self._frame is None:
            self._end += count
        else:
            self._filled += count
        while self._next():
            assert self._frame is not None
            frame, self._frame = self._frame, None
            yield _decode(frame, self._head_bytes)

    def head(self) -> dict[str, Any] | None:
        """The head of the frame that is arriving, once all of it is there."""
        if self._frame is None or self._filled < self._head_bytes:
            return None
        return _decode_head(self._frame[: self._head_bytes].data)

    def _next(self) -> bool:
        """Whether a whole frame is there; begins one if none is begun."""
        if self._frame is None:
            rest = self._scratch[self._start : self._end]
            if len(rest) < _LENGTHS.size:
                self._scratch[: len(rest)] = bytes(rest)
                self._start, self._end = 0, len(rest)
                return False
            self._head_bytes, body_bytes = _lengths(rest[: _LENGTHS.size])
            self._frame = np.empty(self._head_bytes + body_bytes, np.uint8)
            self._filled = min(self._frame.size, len(rest) - _LENGTHS.size)
            self._frame.data[: self._filled] = rest[_LENGTHS.size : _LENGTHS.size + self._filled]
            self._start += _LENGTHS.size + self._filled
        return self._filled == self._frame.size


def send(sock: socket.socket, head: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Send a frame over a blocking socket."""
    for piece in encode(head, fields):
        sock.sendall(piece)


def receive(sock: socket.socket, spin_s: Callable[[], float] = lambda: 0.0) -> Iterator[Frame]:
    """The frames that come over a blocking socket, until its end.

    To be woken takes longer than many a batch. So who waited for a frame no longer than ``spin_s()`` looks for the
    next one for as long before it sleeps.

    Raises:
        WireError: what came is no frame.
    """
    reader, waited_s = FrameReader(), math.inf
    while True:
        began, limit_s = time.perf_counter(), spin_s()
        count = _look(sock, reader.space(), began + limit_s) if waited_s < limit_s else None
        if count is None:
            count = sock.recv_into(reader.space())
        if not count:
            return
        waited_s = time.perf_counter() - began
        yield from reader.received(count)


def _look(sock: socket.socket, space: memoryview, end: float) -> int | None:
    """How much was received before the performance counter shows ``end``; others may run meanwhile."""
    while time.perf_counter() < end:
        try:
            return sock.recv_into(space, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            os.sched_yield()
    return None


class FrameProtocol(asyncio.BufferedProtocol):
    """Receives frames on an event loop.

    Args:
        on_frame: Called with head and fields.
        on_lost: Called once when the other side is gone or no longer makes sense.
        on_head: Called once with the head of a frame whose fields take several receptions, before ``on_frame``.
    """

    def __init__(
        self,
        on_frame: Callable[[dict[str, Any], dict[str, Any]], None],
        on_lost: Callable[[], None],
        on_head: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Wait for the first frame."""
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_head = on_head
        self._is_announced = False
        self._reader = FrameReader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, to write to."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner."""
        self._on_lost()

    def write(self, head: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
        """Send a frame."""
        self.transport.writelines(encode(head, fields))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        """Take what is complete."""
        try:
            for head, fields in self._reader.received(nbytes):
                self._is_announced = False
                self._on_frame(head, fields)
            if self._on_head is not None and not self._is_announced and (begun := self._reader.head()) is not None:
                self._is_announced = True
                self._on_head(begun)
        except WireError:
            self.transport.abort()
