"""The front end in one process: application, connections and scheduler, with simulated sockets and workers."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hessquik_client.errors import ServiceError
from hessquik_client.quantities import row_shapes
from service import link
from service.app import create_app
from service.codecs import json_rows
from service.http.connection import Connection, Limits, Listener
from service.node import Health
from service.repository import ModelFile, Served, Table
from service.settings import Settings
from tests.simulation.loop import SimulatedLoop

D, M = 2, 1
FACTS = {
    "d": D, "m": M, "dtype": "float64", "device": "cpu", "parameters": 1, "members": 1,
    "architecture": {}, "metadata": {}, "sha256": "00",
}  # fmt: skip


class Node:
    """A stand-in for the node: a table of models, without workers to load them."""

    def __init__(self) -> None:
        self.repository = Table(Path("/models"))
        self.numbers = iter(range(1, 1_000_000))
        self.load("a")

    def load(self, name: str) -> None:
        """Add a model to the table, and retire the one that it replaces, if any."""
        served = Served(ModelFile(name, 1, Path(f"/models/{name}")), next(self.numbers), facts=dict(FACTS))
        replaced = self.repository._table.setdefault(name, {}).get(1)
        self.repository._table[name][1] = served
        if replaced is not None:
            self.repository.retire(replaced)

    def unload(self, name: str) -> None:
        for served in self.repository._table.pop(name).values():
            self.repository.retire(served)

    def health(self) -> Health:
        return Health(is_loaded=True, is_fresh=True)


class Socket:
    """The worker's end of a link; it replies when :meth:`answer` is called."""

    def __init__(self, _: Any, on_frame: Any, on_lost: Any, on_head: Any) -> None:
        self.on_frame, self.on_lost = on_frame, on_lost
        self.asked: list[tuple[dict[str, Any], int, bool]] = []
        self.is_closed = False

    def write(self, head: dict[str, Any], fields: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        if head["op"] == "plan":
            self.on_frame({"op": "planned", "number": head["number"], "row_cost": 100.0, "row_s": 1e-6}, {})
        elif head["op"] == "evaluate":
            k = fields["directions"].shape[1] if "directions" in fields else 0
            self.asked.append((head, k, "weights" in fields))

    def stay_awake(self, seconds: float) -> None:
        """Do nothing: simulated time costs nothing."""

    def close(self) -> None:
        self.is_closed = True
        self.on_frame = self.on_lost = lambda *_: None  # as Channel does

    def answer(self, error: str | None = None) -> None:
        """Reply to all requests that have arrived."""
        asked, self.asked = self.asked, []
        for head, k, is_weighted in asked:
            reply: dict[str, Any] = {"op": "done", "number": head["number"]}
            fields: dict[str, Any] = {}
            shapes = row_shapes(tuple(head["quantities"]), D, M, k, is_weighted)
            if error is not None:
                reply["error"] = error
            elif head["form"] == "arrays":
                rows = sum(head["sizes"])
                fields = {
                    name: np.zeros((rows, *shape)) for name, shape in zip(head["quantities"], shapes, strict=True)
                }
            else:
                texts = [json_rows(np.zeros((size, *shape))) for shape in shapes for size in head["sizes"]]
                reply["lengths"], fields["text"] = list(map(len, texts)), b"".join(texts)
            self.on_frame(reply, fields)


class Transport:
    """A client's socket.

    Attributes:
        sent: Bytes that were sent to the client.
        takes: Whether the client reads them.
    """

    def __init__(self, front: Front) -> None:
        self.front, self.sent = front, bytearray()
        self.takes, self.is_over, self.is_reading = True, False, True
        self.connection: Connection | None = None

    def write(self, data: Any) -> None:
        if not self.is_over:
            self.sent += data
            if not self.takes and len(self.sent) > 1 << 16 and self.connection is not None:
                self.connection.pause_writing()

    def writelines(self, pieces: Any) -> None:
        self.write(b"".join(pieces))

    def write_eof(self) -> None:
        """Do nothing: tests look at ``sent`` alone."""

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        self.lose(None)

    def abort(self) -> None:
        self.lose(None)

    def lose(self, error: Exception | None) -> None:
        """End the connection, in the next iteration of the loop."""
        self.is_over = True
        connection, self.connection = self.connection, None
        if connection is not None:
            self.front.loop.call_soon(connection.connection_lost, error)

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def get_write_buffer_size(self) -> int:
        return 0 if self.takes else len(self.sent)

    def get_extra_info(self, name: str) -> Any:
        return None


class Clock:
    """The scheduler's clock, which is the simulated loop's."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.time, self.call_at, self.call_soon = loop.time, loop.call_at, loop.call_soon


class Front:
    """An application, one worker and any number of clients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        monkeypatch.setattr(link, "Channel", Socket)
        self.loop = SimulatedLoop(lambda: 0.0)
        for module in ("service.http.connection", "service.http.messages", "service.front"):
            monkeypatch.setattr(f"{module}.monotonic", self.loop.time)
        self.node = Node()
        self.state = SimpleNamespace(connections=set(), default_headers=[])
        self.app = create_app(Settings(models=Path("/models"), device="cpu", **settings), self.node)  # type: ignore[arg-type]
        self.core = self.app.core
        self.core.scheduler._clock = Clock(self.loop)
        limits = Limits(**{name: getattr(self.core.settings, name) for name in Limits._fields})
        self.listener = Listener(self.app.front, limits)
        self.attach()

    @property
    def worker(self) -> Any:
        """The worker's end of the only link."""
        (one,) = self.core.links._links
        return one._channel

    def attach(self) -> None:
        """Use a new worker."""
        self.loop.run(self.core.links.add, None)

    def connect(self, data: bytes = b"", takes: bool = True) -> Transport:
        """Return the socket of a new client that has sent ``data``."""
        transport = Transport(self)
        transport.takes = takes
        transport.connection = self.loop.run(self.listener.connect, self.state)
        self.call(transport.connection.connection_made, transport)
        if data:
            self.send(transport, data)
        return transport

    def send(self, transport: Transport, data: bytes) -> None:
        if transport.connection is not None:
            self.call(transport.connection.data_received, data)

    def call(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Call a function, and run all callbacks that are due then."""
        self.loop.run(work, *arguments)
        self.settle()

    def settle(self) -> None:
        """Run all callbacks that are due, and drop cancelled timers."""
        while self.loop.next_s() is not None and self.loop.next_s() <= self.loop.now:  # type: ignore[operator]
            self.loop.step()
        self.loop._timers = [timer for timer in self.loop._timers if not timer[2].cancelled()]
        heapq.heapify(self.loop._timers)

    def pass_time(self, seconds: float) -> None:
        """Advance the time, and run the callbacks that become due."""
        end_s = self.loop.now + seconds
        while (next_s := self.loop.next_s()) is not None and next_s <= end_s:
            self.loop.step()
        self.loop.now = end_s
        self.settle()

    def answer(self, error: str | None = None) -> None:
        """Let the worker reply to all requests that have arrived."""
        self.call(self.worker.answer, error)

    def lose_worker(self) -> None:
        """Kill the worker and start another."""
        worker = self.worker
        on_lost = worker.on_lost
        worker.close()
        self.call(on_lost)
        self.attach()
        self.settle()

    def abandon_all(self, error: ServiceError) -> None:
        for connection in list(self.state.connections):
            self.call(connection.give_up, error)
