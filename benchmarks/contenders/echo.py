"""A lower bound for the contenders: ASGI on uvicorn, httptools and uvloop with one fixed reply and no computation.

python -m benchmarks.contenders.echo MODEL PORT
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import uvicorn

from benchmarks.contenders.engine import Engine, encode


def main(model: str, port: str) -> None:
    engine = Engine(model)
    body = encode(engine(np.random.default_rng(0).random((1, engine.d))))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        while (await receive()).get("more_body", False):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    uvicorn.run(
        app, port=int(port), loop="uvloop", http="httptools", lifespan="off", access_log=False, log_level="warning"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
