"""Frames between processes: whatever comes is a frame, or ends the connection; the front goes on."""

from __future__ import annotations

import random
import socket
import struct
from typing import Any

import numpy as np
import pytest

from service import wire
from tests.whole import Note, choose

ARRAYS = {"inputs": np.arange(6, dtype=np.float64).reshape(2, 3), "weights": np.ones((1, 1), np.float32)}


class Transport:
    """Notes that it is broken off."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True


def feed(data: bytes, pieces: int = 1) -> tuple[list[Any], bool]:
    """What a protocol makes of bytes that come in so many pieces, and whether it broke off."""
    frames: list[Any] = []
    protocol = wire.FrameProtocol(lambda head, arrays: frames.append((head, arrays)), lambda: None)
    transport = Transport()
    protocol.transport = transport  # type: ignore[assignment]
    rest = memoryview(data)
    while rest and not transport.aborted:
        buffer = protocol.get_buffer(-1)
        count = max(1, min(len(buffer), len(rest), len(data) // pieces))
        buffer[:count] = rest[:count]
        rest = rest[count:]
        protocol.buffer_updated(count)
    return frames, transport.aborted


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_a_frame_arrives_as_it_was_sent(pieces: int) -> None:
    data = b"".join(map(bytes, wire.encode({"op": "evaluate"}, ARRAYS)))
    frames, aborted = feed(data * 3, pieces)
    assert not aborted
    assert len(frames) == 3
    for head, fields in frames:
        assert head == {"op": "evaluate"}
        assert all(np.array_equal(fields[name], ARRAYS[name]) for name in ARRAYS)


def test_mutated_frames_raise_nothing_else(note: Note) -> None:
    random_, count, broken = random.Random(5), choose(3000, 10_000), 0
    good = b"".join(map(bytes, wire.encode({"op": "done"}, ARRAYS)))
    head_bytes = len(good) - sum(array.nbytes for array in ARRAYS.values())
    for _ in range(count):
        data = bytearray(good)
        for _ in range(random_.choice((1, 2, 5))):
            at = random_.randrange(12, head_bytes) if random_.random() < 0.8 else random_.randrange(12)
            data[at] = random_.choice((random_.randrange(256), 48 + random_.randrange(10)))
        _, body = struct.unpack("<IQ", data[:12])
        if body <= 1 << 20:  # larger ones only wait for bytes that never come
            _, aborted = feed(bytes(data))
            broken += aborted
    note(f"{count} mutated frames: {broken} ended the connection, none anything else")
    assert broken > 0


@pytest.mark.parametrize(
    ("table", "body"),
    [
        ([["a", "float64", [2**62]]], 8),
        ([["a", "float64", [0, 2**63]]], 0),
        ([["a", "float64", [-1]]], 8),
        ([["a", "float64", [1, 1]]], 16),
        ([["a", "object", [1]]], 8),
        ([["a", ["float64"], [1]]], 8),
        ([["a", "float64"]], 8),
        ([["a", "float64", "1"]], 16),
        ({"a": 1}, 0),
        (None, 0),
    ],
    ids=["huge", "zero of huge", "negative", "too little", "objects", "list", "short", "text", "object", "null"],
)
def test_a_table_that_lies_is_refused(table: Any, body: int) -> None:
    import orjson

    text = orjson.dumps({"op": "done", "arrays": table}, option=orjson.OPT_PASSTHROUGH_SUBCLASS)
    _, aborted = feed(struct.pack("<IQ", len(text), body) + text + bytes(body) + b"\0")
    assert aborted


@pytest.mark.parametrize(
    "lengths", [(wire.MAX_HEAD_BYTES + 1, 0), (2, wire.MAX_BODY_BYTES + 1)], ids=["head", "body"]
)
def test_lengths_are_checked_before_memory_is_taken(lengths: tuple[int, int]) -> None:
    assert feed(struct.pack("<IQ", *lengths))[1]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<IQ", *lengths))
        with pytest.raises(wire.WireError, match="at most"):
            next(wire.receive(ours))
