"""Frames between processes: invalid bytes end the connection, and the front end continues."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import random
import socket
import struct
import weakref
from array import array
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from service import wire
from tests.whole import Note, choose

ARRAYS = {"inputs": np.arange(6, dtype=np.float64).reshape(2, 3), "weights": np.ones((1, 1), np.float32)}


def feed(data: bytes, pieces: int = 1) -> tuple[list[Any], bool]:
    """Return what a reader makes of bytes that come in so many pieces, and whether it refused them."""
    frames: list[Any] = []
    reader, rest = wire.FrameReader(), memoryview(data)
    while rest:
        space = reader.space()
        count = max(1, min(len(space), len(rest), len(data) // pieces))
        space[:count] = rest[:count]
        rest = rest[count:]
        try:
            frames += reader.received(count)
        except wire.WireError:
            return frames, True
    return frames, False


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
            wire.Receiver(ours).receive()


# Channels.


def on_loop(
    work: Callable[[wire.Channel, socket.socket, list[Any]], Awaitable[None]], most_fds: int = 0
) -> list[Any]:
    """Run work with a channel and the other end of its socket; return what came, "lost" included."""
    seen: list[Any] = []

    async def run() -> None:
        ours, theirs = socket.socketpair()
        theirs.settimeout(5)
        channel = wire.Channel(
            ours, lambda head, fields: seen.append((head, fields)), lambda: seen.append("lost"), most_fds=most_fds
        )
        with theirs:
            await work(channel, theirs, seen)
        for _ in range(3):
            await asyncio.sleep(0)
        channel.close()

    asyncio.run(run())
    return seen


async def until(condition: Callable[[], object]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def with_fds(theirs: socket.socket, head: dict[str, Any], fds: list[int]) -> None:
    data = b"".join(map(bytes, wire.encode(head, {})))
    theirs.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else [])


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "data",
    [b"\0" * 12, struct.pack("<IQ", 9, 0) + b"[" * 9, b"\xff" * 12, b"nonsense " * 100],
    ids=["no head", "no object", "lengths", "text"],
)
def test_what_is_no_frame_ends_a_channel_once(data: bytes) -> None:
    async def work(channel: wire.Channel, theirs: socket.socket, seen: list[Any]) -> None:
        theirs.sendall(data)
        await until(lambda: channel.is_closed)
        channel.write({"op": "late"}, {})
        assert theirs.recv(1) == b""

    assert on_loop(work) == ["lost"]


def test_a_large_frame_waits_for_its_reader_and_loses_nothing() -> None:
    large = np.arange(1 << 20, dtype=np.float64)

    async def work(channel: wire.Channel, theirs: socket.socket, seen: list[Any]) -> None:
        for number in range(3):
            channel.write({"number": number}, {"inputs": large})
        receiver, frames = wire.Receiver(theirs), []
        theirs.setblocking(False)
        for _ in range(10_000):
            try:
                frames += receiver.receive() or []
            except BlockingIOError:
                await asyncio.sleep(0)
            if len(frames) == 3:
                break
        assert [head["number"] for head, _ in frames] == [0, 1, 2]
        assert all(np.array_equal(fields["inputs"], large) for _, fields in frames)

    assert on_loop(work) == ["lost"]  # when the test closes the other end


def test_a_channel_that_is_closed_lets_go_of_whoever_it_calls() -> None:
    class Owner:
        def __init__(self, sock: socket.socket) -> None:
            self.lost = 0
            self.channel = wire.Channel(sock, self.take, self.lose, self.take)

        def take(self, *_: Any) -> None:
            raise AssertionError("nothing comes")

        def lose(self) -> None:
            self.lost += 1

    async def work() -> list[bool]:
        gone = []
        for is_lost in (False, True):
            ours, theirs = socket.socketpair()
            owner = Owner(ours)
            theirs.close()
            if is_lost:
                await until(lambda owner=owner: owner.lost)
            else:
                owner.channel.close()
            assert owner.lost == is_lost
            alive = weakref.ref(owner)
            del owner
            await asyncio.sleep(0)
            gone.append(alive() is None)
        return gone

    gc.disable()
    try:
        assert asyncio.run(work()) == [True, True]
    finally:
        gc.enable()


def test_a_channel_that_is_closed_keeps_nothing() -> None:
    before = open_fds()

    async def work(channel: wire.Channel, theirs: socket.socket, seen: list[Any]) -> None:
        for _ in range(50):
            channel.write({"op": "load"}, {"file": bytes(1 << 20)}, fds=(theirs.fileno(),))
        channel.close()
        channel.close()

    assert on_loop(work) == []
    assert open_fds() <= before


def test_descriptors_come_with_their_frame() -> None:
    async def work(channel: wire.Channel, theirs: socket.socket, seen: list[Any]) -> None:
        read, write = os.pipe()
        with_fds(theirs, {"op": "first"}, [])
        with_fds(theirs, {"op": "attach", "fds": 1}, [write])
        os.close(write)
        await until(lambda: len(seen) == 2)
        (_, _), (head, _) = seen
        os.write(head["fds"][0], b"x")
        assert os.read(read, 1) == b"x"
        os.close(head["fds"][0])
        os.close(read)

    assert [one[0]["op"] for one in on_loop(work, most_fds=1)[:2]] == ["first", "attach"]


def refuse_descriptors(_: int) -> int:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_frame_that_the_socket_takes_needs_no_descriptor_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(channel: wire.Channel, theirs: socket.socket, seen: list[Any]) -> None:
        read, write = os.pipe()
        monkeypatch.setattr("os.dup", refuse_descriptors)
        channel.write({"op": "attach"}, {}, fds=(write,))
        monkeypatch.undo()
        ((head, _),) = wire.Receiver(theirs, most_fds=1).receive() or []
        os.write(head["fds"][0], b"x")
        assert os.read(read, 1) == b"x"
        for fd in (read, write, head["fds"][0]):
            os.close(fd)

    before = open_fds()
    assert on_loop(work) == ["lost"]  # when the test closes the other end
    assert open_fds() <= before


def test_a_frame_that_must_wait_and_gets_no_descriptor_ends_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender of the question learns that no answer comes; a frame left in the channel would never be answered."""

    async def work(channel: wire.Channel, theirs: socket.socket, seen: list[Any]) -> None:
        channel.write({"op": "load"}, {"file": bytes(4 << 20)})
        monkeypatch.setattr("os.dup", refuse_descriptors)
        channel.write({"op": "attach"}, {}, fds=(theirs.fileno(),))
        monkeypatch.undo()
        assert seen == [], "not before the caller is done"
        await until(lambda: channel.is_closed)

    before = open_fds()
    assert on_loop(work) == ["lost"]
    assert open_fds() <= before


@pytest.mark.parametrize("count", [1, -1, "1", True, 1.0, 2**70, [1]], ids=repr)
def test_a_head_that_lies_about_descriptors_is_refused(count: Any) -> None:
    async def work(channel: wire.Channel, theirs: socket.socket, seen: list[Any]) -> None:
        head = {"op": "attach", "fds": count}
        text = json.dumps({**head, "fields": []}).encode()
        theirs.sendall(struct.pack("<IQ", len(text), 0) + text)
        await until(lambda: channel.is_closed)

    assert on_loop(work, most_fds=1) == ["lost"]


def test_descriptors_that_nobody_asked_for_are_closed() -> None:
    before = open_fds()

    async def hostile(channel: wire.Channel, theirs: socket.socket, seen: list[Any]) -> None:
        for _ in range(200):
            try:
                with_fds(theirs, {"op": "done"}, [theirs.fileno()] * 3)
            except OSError:
                break
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)

    assert "lost" in on_loop(hostile, most_fds=1)
    assert open_fds() <= before
    on_loop(hostile, most_fds=0)
    assert open_fds() <= before
