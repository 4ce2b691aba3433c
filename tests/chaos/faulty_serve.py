"""``hessquik serve`` with a fault planted, so that tests are seen to catch it. Only tests run it.

mixed, untiled, oom, spoiled    faults of the workers, see faulty_worker
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

from service import cli, pool
from service.core import Core
from service.door import Door, Message, Receive, Scope, Send

HANG_S = 3.0


def leak() -> None:
    """Keep something of every request."""
    kept: list[bytearray] = []
    answer = Core.answer
    size = int(os.environ["CHAOS_LEAK_BYTES"])

    async def leaky(self: Core, *arguments: Any, **options: Any) -> Any:
        kept.append(bytearray(b"x" * size))
        return await answer(self, *arguments, **options)

    Core.answer = leaky  # type: ignore[method-assign]


def count() -> None:
    """Count what comes in and what goes out whole."""
    counts = {"accepted": 0, "answered": 0}
    call = Door.__call__

    async def counting(self: Door, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                counts["answered"] += 1

        is_counted = scope["type"] == "http" and scope["method"] == "POST"
        counts["accepted"] += is_counted
        await call(self, scope, receive, counting_send if is_counted else send)

    Door.__call__ = counting  # type: ignore[method-assign]
    atexit.register(lambda: print(f"accepted {counts['accepted']}, answered {counts['answered']}", file=sys.stderr))  # noqa: T201


def main(fault: str) -> None:
    """Plant the fault and serve."""
    match fault:
        case "leaky":
            leak()
        case "counting":
            count()
        case "hanging":
            signal.signal(signal.SIGUSR1, lambda *_: time.sleep(HANG_S))
        case _:
            os.environ["CHAOS_FAULT"] = fault
            pool.WORKER_MODULE = "tests.chaos.faulty_worker"
    cli.main()


if __name__ == "__main__":
    main(sys.argv.pop(1))
