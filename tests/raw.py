"""HTTP over a plain blocking socket, to send requests that client libraries cannot, and to see the raw replies."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What no reply may hold: tracebacks, addresses, places on the machine, names of our modules.
LEAKS = re.compile(rb"Traceback|0x[0-9a-f]{6,}|site-packages|/tmp/|/root|/usr/|/home|\.py\b|shm|asyncio|orjson|numpy")


@dataclass(frozen=True)
class Reply:
    """One response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """Return a well-formed request with ``Connection: close``; header names are given with underscores."""
    fields = {"Host": "x", "Connection": "close", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def post(path: str, body: bytes, **headers: str) -> bytes:
    """Return a well-formed JSON request."""
    return request("POST", path, body, **{"Content_Type": "application/json", **headers})


def exchange(port: int, data: bytes, timeout_s: float = 30.0) -> bytes:
    """Send bytes on a new connection, and return all bytes received until it is closed or idle."""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
        with contextlib.suppress(OSError):  # refused before all was sent; the answer may be there nevertheless
            connection.sendall(data)
        return receive_all(connection)


def send_over(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: Mapping[str, bytes | str]
) -> Reply:
    """Send a request over a connection that stays open, and return the reply."""
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def receive_all(connection: socket.socket) -> bytes:
    """Return all bytes received until the connection is closed, reset or idle."""
    pieces = []
    try:
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    except OSError:
        pass
    return b"".join(pieces)


def replies(data: bytes) -> list[Reply]:
    """Parse the responses in received bytes; each must be complete."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, f"expected a whole head, got {head[:80]!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3})( .*)?", first)
        assert match is not None, first
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", "0"))
        body, data = data[:size], data[size:]
        assert len(body) == size
        found.append(Reply(int(match[1]), headers, body))
    return found


def ask(port: int, data: bytes, timeout_s: float = 30.0) -> Reply:
    """Send one request and return its one response."""
    (reply,) = replies(exchange(port, data, timeout_s))
    return reply


def check_error(reply: Reply) -> None:
    """Assert that an error is documented, has the problem-details format, and discloses neither machine nor input.

    Raises:
        AssertionError: one of these does not hold.
    """
    assert LEAKS.search(reply.body) is None, reply
    assert len(reply.body) <= 1024, reply
    problem = reply.json()
    if reply.headers["content-type"] == "application/json":  # UM-Bridge and Open Inference Protocol; Tesseract
        assert list(problem) in (["error"], ["detail"]), problem
        return
    assert reply.headers["content-type"] == "application/problem+json", reply
    assert {"type", "title", "status", "detail", "code", "request_id"} <= set(problem), problem
    assert problem["status"] == reply.status, problem
    assert problem["code"] in DECLARED[reply.status], problem


DECLARED = {
    400: {"malformed_body"},
    401: {"unauthorized"},
    403: {"forbidden"},
    404: {"model_not_found", "version_not_found", "not_found"},
    405: {"method_not_allowed"},
    406: {"not_acceptable"},
    413: {"body_too_large", "reply_too_large"},
    415: {"unsupported_media_type"},
    422: {"invalid_input"},
    503: {"overloaded", "not_ready", "worker_lost"},
    504: {"deadline_exceeded"},
}
