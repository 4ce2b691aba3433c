"""LitServe with its own batching.

python -m benchmarks.contenders.litserve MODEL PORT MAX_BATCH_SIZE BATCH_TIMEOUT_S WORKERS
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
from fastapi import Response

from benchmarks.contenders.engine import Array, Engine, decode, encode


class Derivatives(litserve.LitAPI):
    """One worker's engine."""

    def __init__(self, path: str, max_batch_size: int, batch_timeout: float) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout)
        self.path = path

    def setup(self, device: str) -> None:
        self.engine = Engine(self.path)

    def decode_request(self, request) -> Array:  # type: ignore[no-untyped-def] # an annotation changes what comes
        return decode(request)

    def batch(self, inputs: list[Array]) -> list[Array]:
        return inputs

    def predict(self, x: Any) -> Any:
        return self.engine.each(x) if isinstance(x, list) else self.engine(x)

    def unbatch(self, output: list[dict[str, Array]]) -> list[dict[str, Array]]:
        return output

    def encode_response(self, output: dict[str, Array]) -> Response:
        return Response(encode(output), media_type="application/json")


def main(model: str, port: str, max_batch_size: str, batch_timeout_s: str, workers: str) -> None:
    api = Derivatives(model, int(max_batch_size), float(batch_timeout_s))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers), timeout=60)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
