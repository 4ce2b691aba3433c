"""A worker that fails on demand: a point's first coordinate says how. Only tests run it."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import numpy as np

from service import wire, worker
from tests.service import gate

KILLED, HANGS, RAISES, SLOW, SHORT, DIFFERS, HELD = 1e6, 2e6, 3e6, 4e6, 5e6, 6e6, 7e6
SLOW_S = 0.5


class FaultyWorker(worker.Worker):
    """Triggers the fault that the points encode, and evaluates all others as the real worker does."""

    def _evaluate(self, head: dict[str, Any], fields: dict[str, Any], places: Any = None) -> wire.Frame:
        asked = set(fields["inputs"][:, 0].tolist())
        if KILLED in asked:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANGS in asked:
            time.sleep(3600)
        if RAISES in asked:
            return {"op": "done", "error": "ValueError"}, {}
        if SLOW in asked:
            time.sleep(SLOW_S)
        if HELD in asked:
            gate.wait()
        reply, answers = super()._evaluate(head, fields, places)
        if SHORT in asked:
            answers = {name: array[:-1] for name, array in answers.items()}
        return reply, answers

    def _check(self, head: dict[str, Any], fields: dict[str, Any], results: dict[str, wire.Array]) -> None:
        if DIFFERS in set(fields["inputs"][:, 0].tolist()):
            results = {name: np.nextafter(array, np.inf) for name, array in results.items()}
        super()._check(head, fields, results)


if __name__ == "__main__":
    worker.Worker = FaultyWorker  # type: ignore[misc]
    worker.main(sys.argv[1:])
