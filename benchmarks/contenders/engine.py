"""The engine as every contender gets it, so that only serving differs: bytes → points → derivatives → bytes.

``python -m benchmarks.contenders.engine MODEL ROWS SECONDS`` measures it alone: Hessians of ROWS points at a time.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

import hessquik

__all__ = ["QUANTITIES", "Engine", "decode", "encode"]

QUANTITIES = ("value", "gradient", "hessian")
Array = NDArray[np.float64]


class Engine:
    """A saved network on one thread, warm.

    Args:
        path: The saved network, of float64.
    """

    def __init__(self, path: str) -> None:
        """Load it and run every tile once."""
        torch.set_num_threads(1)
        self._evaluate = hessquik.Evaluator(hessquik.load(path))
        self.d = self._evaluate.d
        for rows in self._evaluate.tile_rows:
            self(np.zeros((rows, self.d)))

    def __call__(self, points: Array) -> dict[str, Array]:
        """Return value (n, m), gradient (n, d, m) and Hessian (n, d, d, m) at the points (n, d)."""
        found = self._evaluate(torch.from_numpy(points), QUANTITIES)
        return {name: getattr(found, name).numpy() for name in QUANTITIES}

    def each(self, batch: list[Array]) -> list[dict[str, Array]]:
        """Return the answers to several requests of one point each, computed together."""
        found = self(np.concatenate(batch))
        return [{name: array[i : i + 1] for name, array in found.items()} for i in range(len(batch))]


def decode(document: dict[str, Any]) -> Array:
    """Return the points of a request."""
    return np.asarray(document["inputs"], dtype=np.float64)


def encode(answers: dict[str, Array]) -> bytes:
    """Return a reply as JSON, by the fastest encoder."""
    flat = {name: np.ascontiguousarray(array) for name, array in answers.items()}
    return orjson.dumps({"model": "bench", "version": "1", **flat}, option=orjson.OPT_SERIALIZE_NUMPY)


def main(model: str, rows: str, seconds: str) -> None:
    torch.set_num_threads(1)
    evaluate = hessquik.Evaluator(hessquik.load(model))
    random = np.random.default_rng(0)
    batches = [torch.from_numpy(random.random((int(rows), evaluate.d))) for _ in range(8)]
    evaluate(batches[0], ("hessian",))
    calls, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < float(seconds):
        evaluate(batches[calls % len(batches)], ("hessian",))
        calls += 1
    print(calls * int(rows) / elapsed)


if __name__ == "__main__":
    main(*sys.argv[1:])
