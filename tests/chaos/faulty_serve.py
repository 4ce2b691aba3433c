"""``hessquik serve`` with a planted fault, which tests must detect. Only tests run it.

mixed, untiled, oom, spoiled    faults of the workers, see faulty_worker
auditing                        no fault: prints the files that the front end opens
leaky                           the front end keeps CHAOS_LEAK_BYTES of every request
counting                        no fault: prints at exit how many requests were accepted and answered
hanging                         SIGUSR1 blocks the event loop for HANG_S
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from typing import Any

from service import cli, workers
from service.front import Front
from service.http.connection import Connection
from service.http.messages import Reply, Request

HANG_S = 3.0


def audit() -> None:
    """Print the name of every file to standard error when it is opened."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            os.write(2, f"opened {arguments[0]!r}\n".encode())

    sys.addaudithook(hook)


def leak() -> None:
    """Plant a leak: keep some bytes for every request."""
    kept: list[bytearray] = []
    finish = Front.finish
    size = int(os.environ["CHAOS_LEAK_BYTES"])

    def leaky(self: Front, request: Request, reply: Reply) -> None:
        kept.append(bytearray(b"x" * size))
        finish(self, request, reply)

    Front.finish = leaky  # type: ignore[method-assign]


def count() -> None:
    """Count the POST requests that arrive completely and those that are answered, and print both at exit."""
    counts = {"accepted": 0, "answered": 0}
    handle, respond = Front.handle, Connection.respond

    def counting_handle(self: Front, request: Request) -> None:
        counts["accepted"] += request.head.method == "POST"
        handle(self, request)

    def counting_respond(self: Connection, request: Request, reply: Reply) -> bool:
        is_sent = respond(self, request, reply)
        counts["answered"] += is_sent and request.head.method == "POST"
        return is_sent

    Front.handle = counting_handle  # type: ignore[method-assign]
    Connection.respond = counting_respond  # type: ignore[method-assign]
    atexit.register(lambda: print(f"accepted {counts['accepted']}, answered {counts['answered']}", file=sys.stderr))  # noqa: T201


def main(fault: str) -> None:
    """Plant the fault and serve."""
    match fault:
        case "auditing":
            audit()
        case "leaky":
            leak()
        case "counting":
            count()
        case "hanging":
            signal.signal(signal.SIGUSR1, lambda *_: time.sleep(HANG_S))
        case _:
            os.environ["CHAOS_FAULT"] = fault
            workers.WORKER_MODULE = "tests.chaos.faulty_worker"
    cli.main()


if __name__ == "__main__":
    main(sys.argv.pop(1))
