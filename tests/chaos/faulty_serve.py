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
from service.door import Door, Message, Receive, Reply, Scope, Send
from service.exchange import Exchange

HANG_S = 3.0


def audit() -> None:
    """Say every file that is opened, as it is opened."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            os.write(2, f"opened {arguments[0]!r}\n".encode())

    sys.addaudithook(hook)


def leak() -> None:
    """Keep something of every request, whichever way it goes and however it ends."""
    kept: list[bytearray] = []
    count = Door.count
    size = int(os.environ["CHAOS_LEAK_BYTES"])

    def leaky(self: Door, scope: Scope, status: int, began: float) -> None:
        kept.append(bytearray(b"x" * size))
        count(self, scope, status, began)

    Door.count = leaky  # type: ignore[method-assign]


def count() -> None:
    """Count the questions that came whole, on their short way and on the long one, and those that were answered."""
    counts = {"accepted": 0, "answered": 0}
    call, begin, reply = Door.__call__, Exchange.begin, Exchange._reply

    async def counting(self: Door, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                counts["answered"] += 1

        is_counted = scope["type"] == "http" and scope["method"] == "POST"
        counts["accepted"] += is_counted
        await call(self, scope, receive, counting_send if is_counted else send)

    def counting_begin(self: Exchange) -> None:
        counts["accepted"] += 1
        begin(self)

    def counting_reply(self: Exchange, answer: Reply) -> None:
        counts["answered"] += not (self.disconnected or self._connection.transport.is_closing())
        reply(self, answer)

    Door.__call__ = counting  # type: ignore[method-assign]
    Exchange.begin = counting_begin  # type: ignore[method-assign]
    Exchange._reply = counting_reply  # type: ignore[method-assign]
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
