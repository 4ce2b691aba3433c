"""One of several front-end processes: it serves HTTP with the workers and models of the supervisor.

Run as ``python -P -m service.frontend FD``; FD is one end of a socket pair with the supervisor. The supervisor sends

    start     {"op", "settings", "fds": 1}         the first frame: what to serve, and a socket to listen on
    worker    {"op", "fds": 1}                     a connection to a worker that is ready
    state     {"op", "number"} + "news"            a few times a second, and at once when the table of models changes:
                                                   JSON with the workers' state "health", and the versions that are
                                                   "served" or changed, and "gone" → {"op": "told", "number"}
    keys      {"op", "api_keys", "admin_keys"}     keys that replace those of the start
    replied   {"op", "number", …}                  the answer to a load, unload or metrics frame
    report    {"op", "number"}                     → {"op": "reported", "number"} + metrics of this process
    give_up   {"op"}                               workers cannot be kept alive

This process sends, besides the answers, {"op": "load" | "unload" | "metrics", "number", "name"?}, and
{"op": "released", "id"} when no request uses a removed version any more.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import orjson

from hessquik_client.errors import BY_CODE, InternalError, ServiceError

from . import wire
from .child import end_with_parent
from .metrics import Metrics
from .node import Health
from .repository import ModelFile, Served, Table
from .settings import Settings

__all__ = ["Mirror", "RemoteNode", "error_of", "main"]

#: Age at which the supervisor's last report about the workers counts as stale.
FRESH_S = 2.0


class Mirror(Table):
    """A copy of the supervisor's table of models, updated by its frames.

    Args:
        root: The folder of the models.
        node: Connection to the supervisor, which is told when a version is released.
    """

    def __init__(self, root: Path, node: RemoteNode) -> None:
        """Start with an empty table."""
        super().__init__(root)
        self._node = node

    def apply(self, served: list[Mapping[str, Any]], gone: list[Mapping[str, Any]]) -> None:
        """Apply a change of the table.

        Args:
            served: Versions that are new or changed.
            gone: Versions that are no longer served.
        """
        for one in gone:
            versions = self._table.get(one["name"], {})
            if one["version"] in versions:
                self.retire(versions.pop(one["version"]))
            if not versions:
                self._table.pop(one["name"], None)
        for one in served:
            versions = self._table.setdefault(one["name"], {})
            old = versions.get(one["version"])
            file = ModelFile(one["name"], one["version"], Path(one["path"]), tuple(one["stamp"]))
            if old is None or old.id != one["id"]:
                versions[one["version"]] = Served(file, one["id"])
                if old is not None:
                    self.retire(old)
            current = versions[one["version"]]
            current.file, current.facts, current.reason = file, one["facts"], one["reason"]
            current.is_outdated = one["is_outdated"]

    def free(self, served: Served) -> None:
        """Tell the supervisor that no request here uses a version any more."""
        self._node.write({"op": "released", "id": served.id})


class RemoteNode:
    """The workers and models of the supervisor, reached over a socket.

    Args:
        settings: Settings of the service.
        sock: This process's end of the socket pair with the supervisor.
    """

    def __init__(self, settings: Settings, sock: socket.socket) -> None:
        """Start with an empty table; :meth:`start` connects to the supervisor."""
        self.repository = Mirror(settings.models, self)
        self._sock = sock
        self._channel: wire.Channel | None = None
        self._health, self._heard_s = Health(), float("-inf")
        self._user: Any = None
        self._numbers = count(1)
        self._asked: dict[int, asyncio.Future[wire.Frame]] = {}
        self._loaded = asyncio.Event()
        self._reporting: set[asyncio.Task[None]] = set()

    async def start(self, user: Any) -> None:
        """Connect to the supervisor, and wait until its models are loaded."""
        if self._channel is None:
            self._user = user
            self._channel = wire.Channel(self._sock, self._on_frame, self._on_lost, most_fds=1)
            self.write({"op": "hello"})
        await self._loaded.wait()

    async def stop(self) -> None:
        """Close the connection to the supervisor."""
        if self._channel is not None:
            self._channel.close()

    def health(self) -> Health:
        """Return the state of the workers in the supervisor's last report."""
        is_fresh = self._health.is_fresh and time.monotonic() - self._heard_s <= FRESH_S
        return self._health._replace(is_fresh=is_fresh)

    async def load(self, name: str) -> list[Served]:
        """Make the supervisor load a model; return when all front ends serve it."""
        head, _ = await self._ask("load", name=name)
        served = self.repository.versions(name)
        return [served[version] for version in head["versions"] if version in served]

    async def unload(self, name: str, version: int | None = None) -> None:
        """Make the supervisor unload a model or a version; return when no front end serves it."""
        await self._ask("unload", name=name, version=version)

    async def metrics_text(self, own: Metrics) -> bytes:
        """Return the metrics of all front ends together; the supervisor asks each for its own."""
        _, fields = await self._ask("metrics")
        return bytes(fields["text"])

    def write(self, head: Mapping[str, Any], fields: Mapping[str, wire.Field] | None = None) -> None:
        """Send a frame to the supervisor."""
        if self._channel is not None:
            self._channel.write(head, fields or {})

    async def _ask(self, op: str, **members: Any) -> wire.Frame:
        number = next(self._numbers)
        answer: asyncio.Future[wire.Frame] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self.write({"op": op, "number": number, **members})
        try:
            head, fields = await answer
        finally:
            del self._asked[number]
        if "error" in head:
            raise error_of(head["error"])
        return head, fields

    def _on_frame(self, head: dict[str, Any], fields: dict[str, Any]) -> None:
        match head.pop("op", None):
            case "worker":
                self._user.links.add(socket.socket(fileno=head["fds"][0]))
            case "state":
                news = orjson.loads(fields["news"])
                self.repository.apply(news["served"], news["gone"])
                self._health, self._heard_s = Health(**news["health"]), time.monotonic()
                if self._health.is_loaded:
                    self._loaded.set()
                self.write({"op": "told", "number": head["number"]})
            case "keys":
                self._user.keys.replace(head["api_keys"], head["admin_keys"])
            case "replied":
                answer = self._asked.get(head["number"])
                if answer is not None and not answer.done():
                    answer.set_result((head, fields))
            case "report":
                task = asyncio.get_running_loop().create_task(self._report(head["number"]))
                self._reporting.add(task)  # or it might be collected while it waits
                task.add_done_callback(self._reporting.discard)
            case "give_up":
                self._user.give_up()
            case _:
                raise wire.WireError("expected a frame of the supervisor")

    async def _report(self, number: int) -> None:
        """Send the metrics of this process to the supervisor."""
        self.write({"op": "reported", "number": number}, {"text": await self._user.metrics.text()})

    def _on_lost(self) -> None:
        """Exit when the supervisor is gone, since nothing else restarts workers or front ends."""
        os._exit(1)


def error_of(members: Mapping[str, Any]) -> ServiceError:
    """Return the error that a frame of the supervisor describes."""
    kind = BY_CODE.get(members["code"], InternalError)
    return kind(members["detail"], **members["extra"])


def main(arguments: list[str]) -> int:
    """Receive the settings and the listening socket from the supervisor, and serve until told to stop."""
    from .app import create_app
    from .logs import set_up_logging
    from .server import serve

    end_with_parent()
    sock = socket.socket(fileno=int(arguments[0]))
    receiver, frames = wire.Receiver(sock, most_fds=1), list[wire.Frame]()
    while not frames:
        received = receiver.receive()
        if received is None:
            return 1
        frames += received
    head, _ = frames[0]
    settings = Settings(**head["settings"])
    set_up_logging(settings)
    with socket.socket(fileno=head["fds"][0]) as listening:
        return serve(create_app(settings, RemoteNode(settings, sock)), settings, listening)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
