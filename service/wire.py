"""Frames between processes: lengths, a JSON head, raw arrays and byte strings. Nothing is pickled.

4 bytes   length of the head         little-endian
8 bytes   length of the body
head      JSON object, padded with blanks; "fields" has [name, dtype, shape] of each field in the body
body      the fields one after the other: arrays in C order and native byte order, or, with dtype uint8, plain bytes

A frame may carry file descriptors (SCM_RIGHTS); "fds" in its head is their number.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

__all__ = [
    "Array",
    "Channel",
    "Field",
    "Frame",
    "FrameReader",
    "Receiver",
    "WireError",
    "cut",
    "encode",
    "send",
]

Array: TypeAlias = NDArray[Any]
Field = Array | bytes | memoryview
Frame = tuple[dict[str, Any], dict[str, Any]]

_LENGTHS = struct.Struct("<IQ")
MAX_HEAD_BYTES = 4 << 20
MAX_BODY_BYTES = 4 << 30
#: Bytes of a frame up to which its pieces are joined, and of a receiver's scratch buffer.
SMALL_BYTES = 64 << 10
#: Heads are padded to multiples of this many bytes, so that the arrays after them are aligned.
ALIGNMENT = 64
#: Most pieces that one system call sends.
MOST_PIECES = 64
#: Most descriptors that may arrive before the frames that they belong to.
MOST_UNCLAIMED_FDS = 64
_FD_BYTES = array("i").itemsize
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8"), "uint8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WireError(Exception):
    """The other side sent a malformed frame."""


def encode(head: Mapping[str, Any], fields: Mapping[str, Field]) -> list[bytes | memoryview]:
    """Return the pieces of a frame, to be sent in order; large contiguous fields are not copied."""
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


def _decode_head(text: memoryview) -> dict[str, Any]:
    try:
        head = orjson.loads(text)
    except ValueError:
        head = None
    if not isinstance(head, dict):
        raise WireError("expected a JSON object as head")
    return head


def _decode(frame: Array, head_bytes: int) -> Frame:
    """Return the head and the fields of a frame; the fields are views into it."""
    text = frame.data
    head = _decode_head(text[:head_bytes])
    fields: dict[str, Any] = {}
    start = head_bytes
    try:
        for name, dtype, shape in head.pop("fields"):
            if not isinstance(name, str) or min(shape, default=0) < 0:
                raise WireError("expected names, and no negative lengths")
            stop = start + math.prod(shape) * _DTYPES[dtype].itemsize
            if stop > frame.size:
                raise WireError(f"expected fields within {frame.size - head_bytes} bytes, got {stop - head_bytes}")
            if dtype == "uint8":
                fields[name] = text[start:stop]
            else:
                fields[name] = np.ndarray(shape, _DTYPES[dtype], frame, start)
            start = stop
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # such as a shape of 0 × 2⁶³
        raise WireError(f"expected a JSON head with a table of fields ({type(error).__name__})") from None
    if start != frame.size:
        raise WireError(f"expected {frame.size - head_bytes} bytes of fields, got {start - head_bytes}")
    return head, fields


def cut(whole: Any, sizes: Iterable[int]) -> list[Any]:
    """Cut a sequence into consecutive slices of the given sizes.

    Examples:
        >>> cut("abcdef", [1, 3, 2])
        ['a', 'bcd', 'ef']
    """
    return [whole[start:end] for start, end in pairwise([0, *accumulate(sizes)])]


class FrameReader:
    """Cuts a stream of bytes into frames.

    Data is received into a scratch buffer, many small frames at once; the rest of a frame that does not fit is
    received directly into the memory of its arrays.
    """

    def __init__(self) -> None:
        """Wait for the first frame."""
        self._scratch = memoryview(bytearray(SMALL_BYTES))
        self._end = 0
        self._frame: Array | None = None
        self._head_bytes = self._filled = 0

    def space(self) -> memoryview:
        """Return the buffer for the next bytes; it is never empty."""
        if self._frame is not None:
            return self._frame.data[self._filled :]
        return self._scratch[self._end :]

    def received(self, count: int) -> list[Frame]:
        """Process ``count`` bytes that were written to :meth:`space`, and return the complete frames.

        Raises:
            WireError: the bytes are not a valid frame.
        """
        if self._frame is not None:
            self._filled += count
            if self._filled < self._frame.size:
                return []
            frame, self._frame = self._frame, None
            return [_decode(frame, self._head_bytes)]
        frames = []
        scratch, start, end = self._scratch, 0, self._end + count
        while end - start >= _LENGTHS.size:
            head_bytes, body_bytes = _LENGTHS.unpack_from(scratch, start)
            if head_bytes > MAX_HEAD_BYTES or body_bytes > MAX_BODY_BYTES:
                most = f"{MAX_HEAD_BYTES} and {MAX_BODY_BYTES}"
                raise WireError(f"expected at most {most} bytes, got {head_bytes}, {body_bytes}")
            start += _LENGTHS.size
            frame = np.empty(head_bytes + body_bytes, np.uint8)
            here = min(frame.size, end - start)
            frame.data[:here] = scratch[start : start + here]
            start += here
            if here < frame.size:
                self._frame, self._head_bytes, self._filled = frame, head_bytes, here
                break
            frames.append(_decode(frame, head_bytes))
        self._end = end - start
        if self._end:
            scratch[: self._end] = bytes(scratch[start:end])
        return frames

    def head(self) -> dict[str, Any] | None:
        """Return the head of the incomplete frame, or ``None`` if the head is incomplete."""
        if self._frame is None or self._filled < self._head_bytes:
            return None
        return _decode_head(self._frame[: self._head_bytes].data)


def send(sock: socket.socket, head: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Send a frame over a blocking socket."""
    for piece in encode(head, fields):
        sock.sendall(piece)


class Receiver:
    """Receives frames, and the descriptors that come with them, from a socket.

    Args:
        sock: The socket; it may be blocking.
        most_fds: Most descriptors that may come with one frame; the system closes further ones.
    """

    def __init__(self, sock: socket.socket, most_fds: int = 0) -> None:
        """Wait for the first frame."""
        self._sock = sock
        self._reader = FrameReader()
        self._most_fds = most_fds
        self._fds: deque[int] = deque()

    def receive(self, flags: int = 0) -> list[Frame] | None:
        """Return the frames that are complete after one reception; ``None`` at the end of the stream.

        Raises:
            BlockingIOError: no data is available, and the socket or the flags are non-blocking.
            WireError: the bytes are not a valid frame.
        """
        space = self._reader.space()
        count = self._receive_with_fds(space, flags) if self._most_fds else self._sock.recv_into(space, 0, flags)
        if not count:
            return None
        frames = self._reader.received(count)
        for head, _ in frames:
            if "fds" in head:
                head["fds"] = self._claim(head["fds"])
        return frames

    def head(self) -> dict[str, Any] | None:
        """Return the head of the incomplete frame, or ``None`` if the head is incomplete."""
        return self._reader.head()

    def close(self) -> None:
        """Close the socket, and the received descriptors that no frame has claimed."""
        self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())

    def _receive_with_fds(self, space: memoryview, flags: int) -> int:
        ancillary_bytes = socket.CMSG_SPACE(self._most_fds * _FD_BYTES)
        count, ancillary, _, _ = self._sock.recvmsg_into([space], ancillary_bytes, flags)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.extend(array("i", data[: len(data) - len(data) % _FD_BYTES]))
        if len(self._fds) > MOST_UNCLAIMED_FDS:
            raise WireError("expected descriptors with frames that mention them, got others")
        return count

    def _claim(self, count: object) -> list[int]:
        """Return the descriptors that belong to a frame, whose head gives their number."""
        if type(count) is not int or not 0 <= count <= len(self._fds):
            raise WireError(f"expected as many descriptors as the head says, got {len(self._fds)}")
        return [self._fds.popleft() for _ in range(count)]


class Channel:
    """Sends and receives frames on an event loop, over a socket pair.

    Args:
        sock: The socket.
        on_frame: Called with the head and the fields of each frame.
        on_lost: Called once when the other side closes or sends a malformed frame; not after :meth:`close`.
        on_head: Called with the head of a frame whose fields arrive later, before ``on_frame``.
        most_fds: Most descriptors that a frame may carry.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_frame: Callable[[dict[str, Any], dict[str, Any]], None],
        on_lost: Callable[[], None],
        on_head: Callable[[dict[str, Any]], None] | None = None,
        most_fds: int = 0,
    ) -> None:
        """Register the socket with the running event loop."""
        sock.setblocking(False)
        self._sock = sock
        self._on_frame, self._on_lost, self._on_head = on_frame, on_lost, on_head
        self._receiver = Receiver(sock, most_fds)
        self._is_announced = False
        self._waiting: deque[tuple[list[bytes | memoryview], Sequence[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self.is_closed = False
        self._awake_until_s = 0.0
        self._is_polling = False
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def write(self, head: Mapping[str, Any], fields: Mapping[str, Field], fds: Sequence[int] = ()) -> None:
        """Send a frame, with duplicates of descriptors; bytes that the socket does not accept now are buffered.

        A channel that cannot send, or finds no descriptor for a duplicate, is lost.
        """
        if self.is_closed:
            return
        pieces = encode({**head, "fds": len(fds)} if fds else head, fields)
        try:
            if not self._waiting:
                pieces, fds = self._send(pieces, fds)
            if pieces:
                self._waiting.append((pieces, [os.dup(fd) for fd in fds]))
                if len(self._waiting) == 1:
                    self._loop.add_writer(self._sock.fileno(), self._on_writable)
        except OSError:
            self._loop.call_soon(self._lose)

    def stay_awake(self, seconds: float) -> None:
        """Keep the event loop from sleeping until the next frame arrives, at most for the given time.

        Waking up from sleep takes longer than computing a small batch.
        """
        self._awake_until_s = time.monotonic() + seconds
        if not self._is_polling:
            self._poll()

    def _poll(self) -> None:
        self._is_polling = time.monotonic() < self._awake_until_s
        if self._is_polling:
            os.sched_yield()  # the other side may need this processor
            self._loop.call_soon(self._poll)

    def close(self) -> None:
        """Forget what waits and whom to call, and close the socket."""
        if self.is_closed:
            return
        self.is_closed = True
        self._awake_until_s = 0.0
        # The callbacks' owners hold the channel; without them there is no cycle for the collector.
        self._on_frame, self._on_lost, self._on_head = _ignore, _ignore, None
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        for _, fds in self._waiting:
            _close_all(fds)
        self._waiting.clear()
        self._receiver.close()

    def _send(
        self, pieces: list[bytes | memoryview], fds: Sequence[int]
    ) -> tuple[list[bytes | memoryview], Sequence[int]]:
        """Send as much of a frame as the socket accepts, and return the rest.

        Raises:
            OSError: the other side is gone.
        """
        while pieces:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg(pieces[:MOST_PIECES], ancillary)
            except (BlockingIOError, InterruptedError):
                break
            fds = ()
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.pop(0))
            if sent:
                pieces[0] = memoryview(pieces[0])[sent:]
        return pieces, fds

    def _on_writable(self) -> None:
        while self._waiting:
            pieces, fds = self._waiting[0]
            try:
                rest, unsent = self._send(pieces, fds)
            except OSError:
                self._lose()
                return
            if not unsent:
                _close_all(fds)
            if rest:
                self._waiting[0] = rest, unsent
                return
            self._waiting.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _on_readable(self) -> None:
        self._awake_until_s = 0.0
        try:
            frames = self._receiver.receive()
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, WireError):
            frames = None
        if frames is None:
            self._lose()
            return
        try:
            for head, fields in frames:
                self._is_announced = False
                self._on_frame(head, fields)
            if not frames and self._on_head is not None and not self._is_announced:
                begun = self._receiver.head()
                if begun is not None:
                    self._is_announced = True
                    self._on_head(begun)
        except WireError:
            self._lose()

    def _lose(self) -> None:
        if not self.is_closed:
            on_lost = self._on_lost
            self.close()
            on_lost()


def _ignore(*_: Any) -> None:
    """Do nothing with what comes for a closed channel."""


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
