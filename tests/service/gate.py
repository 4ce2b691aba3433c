"""A gate at which the worker of :mod:`tests.service.faulty_worker` waits until a test lets it go on.

What happens while a row is computed can then be tested on a machine of any speed, however long a test takes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

#: The variable with the port of the test's end.
VARIABLE = "FAULTY_GATE"
#: Time for a row to come to the worker.
ARRIVAL_S = 60.0


class Gate:
    """The test's end, a socket that workers connect to. Servers that start while it is open know it."""

    def __enter__(self) -> Gate:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(ARRIVAL_S)
        os.environ[VARIABLE] = str(self._listener.getsockname()[1])
        return self

    def __exit__(self, *_: object) -> None:
        del os.environ[VARIABLE]
        self._listener.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the worker to come to the next row that is held, and let it go on at the end."""
        connection, _ = self._listener.accept()
        with connection:
            yield

    def let_go(self, rows: int = 1) -> None:
        """Let the next rows that are held go on, each when the worker has come to it."""
        for _ in range(rows):
            with self.held():
                pass


def wait() -> None:
    """Wait, in the worker, until the test lets it go on, or is gone."""
    with socket.create_connection(("127.0.0.1", int(os.environ[VARIABLE]))) as gate:
        gate.recv(1)
