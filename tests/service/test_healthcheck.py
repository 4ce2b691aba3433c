"""The container's health check tells a ready server from one that is not, is gone, or says nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

from tests.live import ROOT, LiveServer
from tests.unpaused import UnpausedClock

#: What the Dockerfile gives the check.
TIMEOUT_S = 3.0


def check(port: int) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HESSQUIK_HOST": "127.0.0.1", "HESSQUIK_PORT": str(port)}
    return subprocess.run([sys.executable, "-m", "service.healthcheck"], env=environment, check=False).returncode


def test_ready_server_is_healthy(server: LiveServer) -> None:
    assert check(server.port) == 0


def test_server_that_is_not_ready_is_not_healthy() -> None:
    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = threading.Thread(target=refuse)
        refusing.start()
        assert check(listener.getsockname()[1]) == 1
        refusing.join()


def test_server_that_is_gone_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert check(port) == 1


def test_server_that_says_nothing_is_not_healthy() -> None:
    from service.healthcheck import get

    with socket.create_server(("127.0.0.1", 0)) as listener:
        with UnpausedClock() as clock:
            assert get(listener.getsockname(), "/readyz") is None
        assert clock.seconds < TIMEOUT_S
