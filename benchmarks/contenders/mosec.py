"""Mosec with its own batching; it reads its own flags for the port.

MODEL=… MAX_BATCH_SIZE=… MAX_WAIT_MS=… WORKERS=… python -m benchmarks.contenders.mosec --port PORT
"""

from __future__ import annotations

import os
from typing import Any

import mosec
import orjson

from benchmarks.contenders.engine import Array, Engine, decode, encode


class Derivatives(mosec.Worker):
    """One worker's engine."""

    def __init__(self) -> None:
        self.engine = Engine(os.environ["MODEL"])

    def deserialize(self, data: bytes) -> Array:
        return decode(orjson.loads(data))

    def forward(self, data: Any) -> Any:
        return self.engine.each(data) if isinstance(data, list) else self.engine(data)

    def serialize(self, data: dict[str, Array]) -> bytes:
        return encode(data)


def main() -> None:
    server = mosec.Server()
    server.append_worker(
        Derivatives,
        num=int(os.environ["WORKERS"]),
        max_batch_size=int(os.environ["MAX_BATCH_SIZE"]),
        max_wait_time=int(os.environ["MAX_WAIT_MS"]),
    )
    server.run()


if __name__ == "__main__":
    main()
