"""Frames between the front and its workers: lengths, a JSON head, raw arrays. Nothing is pickled.

4 bytes   length of the head         little-endian
8 bytes   length of the body
head      JSON object; "arrays" has [name, dtype, shape] of each array in the body
body      the arrays one after the other, C order, native byte order
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

__all__ = ["Array", "FrameProtocol", "WireError", "encode", "receive", "send"]

Array = NDArray[Any]
Frame = tuple[dict[str, Any], dict[str, Array]]

_LENGTHS = struct.Struct("<IQ")
MAX_HEAD_BYTES = 4 << 20
MAX_BODY_BYTES = 4 << 30
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8"), "uint8": np.dtype("u1")}


class WireError(Exception):
    """The other side sent something that is no frame."""


def encode(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[bytes | memoryview]:
    """The pieces of a frame, to be sent one after the other; the arrays are not copied if they are contiguous."""
    flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    table = [[name, array.dtype.name, array.shape] for name, array in flat.items()]
    text = orjson.dumps({**head, "arrays": table})
    body_bytes = sum(array.nbytes for array in flat.values())
    pieces: list[bytes | memoryview] = [_LENGTHS.pack(len(text), body_bytes) + text]
    pieces += [array.reshape(-1).view(np.uint8).data for array in flat.values() if array.nbytes]
    return pieces


def _lengths(prefix: bytes | bytearray | memoryview) -> tuple[int, int]:
    head_bytes, body_bytes = _LENGTHS.unpack(prefix)
    if head_bytes > MAX_HEAD_BYTES or body_bytes > MAX_BODY_BYTES:
        raise WireError(
            f"expected at most {MAX_HEAD_BYTES} and {MAX_BODY_BYTES} bytes, got {head_bytes}, {body_bytes}"
        )
    return head_bytes, body_bytes


def _decode(text: bytes | bytearray | memoryview, body: Array) -> Frame:
    """Head and arrays, which are views into ``body``."""
    try:
        head = orjson.loads(text)
        table = [(str(name), _DTYPES[dtype], tuple(map(int, shape))) for name, dtype, shape in head.pop("arrays")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WireError(f"expected a JSON head with a table of arrays ({type(error).__name__})") from None
    arrays, start = {}, 0
    for name, dtype, shape in table:
        if min(shape, default=0) < 0:
            raise WireError("expected no negative lengths")
        stop = start + math.prod(shape) * dtype.itemsize
        if stop > body.size:
            raise WireError(f"expected arrays within {body.size} bytes, got {stop}")
        try:
            arrays[name] = body[start:stop].view(dtype).reshape(shape)
        except ValueError:  # such as 0 × 2⁶³
            raise WireError("expected a shape that an array can have") from None
        start = stop
    if start != body.size:
        raise WireError(f"expected {body.size} bytes of arrays, got {start}")
    return head, arrays


def send(sock: socket.socket, head: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Send a frame over a blocking socket."""
    for piece in encode(head, arrays):
        sock.sendall(piece)


def receive(sock: socket.socket) -> Frame | None:
    """Receive a frame from a blocking socket, ``None`` at its end.

    Raises:
        WireError: what came is no frame.
    """
    prefix = _receive_exactly(sock, _LENGTHS.size)
    if prefix is None:
        return None
    head_bytes, body_bytes = _lengths(prefix.data)
    text, body = _receive_exactly(sock, head_bytes), _receive_exactly(sock, body_bytes)
    return None if text is None or body is None else _decode(text.data, body)


def _receive_exactly(sock: socket.socket, size: int) -> Array | None:
    buffer = np.empty(size, np.uint8)
    view, start = buffer.data, 0
    while start < size:
        got = sock.recv_into(view[start:])
        if got == 0:
            return None
        start += got
    return buffer


class FrameProtocol(asyncio.BufferedProtocol):
    """Receives frames on an event loop, each straight into the memory that its arrays will be views of.

    Args:
        on_frame: Called with head and arrays.
        on_lost: Called once when the other side is gone or no longer makes sense.
    """

    def __init__(self, on_frame: Callable[[dict[str, Any], dict[str, Array]], None], on_lost: Callable[[], None]):
        """Wait for the first frame."""
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._text = b""
        self._body_bytes = 0
        self._expect(_LENGTHS.size, self._take_lengths)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, to write to."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner."""
        self._on_lost()

    def write(self, head: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Send a frame."""
        self.transport.writelines(encode(head, arrays))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what is complete."""
        self._filled += nbytes
        try:
            while self._filled == len(self._view):
                self._take()
        except WireError:
            self.transport.abort()

    def _expect(self, size: int, take: Callable[[], None]) -> None:
        self._buffer = np.empty(size, np.uint8)
        self._view = self._buffer.data
        self._filled = 0
        self._take = take

    def _take_lengths(self) -> None:
        head_bytes, self._body_bytes = _lengths(self._buffer.data)
        self._expect(head_bytes, self._take_head)

    def _take_head(self) -> None:
        self._text = self._buffer.tobytes()
        self._expect(self._body_bytes, self._take_body)

    def _take_body(self) -> None:
        head, arrays = _decode(self._text, self._buffer)
        self._expect(_LENGTHS.size, self._take_lengths)
        self._on_frame(head, arrays)
