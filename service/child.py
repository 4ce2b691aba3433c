"""Child processes that run a module of this package, each connected by a socket pair."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .wire import Channel, Field

__all__ = ["Child", "end_with_parent", "environment", "pause_s"]

#: Pause before the first restart of a child; it doubles with each death in a row.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
_PR_SET_PDEATHSIG = 1


class Child:
    """A child process and the socket to it.

    Args:
        module: The module that it runs; its first argument is the descriptor of its end of the socket.
        arguments: The other arguments.
        on_frame: Called with the head and the fields of each frame that it sends.
        on_lost: Called once when it closes its end or sends a malformed frame; not after :meth:`close`.
        blocked: Signals that are blocked in it.
        has_own_group: Whether it gets its own process group, so that signals to the parent's group do not reach it.

    Raises:
        OSError: the process or its socket cannot be created.
    """

    def __init__(
        self,
        module: str,
        arguments: Iterable[str],
        on_frame: Callable[[dict[str, Any], dict[str, Any]], None],
        on_lost: Callable[[], None],
        blocked: Iterable[signal.Signals],
        has_own_group: bool = False,
    ) -> None:
        """Start the process."""
        ours, theirs = socket.socketpair()
        # A signal mask is inherited: the process never sees these signals, from its first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), *arguments],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                cwd="/",  # ours may be deleted while we run
                env=environment(),
                process_group=0 if has_own_group else None,
            )
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.pid = self.process.pid
        self._channel = Channel(ours, on_frame, on_lost)

    def write(self, head: Mapping[str, Any], fields: Mapping[str, Field], fds: tuple[int, ...] = ()) -> None:
        """Send a frame; see :meth:`Channel.write <service.wire.Channel.write>`."""
        self._channel.write(head, fields, fds)

    def connect(self, head: Mapping[str, Any]) -> socket.socket:
        """Send a frame with one end of a new socket pair, and return the other end.

        Raises:
            OSError: the socket pair cannot be created.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self.write(head, {}, (theirs.fileno(),))
        return ours

    def close(self) -> None:
        """Close this end of the socket, which makes the process exit."""
        self._channel.close()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process (SIGKILL), unless it has ended."""
        self.process.kill()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the process to end, and return its exit status.

        Raises:
            subprocess.TimeoutExpired: the process has not ended in time.
        """
        return self.process.wait(timeout_s)


def pause_s(deaths: int) -> float:
    """Return the pause before a restart, given the number of deaths in a row.

    Examples:
        >>> [pause_s(deaths) for deaths in (0, 1, 2, 100)]
        [0.05, 0.05, 0.1, 5.0]
    """
    return min(FIRST_PAUSE_S * (1 << min(max(0, deaths - 1), 16)), LONGEST_PAUSE_S)


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends, however that comes about."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Return the environment of a child process: without settings and keys, and with this package found first."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(part)]
    ours = {name: value for name, value in os.environ.items() if not name.upper().startswith("HESSQUIK_")}
    return {**ours, "PYTHONPATH": os.pathsep.join([root, *path])}
