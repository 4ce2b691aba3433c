"""``hessquik serve`` with a fault planted, so that tests are seen to catch it. Only tests run it.

mixed, untiled, oom, spoiled    faults of the workers, see faulty_worker
auditing                        no fault: says which files the front opens
leaky                           the front keeps CHAOS_LEAK_BYTES of every request
counting                        no fault: says at the end how many requests were accepted and answered
hanging                         SIGUSR1 holds the event loop for HANG_S
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from typing import Any

from service import cli, workers
from service.app import Application
from service.http.connection import Connection
from service.http.messages import Reply, Request

HANG_S = 3.0


def audit() -> None:
    """Say every file that is opened, as it is opened."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            os.write(2, f"opened {arguments[0]!r}\n".encode())

    sys.addaudithook(hook)


def leak() -> None:
    """Keep something of every request, however it ends."""
    kept: list[bytearray] = []
    finish = Application.finish
    size = int(os.environ["CHAOS_LEAK_BYTES"])

    def leaky(self: Application, request: Request, reply: Reply) -> None:
        kept.append(bytearray(b"x" * size))
        finish(self, request, reply)

    Application.finish = leaky  # type: ignore[method-assign]


def count() -> None:
    """Count the questions that came whole, and those that were answered."""
    counts = {"accepted": 0, "answered": 0}
    handle, respond = Application.handle, Connection.respond

    def counting_handle(self: Application, request: Request) -> None:
        counts["accepted"] += request.head.method == "POST"
        handle(self, request)

    def counting_respond(self: Connection, request: Request, reply: Reply) -> bool:
        is_sent = respond(self, request, reply)
        counts["answered"] += is_sent and request.head.method == "POST"
        return is_sent

    Application.handle = counting_handle  # type: ignore[method-assign]
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
