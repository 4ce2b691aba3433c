"""The Open Inference Protocol v2: what Triton's and KServe's clients speak, with Triton's extensions.

Specification: https://github.com/kserve/open-inference-protocol; extensions: Triton's ``docs/protocol``. Bodies of
inference are :mod:`service.open_inference`'s.
"""

from __future__ import annotations

import time
from importlib.metadata import version as installed_version
from typing import Any

import orjson
from starlette.routing import Route

from service import open_inference
from service.codecs import Shape, load_json
from service.core import Core
from service.door import Dialect, Receive, Reply, Scope, Send, header, read_body, send_reply
from service.errors import InvalidInput, MalformedBody, ServiceError
from service.repository import Served, find_files
from service.statistics import Total

__all__ = ["DIALECT", "routes"]

JSON = b"application/json"
PLATFORM = "hessquik"
EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics", "parameters"]
_TYPES = {"float32": "TYPE_FP32", "float64": "TYPE_FP64"}
_STATES = {"ready": "READY", "loading": "LOADING", "failed": "UNAVAILABLE"}


def routes(core: Core) -> list[Route]:
    """The protocol's paths."""
    gets: list[tuple[str, type[Endpoint]]] = [
        ("/v2", ServerMetadata),
        ("/v2/health/live", ServerLive),
        ("/v2/health/ready", ServerReady),
        ("/v2/models/stats", AllStatistics),
    ]
    posts: list[tuple[str, type[Endpoint]]] = [
        ("/v2/repository/index", RepositoryIndex),
        ("/v2/repository/models/{model}/load", Load),
        ("/v2/repository/models/{model}/unload", Unload),
    ]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        gets += [
            (model, ModelMetadata),
            (f"{model}/ready", ModelReady),
            (f"{model}/config", ModelConfiguration),
            (f"{model}/stats", Statistics),
        ]
        posts.append((f"{model}/infer", Infer))
    return [
        *(Route(path, endpoint(core, path), methods=["GET"]) for path, endpoint in gets),
        *(Route(path, endpoint(core, path), methods=["POST"]) for path, endpoint in posts),
    ]


def _owns(path: str) -> bool:
    return path == "/v2" or path.startswith("/v2/")


def _write_error(error: ServiceError, request_id: str) -> tuple[int, bytes]:
    """An error as one string; what does not fit the model is 400 here."""
    return 400 if error.status == 422 else error.status, orjson.dumps({"error": error.detail})


DIALECT = Dialect(JSON, _owns, _write_error)


class Endpoint:
    """One path of the protocol, as an ASGI application.

    Args:
        core: The service.
        path: The path with its placeholders.
    """

    def __init__(self, core: Core, path: str) -> None:
        """Keep them."""
        self.core = core
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reply in JSON with what :meth:`answer` makes."""
        scope["hessquik.route"] = self._path
        status, document = await self.answer(scope, receive)
        await send_reply(send, Reply(status, JSON, [orjson.dumps(document)]))

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Status and document of the reply."""
        raise NotImplementedError

    def named(self, scope: Scope) -> Served:
        """The version of the model that the path names, ready or not."""
        path: dict[str, str] = scope["path_params"]
        return self.core.repository.get(path["model"], path.get("version"))

    def ready(self, scope: Scope) -> Served:
        """The version of the model that the path names."""
        path: dict[str, str] = scope["path_params"]
        return self.core.repository.ready(path["model"], path.get("version"))

    async def read_object(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The body's JSON object; an empty body is an empty one.

        Raises:
            MalformedBody: it is something else.
        """
        body = await read_body(scope, receive, self.core.settings.max_body_bytes)
        document = load_json(body) if body else {}
        if not isinstance(document, dict):
            raise MalformedBody("expected a JSON object, got something else")
        return document


class ServerLive(Endpoint):
    """GET /v2/health/live."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Always."""
        return 200, {"live": True}


class ServerReady(Endpoint):
    """GET /v2/health/ready."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """As /readyz."""
        is_ready = not self.core.why_not_ready()
        return 200 if is_ready else 503, {"ready": is_ready}


class ServerMetadata(Endpoint):
    """GET /v2."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Name, version, and those extensions that are served."""
        name = "hessquik-service"
        return 200, {"name": name, "version": installed_version(name), "extensions": EXTENSIONS}


class ModelMetadata(Endpoint):
    """GET /v2/models/{model}."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Tensors and their shapes."""
        served = self.ready(scope)
        name, shape = served.file.name, (served.d, served.m, served.facts["dtype"])
        return 200, {
            "name": name,
            "versions": [str(version) for version in sorted(self.core.repository.versions(name))],
            "platform": PLATFORM,
            "inputs": open_inference.describe_inputs(*shape),
            "outputs": open_inference.describe_outputs(*shape),
        }


class ModelReady(Endpoint):
    """GET /v2/models/{model}/ready."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Whether it can be evaluated."""
        served = self.named(scope)
        is_ready = served.state == "ready"
        return 200 if is_ready else 503, {"name": served.file.name, "ready": is_ready}


class ModelConfiguration(Endpoint):
    """GET /v2/models/{model}/config, as Triton's load generator reads it: shapes there are without the rows."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """The model as Triton's configuration would have it."""
        served = self.ready(scope)
        dtype = served.facts["dtype"]
        shape = (served.d, served.m, dtype)
        inputs = [
            {"name": tensor["name"], "data_type": _TYPES[dtype], "dims": tensor["shape"][1:]}
            | ({} if tensor["name"] == "inputs" else {"optional": True})
            for tensor in open_inference.describe_inputs(*shape)
        ]
        outputs = [
            {"name": tensor["name"], "data_type": _TYPES[dtype], "dims": tensor["shape"][1:]}
            for tensor in open_inference.describe_outputs(*shape)
        ]
        return 200, {
            "name": served.file.name,
            "platform": PLATFORM,
            "backend": PLATFORM,
            "max_batch_size": self.core.settings.max_rows,
            "input": inputs,
            "output": outputs,
            "dynamic_batching": {},
        }


class Statistics(Endpoint):
    """GET /v2/models/{model}/stats."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Of one version, or of all of a model."""
        served = self.named(scope)
        is_one = "version" in scope["path_params"]
        all_of_them = self.core.repository.versions(served.file.name).values()
        return 200, {"model_stats": [_statistics(one) for one in ([served] if is_one else all_of_them)]}


class AllStatistics(Endpoint):
    """GET /v2/models/stats."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Of every version of every model."""
        repository = self.core.repository
        every = [served for name in repository.names() for served in repository.versions(name).values()]
        return 200, {"model_stats": [_statistics(served) for served in every]}


class RepositoryIndex(Endpoint):
    """POST /v2/repository/index."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Every version in the folder and in service; only ready ones if the body says so."""
        document = await self.read_object(scope, receive)
        repository = self.core.repository
        index = {(file.name, file.version): ("UNAVAILABLE", "unloaded") for file in find_files(repository.root)}
        for name in repository.names():
            for version, served in repository.versions(name).items():
                index[name, version] = (_STATES[served.state], served.reason or "")
        return 200, [
            {"name": name, "version": str(version), "state": state, "reason": reason}
            for (name, version), (state, reason) in sorted(index.items())
            if state == "READY" or document.get("ready") is not True
        ]


class Load(Endpoint):
    """POST /v2/repository/models/{model}/load."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Read the model's files again.

        Raises:
            InvalidInput: the body brings a model of its own, or a file is refused.
        """
        document = await self.read_object(scope, receive)
        if document.get("parameters"):
            raise InvalidInput.of("parameters", "none, as models come from the service's own folder", "some")
        for served in await self.core.load(scope["path_params"]["model"]):
            if served.reason is not None:
                raise InvalidInput(f"version {served.file.version} is refused: {served.reason}")
        return 200, {}


class Unload(Endpoint):
    """POST /v2/repository/models/{model}/unload."""

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Stop serving the model; nothing depends on another, so that parameters have no meaning."""
        await self.read_object(scope, receive)
        await self.core.unload(scope["path_params"]["model"])
        return 200, {}


class Infer(Endpoint):
    """POST /v2/models/{model}/infer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, check, compute, reply, in JSON or with binary tensors."""
        scope["hessquik.route"] = self._path
        deadline_s = self.core.deadline_s(header(scope, b"x-deadline-ms"))
        with self.core.repository.holding(self.ready(scope)) as served:
            body = await read_body(scope, receive, self.core.settings.max_body_bytes)
            shape = Shape(served.d, served.m, served.facts["dtype"], self.core.settings.max_rows)
            json_bytes = header(scope, b"inference-header-content-length").decode("latin-1")
            inference = open_inference.parse(body, json_bytes, shape)
            if inference.timeout_us:
                deadline_s = min(deadline_s, time.monotonic() + inference.timeout_us / 1e6)
            answers = await self.core.arrays(served, inference.question, deadline_s, scope)
        reply, headers = open_inference.encode(served.file.name, str(served.file.version), inference, answers)
        await send_reply(send, Reply(200, headers[0][1], [reply], headers[1:]))


def _statistics(served: Served) -> dict[str, Any]:
    """A version's counts in the extension's words."""
    counts, unused = served.statistics, Total()
    totals = {
        "success": counts.success,
        "fail": counts.fail,
        "queue": counts.queue,
        "compute_input": unused,
        "compute_infer": counts.compute,
        "compute_output": unused,
        "cache_hit": unused,
        "cache_miss": unused,
    }
    return {
        "name": served.file.name,
        "version": str(served.file.version),
        "last_inference": counts.last_answer_ms,
        "inference_count": counts.rows,
        "execution_count": counts.batches,
        "inference_stats": {
            name: {"count": total.count, "ns": round(total.seconds * 1e9)} for name, total in totals.items()
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }
