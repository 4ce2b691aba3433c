"""Plain FastAPI: one route, the engine called in its thread pool, one request at a time.

python -m benchmarks.contenders.fastapi MODEL PORT
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import Body, FastAPI, Response

from benchmarks.contenders.engine import Engine, decode, encode


def main(model: str, port: str) -> None:
    engine = Engine(model)
    app = FastAPI()

    # Not a coroutine function: FastAPI runs it in its thread pool.
    @app.post("/evaluate")
    def evaluate(document: dict[str, Any] = Body()) -> Response:  # noqa: B008 - the framework's own form
        return Response(encode(engine(decode(document))), media_type="application/json")

    uvicorn.run(app, port=int(port), loop="uvloop", http="httptools", access_log=False, log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
