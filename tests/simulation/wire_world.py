"""Simulation of HTTP connections: packets, pauses, resets, slow readers and late answers are drawn from one seed.

Each client has a list of requests and knows their replies. After every event the invariants (the ledger) are checked.
Replies arrive in order, each with the result of its request. Every request that the application handles ends once.
The bytes held are those of unfinished requests and replies. An open connection has a timer, and a closed one holds
nothing.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from heapq import heappop
from types import ModuleType, SimpleNamespace
from typing import Any

from hessquik_client.errors import ClientGone, Overloaded, ServiceError
from service.http import connection as connection_module
from service.http.messages import JSON, Budget, Head, Reply, Request
from tests.service.simulated import SimulatedClock
from tests.simulation.planted import planted
from tests.simulation.world import expect, play

RECEIVE_S, SEND_S, KEEP_S = 3.0, 2.0, 5.0
MOST_BODY, BUDGET, HIGH_WATER = 150_000, 400_000, 64 << 10
#: Slack for the resolution of timers, and for checks that a connection makes at a quarter of a limit.
LATE_S = 0.01
KINDS = ["small"] * 8 + ["large", "body", "chunks", "refused", "head", "broken", "upgrade", "huge", "last"]
_REPLY = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r]*\r\n(.*?)\r\n\r\n", re.DOTALL)


def make_module(old: str = "", new: str = "") -> ModuleType:
    """Return a copy of ``service.http.connection``, with a piece of its source replaced."""
    return planted(connection_module, old, new)


class Loop:
    """The part of an event loop that a connection uses, on simulated time."""

    def __init__(self, clock: SimulatedClock) -> None:
        self._clock = clock
        self.time = clock.time

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Any:
        return self._clock.call_at(self._clock.now + delay_s, callback)


class Transport:
    """A socket whose peer reads any amount at any time."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.buffer = bytearray()
        self.is_over = self.is_reading_paused = self.has_eof = self.is_paused = False

    def write(self, data: Any) -> None:
        expect(not self.has_eof, "nothing is written after the sending side was closed")
        if not self.is_over:
            if not self.buffer:
                self.peer.last_progress_s = self.peer.world.clock.now
            self.buffer += data
            self.peer.last_event_s = self.peer.world.clock.now
            self.peer.take_soon()
            if len(self.buffer) > HIGH_WATER and not self.is_paused:
                self.is_paused = True
                self.peer.connection.pause_writing()

    def writelines(self, pieces: Any) -> None:
        self.write(b"".join(pieces))

    def write_eof(self) -> None:
        self.has_eof = True
        self.peer.take_soon()

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        self.is_over = True
        if not self.buffer:
            self.peer.lose_soon(None)

    def abort(self) -> None:
        self.is_over = True
        self.buffer.clear()
        self.peer.lose_soon(None)

    def pause_reading(self) -> None:
        self.is_reading_paused = True

    def resume_reading(self) -> None:
        self.is_reading_paused = False
        self.peer.send_soon()

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def get_extra_info(self, name: str) -> Any:
        return SimpleNamespace(getsockopt=lambda *_: 104 if self.peer.has_left else 0)


class Peer:
    """A client that sends requests in packets and reads replies; it may stall, half-close or reset its connection."""

    def __init__(self, world: WireWorld) -> None:
        self.world, draw = world, world.random
        self.is_good = draw.random() < 0.6
        is_plain = draw.random() < 0.3
        count = draw.choice([1, 1, 2, 5, 40]) if not is_plain else draw.choice([3, 80])
        self.script = [world.new_request("small" if is_plain else draw.choice(KINDS)) for _ in range(count)]
        self.expected = [reply for _, reply in self.script]
        data = b"".join(data for data, _ in self.script)
        if not self.is_good and draw.random() < 0.3:
            data = data[: draw.randrange(len(data) + 1)]
        self.cuts = [data for data, _ in self.script] if is_plain and self.is_good else self.cut(data)
        self.pace_s = draw.choice([0.0, 0.001, 0.05])
        self.is_good = self.is_good and len(self.cuts) * self.pace_s < RECEIVE_S / 2
        self.takes = self.is_good or draw.random() < 0.7
        self.closes = self.is_good or draw.random() < 0.5
        self.received = bytearray()
        self.seen = 0
        self.has_left = self.is_lost = self.is_half_closed = self.is_taking = self.is_sending = False
        self.last_progress_s = self.last_event_s = world.clock.now
        self.connection = world.listener.connect(world.state)
        self.transport = Transport(self)
        self.connection.connection_made(self.transport)
        self.send_soon()

    def cut(self, data: bytes) -> list[bytes]:
        """Split data into packets."""
        draw = self.world.random
        if draw.random() < 0.3:
            return [data] if data else []
        size = draw.choice([1 if len(data) < 600 else 97, 40, 1000, 65536])
        return [data[at : at + size] for at in range(0, len(data), size)]

    def later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.world.clock.call_at(self.world.clock.now + delay_s, callback)

    def send_soon(self) -> None:
        if not self.is_sending:
            self.is_sending = True
            self.later(self.pace_s, self.send)

    def send(self) -> None:
        self.is_sending = False
        if self.is_lost or self.has_left or self.transport.is_reading_paused or self.transport.is_over:
            return
        self.last_event_s = self.world.clock.now
        if self.cuts:
            self.connection.data_received(self.cuts.pop(0))
            stalls = not self.is_good and self.world.random.random() < 0.05
            if not stalls:
                self.send_soon()
        elif not self.is_good and not self.is_half_closed and self.world.random.random() < 0.3:
            self.is_half_closed = True
            if not self.connection.eof_received():
                self.transport.close()

    def take_soon(self) -> None:
        if not self.is_taking and self.takes:
            self.is_taking = True
            self.later(self.pace_s, self.take)

    def take(self) -> None:
        """Read a part of the data that was sent to the client."""
        self.is_taking = False
        transport = self.transport
        if self.is_lost or self.has_left:
            return
        size = len(transport.buffer) if self.pace_s == 0 else self.world.random.choice([100, 5_000, 100_000])
        self.received += transport.buffer[:size]
        del transport.buffer[:size]
        self.last_progress_s = self.last_event_s = self.world.clock.now
        if transport.is_paused and len(transport.buffer) <= HIGH_WATER // 4:
            transport.is_paused = False
            self.connection.resume_writing()
        if transport.buffer:
            self.take_soon()
        elif transport.is_over:
            self.lose_soon(None)
        elif transport.has_eof and self.closes:
            transport.close()  # the client closes its side, too

    def leave(self) -> None:
        """Reset the connection."""
        if not self.is_lost and not self.has_left:
            self.has_left = True
            self.is_good = False
            self.transport.is_over = True
            self.lose_soon(ConnectionResetError())

    def lose_soon(self, error: Exception | None) -> None:
        self.later(0.0, lambda: self.lose(error))

    def lose(self, error: Exception | None) -> None:
        if not self.is_lost:
            self.is_lost = True
            self.connection.connection_lost(error)
            self.world.ended(self)

    def check(self) -> None:
        """Compare the replies that arrived with the expected ones."""
        data = bytes(self.received).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
        while (found := _REPLY.match(data)) is not None:
            status, fields = int(found[1]), found[2]
            length = int(re.search(rb"content-length: (\d+)", fields)[1])  # type: ignore[index]
            expect(self.seen < len(self.expected), "there are no more replies than requests")
            statuses, body, is_head = self.expected[self.seen]
            # A refused connection is answered before its method is known.
            end = found.end() + (0 if is_head and status == 200 else length)
            if len(data) < end:
                break
            got = data[found.end() : end]
            expect(status in statuses, f"request {self.seen} is answered with one of {statuses}, got {status}")
            if status == 200:
                expect(is_head or got == body, "a reply has the numbers of its own request")
            self.seen += 1
            self.received = self.received[len(self.received) - len(data) + end :]
            data = data[end:]
            if b"connection: close" in fields:
                expect(not data, "nothing follows the last reply")
                self.seen = len(self.expected)


class WireWorld:
    """Connections to an application that answers late or never, on simulated time."""

    def __init__(self, seed: int, module: ModuleType) -> None:
        self.random = random.Random(seed)
        self.clock = SimulatedClock()
        module.__dict__["asyncio"] = SimpleNamespace(get_running_loop=lambda: Loop(self.clock), Transport=object)
        self.budget = Budget(BUDGET)
        self.state = SimpleNamespace(connections=set(), default_headers=[])
        limits = module.Limits(MOST_BODY, 2048, 16, 6, RECEIVE_S, SEND_S, KEEP_S)
        self.listener = module.Listener(self, limits)
        self.peers: list[Peer] = []
        self.pending: dict[Request, bytes] = {}
        self.numbers = 0
        self.events = 0
        self.ends: Counter[str] = Counter()

    # The application.

    def admit(self, head: Head) -> None:
        if head.path == "/refused":
            raise Overloaded("refused before its body is read")

    def handle(self, request: Request) -> None:
        expect(request not in self.pending, "a request is handed over once")
        self.pending[request] = request.body
        self.ends["handled"] += 1
        delay_s = self.random.choice([None, 0.0, 0.01, 0.2, 4.0])
        if delay_s is None:
            self.answer(request)
        else:
            self.clock.call_at(self.clock.now + delay_s, lambda: self.answer(request))

    def answer(self, request: Request) -> None:
        if request not in self.pending:
            return
        body = self.pending.pop(request)
        size = int(body[:6] or b"1") if request.head.path == "/large" else 1
        pieces = [b"=", body, b"." * size]
        self.ends["answered" if request.respond(request, Reply(200, JSON, pieces)) else "unwanted"] += 1

    def fail(self, request: Request, error: Exception) -> None:
        status = error.status if isinstance(error, ServiceError) else 500
        self.ends[f"refused {status}"] += 1
        request.respond(request, Reply(status, JSON, [b"{}"]))

    def abandon(self, request: Request, error: ServiceError) -> None:
        self.ends["abandoned"] += 1
        self.pending.pop(request, None)
        request.respond(request, Reply(error.status if not isinstance(error, ClientGone) else 500, JSON, [b"{}"]))

    # The clients.

    def new_request(self, kind: str) -> tuple[bytes, tuple[set[int], bytes, bool]]:
        """Return a request's bytes, and its reply: statuses, body, and whether the body is left out."""
        draw = self.random
        self.numbers += 1
        body = b"%06d" % draw.choice([1, 10, 100_000 if kind == "large" else 20]) + b"-%06d" % self.numbers
        path, fields, method = b"/small", b"", b"POST"
        statuses, is_head = {200, 503}, False
        if kind == "large":
            path = b"/large"
        elif kind == "body":
            body += b"x" * (draw.choice([70_000, MOST_BODY]) - len(body))
        elif kind == "refused":
            path, statuses = b"/refused", {503}
        elif kind == "head":
            method, is_head, body = b"HEAD", True, b""
        elif kind == "upgrade":
            fields = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
        elif kind == "last":
            fields = b"Connection: close\r\n"
        elif kind == "huge":
            body += b"x" * (MOST_BODY + 1 - len(body))
            statuses = {413, 503}
        reply = b"=" + body + b"." * (int(body[:6] or b"1") if path == b"/large" else 1)
        expected = statuses, reply, is_head
        if kind == "broken":
            data = draw.choice([b"POST /small HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"nonsense\r\n\r\n"])
            return data, ({400, 503}, b"", False)
        if kind == "chunks":
            fields += b"Transfer-Encoding: chunked\r\n"
            body += b"x" * draw.choice([0, 0, 100_000])
            expected = statuses, b"=" + body + b".", is_head
            size = 5 if len(body) < 100 else 30_000
            pieces = (body[at : at + size] for at in range(0, len(body), size))
            data = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        else:
            fields += b"Content-Length: %d\r\n" % len(body)
            data = body
        return b"%b %b HTTP/1.1\r\nHost: x\r\n%b\r\n%b" % (method, path, fields, data), expected

    def ended(self, peer: Peer) -> None:
        """Check that a connection that has ended holds nothing, and that its client got all replies."""
        self.peers.remove(peer)
        peer.check()
        connection = peer.connection
        held = [
            connection._transport,
            connection._parser,
            connection._timer,
            connection._current,
            connection._incoming,
        ]
        expect(all(one is None for one in held), "a connection that has ended holds nothing")
        expect(not connection._queue and not connection._pieces, "a connection that has ended holds no requests")
        expect(connection not in self.state.connections, "a connection that has ended is forgotten")
        expect(all(request.respond.__self__ is not connection for request in self.pending), "its work is stopped")
        is_cut_off = connection._discard_left < 0  # it sent too much after what could not be read
        if peer.is_good and not is_cut_off:
            self.ends["good"] += 1
            expect(peer.seen == len(peer.expected), "a client that behaves gets a reply to every request")

    # Time.

    def step(self) -> None:
        self.events += 1
        drawn = self.random.random()
        if drawn < 0.02 and len(self.peers) < 8:
            self.peers.append(Peer(self))
        elif drawn < 0.022 and self.peers:
            self.random.choice(self.peers).leave()
        elif drawn < 0.0225 and self.peers:
            peer = self.random.choice(self.peers)
            peer.is_good = False
            peer.connection.shutdown()
        else:
            self.next_event()
        self.check()

    def next_event(self) -> None:
        clock = self.clock
        if clock._events:
            clock.now, _, timer, callback = heappop(clock._events)
            if not timer.is_cancelled:
                callback()

    def drain(self) -> None:
        last = self.events + 100_000
        while self.clock._events:
            self.events += 1
            expect(self.events < last, "a world without new clients comes to rest")
            self.next_event()
            self.check()
        expect(not self.peers, "every connection ends")
        expect(not self.pending, "every request ends")
        expect(self.budget.held_bytes == 0, "no bytes are held for clients that are gone")

    def check(self) -> None:
        """Check the connections' state against what was observed from outside."""
        now, held = self.clock.now, 0
        for peer in self.peers:
            connection = peer.connection
            if peer.received:
                peer.check()
            requests = [connection._current, connection._incoming, *connection._queue]
            held += sum(one.held_bytes for one in requests if one is not None) + connection._sending_bytes
            if not peer.is_lost and not peer.transport.is_over:
                expect(connection._timer is not None, "an open connection has a timer")
                expect(not connection._timer.is_cancelled, "the timer of an open connection is set")
                expect(connection._timer_s >= now - LATE_S, "no timer is forgotten")
            if peer.is_lost or peer.has_left:
                continue
            if peer.transport.buffer:
                # Small replies are not watched from the beginning: the usual look finds them.
                limit_s = 1.5 * SEND_S + KEEP_S
                expect(now - peer.last_progress_s <= limit_s, "a client that takes nothing is cut off")
            is_answering = connection._current is not None or bool(connection._queue)
            silent_s = now - peer.last_event_s
            expect(is_answering or silent_s <= KEEP_S + RECEIVE_S, "a connection that is silent is closed")
        expect(
            self.budget.held_bytes == held, f"bytes held are those under way, {held}, got {self.budget.held_bytes}"
        )


def run_wire(seed: int, steps: int, module: ModuleType) -> WireWorld:
    """Run the simulation of connections with a seed."""
    replays = f"tests.simulation.wire_world.run_wire({seed}, {steps}, make_module())"
    world: WireWorld = play(WireWorld(seed, module), steps, replays)
    return world
