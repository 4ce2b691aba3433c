"""A clock that stops while the machine does not let this process run."""

from __future__ import annotations

import threading
import time

#: Interval of the readings, and the most that the clock advances from one to the next.
READ_S, MOST_S = 0.005, 0.05


class UnpausedClock:
    """A context manager that measures how long its thread would have taken on a machine that is never paused.

    What a client does within its time limit is compared with this clock: a processor that a noisy neighbour takes for
    a second is not the client's fault.

    Examples:
        >>> with UnpausedClock() as clock:
        ...     time.sleep(0.02)
        >>> clock.seconds <= 1.0
        True
    """

    def __enter__(self) -> UnpausedClock:
        self.seconds, self._read_at = 0.0, time.monotonic()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._read()

    def _run(self) -> None:
        while not self._is_over.wait(READ_S):
            self._read()

    def _read(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._read_at, MOST_S)
        self._read_at = now
