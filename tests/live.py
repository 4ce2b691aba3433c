"""A real server: its own process, real sockets, real workers."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

ROOT = Path(__file__).parent.parent
START_S = 120.0
#: Numbers of ports to try; other processes of the same run begin elsewhere.
_PORTS = itertools.count(101 * os.getpid())


def wait_until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    """Wait until a condition holds, but not longer than a limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition does not hold in time"
        time.sleep(0.02)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return different ports that are free and stay so: the system gives connections of others higher ones."""
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + next(_PORTS) % 12_000
        with contextlib.suppress(OSError), socket.create_server((host, port)):
            found.append(port)
    return found


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("worker") for part in process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


class LiveServer:
    """``python -m service serve`` on a free port.

    Args:
        models: The folder to serve.
        workers: Worker processes.
        settings: Further settings, by their names without the prefix.
        command: Another command that starts it, with the same arguments.
        stdout: File for its standard output.
        packages: The folder from which it imports the packages.
        stderr: File for its log, which is read if none is given.
        port: Port to listen on; a free one by default.
    """

    def __init__(
        self,
        models: Path,
        workers: int = 1,
        settings: Mapping[str, object] | None = None,
        command: tuple[str, ...] = ("-m", "service"),
        stdout: IO[str] | int | None = None,
        packages: Path = ROOT,
        stderr: int = subprocess.PIPE,
        port: int = 0,
    ) -> None:
        environment = {f"HESSQUIK_{name.upper()}": str(value) for name, value in (settings or {}).items()}
        path = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
        arguments = ["serve", str(models), "--port", str(port), "--device", "cpu", "--workers", str(workers)]
        self.models = models
        self.process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self.log: list[str] = []
        self.started_s = 0.0
        self._began = time.monotonic()
        self._listening = threading.Event()
        self.port = port
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stderr or contextlib.nullcontext([]) as lines:
            for line in lines:
                self.log.append(line.rstrip())
                if (match := re.search(r"running on http://[^ ]*:(\d+)", line)) is not None:
                    self.port = int(match[1])
                    self._listening.set()
        self._listening.set()

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_listening(self) -> LiveServer:
        """Wait until it has a port, and return the server."""
        self._listening.wait(START_S)
        assert self.port, "\n".join(self.log)
        return self

    def wait_for_line(self, text: str) -> None:
        """Wait until a line of its log contains a text."""
        deadline = time.monotonic() + START_S
        while not any(text in line for line in self.log):
            assert time.monotonic() < deadline, "\n".join(self.log)
            time.sleep(0.05)

    def wait_until_ready(self) -> LiveServer:
        """Wait until /readyz answers with 200, and return the server."""
        self.wait_until_listening()
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.is_ready():
                self.started_s = self.started_s or time.monotonic() - self._began
                return self
            time.sleep(0.05)
        raise AssertionError("not ready in time\n" + "\n".join(self.log))

    def is_ready(self) -> bool:
        """Return whether /readyz answers with 200."""
        try:
            return self._get("/readyz", {}, timeout_s=5)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _get(self, path: str, headers: dict[str, str], timeout_s: float = 60.0) -> tuple[int, str]:
        """Return status and text, by a plain connection, which takes a tenth of the time of httpx."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

    def is_listening(self) -> bool:
        """Return whether it takes connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), START_S).close()
        except ConnectionRefusedError:
            return False
        return True

    def workers(self) -> list[psutil.Process]:
        """Return its worker processes."""
        return [child for child in psutil.Process(self.process.pid).children() if _is_worker(child)]

    def metric(self, sample: str, key: str = "") -> float:
        """Return the value of a sample in the metrics, by its name with labels; 0 if it is missing."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        status, text = self._get("/metrics", headers)
        assert status == 200, text
        for line in text.splitlines():
            if line.startswith(sample + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def stop(self, timeout_s: float = 60.0) -> int:
        """Send SIGTERM, as an operator does, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self._reader.join(10)

    def __enter__(self) -> LiveServer:
        return self.wait_until_ready()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
