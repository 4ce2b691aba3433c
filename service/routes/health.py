"""GET /livez, /readyz and /metrics."""

from __future__ import annotations

import orjson

from service.core import Core
from service.door import Receive, Reply, Scope, Send, send_reply

__all__ = ["Live", "MetricsText", "Ready"]


class Live:
    """GET /livez: the event loop answers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Always 200."""
        scope["hessquik.route"] = "/livez"
        await send_reply(send, Reply(200, b"application/json", [b'{"live":true}']))


class Ready:
    """GET /readyz: a worker answered a real evaluation lately, and a model is ready."""

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200, or 503 with the reasons."""
        scope["hessquik.route"] = "/readyz"
        reasons = self._core.why_not_ready()
        body = orjson.dumps({"ready": not reasons, "reasons": reasons})
        if reasons:
            await send_reply(send, Reply(503, b"application/json", [body], [(b"retry-after", b"1")]))
        else:
            await send_reply(send, Reply(200, b"application/json", [body]))


class MetricsText:
    """GET /metrics."""

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The metrics in Prometheus' text format."""
        scope["hessquik.route"] = "/metrics"
        text = await self._core.metrics_text()
        await send_reply(send, Reply(200, b"text/plain; version=0.0.4; charset=utf-8", [text]))
