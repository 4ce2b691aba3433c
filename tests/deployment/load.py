"""Plain clients that ask again and again, and note every status."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import torch

import hessquik
from tests import oracle

TOLERANCE = 1e-10
CLIENTS = 4
#: Answers that every client gets before the change under load, and after.
CALLS = 25
WAIT_S = 60.0
POINTS = [[0.1, 0.2], [0.3, -0.4]]


class Load:
    """Plain clients that request the Hessian at two points repeatedly, without retries.

    Args:
        url: Where they ask.
        are_right: Whether an answer is one that may be given.
    """

    def __init__(self, url: str, are_right: Callable[[np.ndarray], bool]) -> None:
        self.statuses: Counter[str] = Counter()
        self._url, self._are_right = url, are_right
        self._answered = [0] * CLIENTS
        self._goal = 2**62
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask, args=(index,)) for index in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def wait(self, calls: int) -> None:
        """Wait until every client has so many answers more."""
        goal, deadline = [count + calls for count in self._answered], time.monotonic() + WAIT_S
        while not all(count >= wanted for count, wanted in zip(self._answered, goal, strict=True)):
            assert not self._errors, self._errors
            assert time.monotonic() < deadline, self.statuses
            time.sleep(0.02)

    def end(self) -> Counter[str]:
        """Return how often each status came; a 503 counts as such only with Retry-After."""
        self._goal = 0
        for thread in self._threads:
            thread.join(WAIT_S)
        assert not self._errors, self._errors
        return self.statuses

    def _ask(self, index: int) -> None:
        try:
            with httpx.Client(base_url=self._url, timeout=30) as client:
                while self._answered[index] < self._goal:
                    reply = client.post("/v1/models/peaks/hessian", json={"inputs": POINTS, "dtype": "float64"})
                    is_marked = reply.status_code != 503 or "retry-after" in reply.headers
                    self.statuses[f"{reply.status_code}{'' if is_marked else ' unmarked'}"] += 1
                    if reply.status_code == 200:
                        assert self._are_right(np.array(reply.json()["hessian"]))
                        self._answered[index] += 1
        except BaseException as error:
            self._errors.append(error)


def hessian(path: Path) -> np.ndarray:
    """Return the Hessian of a saved network at POINTS, by automatic differentiation."""
    found = oracle.derivatives(hessquik.load(path).double(), torch.tensor(POINTS, dtype=torch.float64))[2]
    return found.numpy()


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max()))
