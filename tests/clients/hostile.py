"""A server that sends arbitrary bytes, and builders of valid and invalid replies."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.numpy

#: Sends a reply over a connection; the connection is closed afterwards.
Script = Callable[[socket.socket], None]

FACTS = {
    "name": "toy",
    "version": "1",
    "versions": ["1"],
    "default_version": "1",
    "state": "ready",
    "d": 2,
    "m": 1,
    "dtype": "float64",
    "metadata": {},
    "limits": {"rows": 1000, "directions": 100, "body_bytes": 1 << 20, "reply_bytes": 1 << 20},
}


class HostileServer:
    """A context manager that listens on a free port and answers with scripts.

    Args:
        post: Script that answers POST requests.
        get: Script that answers GET requests; by default a valid description of the model ``toy``.
        reads_body: Whether the body of a request is read before the answer.

    Attributes:
        requests: The first line of each request.
        sent_bytes: Bytes that were sent by :meth:`flood`.
    """

    def __init__(self, post: Script | bytes, get: Script | bytes | None = None, reads_body: bool = True) -> None:
        self._scripts = {"POST": post, "GET": reply(document(FACTS)) if get is None else get}
        self._reads_body = reads_body
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._listen, daemon=True)]
        self.requests: list[str] = []
        self.sent_bytes = 0
        self.is_closed = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> HostileServer:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_closed.set()
        # Closing alone wakes no thread: it would go on with whatever socket gets the number, of a later server, say.
        socket.create_connection(self._socket.getsockname(), 60).close()
        self._threads[0].join()
        self._socket.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                if self.is_closed.is_set():
                    return connection.close()
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as reader:
            while line := reader.readline():
                self.requests.append(line.decode().strip())
                length = 0
                while (field := reader.readline()) not in (b"\r\n", b""):
                    name, _, text = field.partition(b":")
                    length = int(text) if name.lower() == b"content-length" else length
                if self._reads_body:
                    reader.read(length)
                script = self._scripts[line.split()[0].decode()]
                if isinstance(script, bytes):
                    connection.sendall(script)
                else:
                    script(connection)
                    return

    def flood(self, head: bytes, piece: bytes) -> Script:
        """Return a script that sends a head and then a piece repeatedly without end, and counts the bytes."""

        def script(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.is_closed.is_set():
                connection.sendall(piece)
                self.sent_bytes += len(piece)

        return script

    def drip(self, head: bytes, piece: bytes = b"a", pause_s: float = 0.02) -> Script:
        """Return a script that sends a head and then a piece at intervals without end."""

        def script(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.is_closed.wait(pause_s):
                connection.sendall(piece)

        return script

    def silence(self, connection: socket.socket) -> None:
        """Send nothing."""
        self.is_closed.wait()


def document(value: Any) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value).encode()


def reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """Return a complete HTTP reply."""
    lines = (f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


def tensors(metadata: dict[str, str] | None = None, **arrays: np.ndarray) -> bytes:
    """Return a safetensors body, by default of the model ``toy``."""
    return safetensors.numpy.save(arrays, {"model": "toy", "version": "1"} if metadata is None else metadata)


def header(text: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors body with any header."""
    return struct.pack("<Q", len(text)) + text + data


def facts(**changes: Any) -> bytes:
    """Return a description with changes; ``...`` removes a member."""
    changed = {**FACTS, **changes}
    return document({name: value for name, value in changed.items() if value is not ...})


def nested(depth: int) -> bytes:
    """Return JSON nested ``depth`` levels deep."""
    return b"[" * depth + b"]" * depth
