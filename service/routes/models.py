"""GET /v1/models and /v1/models/{model}; POST …/load and …/unload."""

from __future__ import annotations

from typing import Any

import orjson

from service.core import Core
from service.door import Receive, Reply, Scope, Send, send_reply
from service.quantities import QUANTITIES
from service.repository import Served
from service.routes.derivatives import parse_query

__all__ = ["ListModels", "LoadModel", "ShowModel", "UnloadModel"]


class ListModels:
    """GET /v1/models."""

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every model, in the order of names."""
        scope["hessquik.route"] = "/v1/models"
        repository = self._core.repository
        await _send_json(send, {"models": [summary(self._core, name) for name in repository.names()]})


class ShowModel:
    """GET /v1/models/{model}."""

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One model's version, with its architecture and limits."""
        scope["hessquik.route"] = "/v1/models/{model}"
        name = scope["path_params"]["model"]
        served = self._core.repository.get(name, parse_query(scope).get("version"))
        settings = self._core.settings
        await _send_json(
            send,
            {
                **summary(self._core, name),
                **facts(served),
                "version": str(served.file.version),
                "architecture": served.facts.get("architecture"),
                "quantities": list(QUANTITIES),
                "dtypes": ["float32", "float64"],
                "limits": {
                    "rows": settings.max_rows,
                    "body_bytes": settings.max_body_bytes,
                    "reply_bytes": settings.max_reply_bytes,
                },
            },
        )


class LoadModel:
    """POST /v1/models/{model}/load."""

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the model's files again; what fails leaves the old version serving."""
        scope["hessquik.route"] = "/v1/models/{model}/load"
        name = scope["path_params"]["model"]
        loaded = await self._core.load(name)
        attempts = [{"version": str(one.file.version), "state": one.state, "reason": one.reason} for one in loaded]
        await _send_json(send, {**summary(self._core, name), "loaded": attempts})


class UnloadModel:
    """POST /v1/models/{model}/unload."""

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stop serving a model."""
        scope["hessquik.route"] = "/v1/models/{model}/unload"
        name = scope["path_params"]["model"]
        await self._core.unload(name)
        await _send_json(send, {"name": name, "state": "unloaded"})


def summary(core: Core, name: str) -> dict[str, Any]:
    """What the list says of a model: its default version's facts."""
    versions = core.repository.versions(name)
    default = core.repository.default(name)
    return {
        "name": name,
        "versions": [str(version) for version in sorted(versions)],
        "default_version": str(default.file.version),
        **facts(default),
    }


def facts(served: Served) -> dict[str, Any]:
    """State, sizes and metadata of a version."""
    known = ("d", "m", "dtype", "device", "parameters", "metadata")
    reason = {} if served.reason is None else {"reason": served.reason}
    return {"state": served.state, **reason, **{name: served.facts.get(name) for name in known}}


async def _send_json(send: Send, document: Any) -> None:
    await send_reply(send, Reply(200, b"application/json", [orjson.dumps(document)]))
