"""HAProxy with the shipped configuration, before the servers of a test."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

from tests.live import ROOT, free_ports, wait_until

CONFIG = ROOT / "deploy" / "haproxy" / "haproxy.cfg"
HOST = "127.0.0.1"
#: HAProxy does not start where it may not have two descriptors for each connection of the configuration.
DESCRIPTORS = 2 * int(CONFIG.read_text().partition("maxconn ")[2].split()[0]) + 16
needs_haproxy = [
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs Debian's package haproxy"),
    pytest.mark.skipif(
        resource.getrlimit(resource.RLIMIT_NOFILE)[1] < DESCRIPTORS,
        reason=f"HAProxy needs {DESCRIPTORS} descriptors: raise the hard limit, ulimit -Hn",
    ),
]


class Balancer:
    """HAProxy before two servers.

    Args:
        first: Address and port of a server.
        second: Of the other one.
        log: File for what it says.
    """

    def __init__(self, first: str, second: str, log: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://{HOST}:{port}"
        self._log = log.open("w")
        environment = os.environ | {"LISTEN": f"{HOST}:{port}", "NODE1": first, "NODE2": second}
        self._process = subprocess.Popen(
            ["haproxy", "-db", "-f", CONFIG], env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        try:
            wait_until(lambda: self._is_listening(port))
            assert self._process.poll() is None, log.read_text()
        except AssertionError:
            self.close()
            raise

    def _is_listening(self, port: int) -> bool:
        """Return whether it takes connections, or has ended."""
        with socket.socket() as probe:
            return self._process.poll() is not None or probe.connect_ex((HOST, port)) == 0

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def close(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Balancer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
