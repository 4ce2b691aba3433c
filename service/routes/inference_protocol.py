"""Routes of the Open Inference Protocol v2, which clients of Triton and KServe speak, with Triton's extensions.

Specification: https://github.com/kserve/open-inference-protocol; extensions: Triton's ``docs/protocol``.
:mod:`service.open_inference` parses and writes the bodies of inference requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version as installed_version
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path

from hessquik_client.errors import InvalidInput, ServiceError

from .. import open_inference, schemas
from ..front import Call, Dialect
from ..http.messages import JSON, Cancel, Reply
from ..repository import Served, scan
from ..routes.operation import Deadline, Direct, ModelName, faults
from ..scheduler import Answers

__all__ = ["DIALECT", "router"]

PLATFORM = "hessquik"
EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics", "parameters"]
_TYPES = {"float32": "TYPE_FP32", "float64": "TYPE_FP64"}
_STATES = {"ready": "READY", "loading": "LOADING", "failed": "UNAVAILABLE"}


def _write_error(error: ServiceError, request_id: str) -> tuple[int, bytes]:
    """Write an error as an object with one string; status 422 becomes 400, as the protocol has it."""
    return 400 if error.status == 422 else error.status, orjson.dumps({"error": error.detail})


DIALECT = Dialect(JSON, lambda path: path == "/v2" or path.startswith("/v2/"), _write_error)


def _named(call: Call) -> Served:
    """Return the version of the model that the path names, ready or not."""
    return call.core.repository.get(call.target.model, call.target.version)


def _ready(call: Call) -> Served:
    """Return the version of the model that the path names; it must be ready."""
    return call.core.repository.ready(call.target.model, call.target.version)


def server_live(call: Call) -> Reply:
    """Return 200 while the server answers."""
    return Reply.of({"live": True})


def server_ready(call: Call) -> Reply:
    """Return the server's readiness, as /readyz does."""
    is_ready = not call.core.why_not_ready()
    return Reply.of({"ready": is_ready}, 200 if is_ready else 503)


def server_metadata(call: Call) -> Reply:
    """Return name, version, and the supported extensions of the server."""
    name = "hessquik-service"
    return Reply.of({"name": name, "version": installed_version(name), "extensions": EXTENSIONS})


def model_metadata(call: Call) -> Reply:
    """Return the tensors of a model and their shapes."""
    served = _ready(call)
    name, shape = served.file.name, (served.d, served.m, served.facts["dtype"])
    return Reply.of(
        {
            "name": name,
            "versions": [str(version) for version in sorted(call.core.repository.versions(name))],
            "platform": PLATFORM,
            "inputs": open_inference.describe_inputs(*shape),
            "outputs": open_inference.describe_outputs(*shape, served.facts["members"]),
        }
    )


def model_ready(call: Call) -> Reply:
    """Return 200 if a model can be evaluated."""
    served = _named(call)
    is_ready = served.state == "ready"
    return Reply.of({"name": served.file.name, "ready": is_ready}, 200 if is_ready else 503)


def model_configuration(call: Call) -> Reply:
    """Return a model's configuration in Triton's format, which its load generator reads; shapes omit the row axis."""
    served = _ready(call)
    dtype = served.facts["dtype"]
    shape = (served.d, served.m, dtype)
    inputs = [
        {"name": tensor["name"], "data_type": _TYPES[dtype], "dims": tensor["shape"][1:]}
        | ({} if tensor["name"] == "inputs" else {"optional": True})
        for tensor in open_inference.describe_inputs(*shape)
    ]
    outputs = [
        {"name": tensor["name"], "data_type": _TYPES[dtype], "dims": tensor["shape"][1:]}
        for tensor in open_inference.describe_outputs(*shape, served.facts["members"])
    ]
    return Reply.of(
        {
            "name": served.file.name,
            "platform": PLATFORM,
            "backend": PLATFORM,
            "max_batch_size": call.core.settings.max_rows,
            "input": inputs,
            "output": outputs,
            "dynamic_batching": {},
        }
    )


def model_statistics(call: Call) -> Reply:
    """Return the statistics of one version, or of all versions of a model."""
    served = _named(call)
    is_one = call.target.version is not None
    all_of_them = call.core.repository.versions(served.file.name).values()
    return Reply.of({"model_stats": [_statistics(one) for one in ([served] if is_one else all_of_them)]})


def statistics(call: Call) -> Reply:
    """Return the statistics of all versions of all models."""
    repository = call.core.repository
    every = [served for name in repository.names() for served in repository.versions(name).values()]
    return Reply.of({"model_stats": [_statistics(served) for served in every]})


def repository_index(call: Call) -> Reply | Cancel:
    """List all versions in the folder and in service; with ``ready`` in the body, only ready ones."""
    return _read_optional(call, lambda call: call.run(_index(call)))


async def _index(call: Call) -> Reply:
    repository = call.core.repository
    look = await asyncio.to_thread(scan, repository.root)
    found = {(file.name, file.version): ("UNAVAILABLE", "unloaded") for file in look.files}
    for name in repository.names():
        for version, served in repository.versions(name).items():
            found[name, version] = (_STATES[served.state], served.reason or "")
    return Reply.of(
        [
            {"name": name, "version": str(version), "state": state, "reason": reason}
            for (name, version), (state, reason) in sorted(found.items())
            if state == "READY" or call.document.get("ready") is not True
        ]
    )


def load(call: Call) -> Reply | Cancel:
    """Load the model's files again."""

    def begin(call: Call) -> Cancel:
        if call.document.get("parameters"):
            raise InvalidInput.of("parameters", "none, as models come from the service's own folder", "some")
        return call.run(_load(call))

    return _read_optional(call, begin)


async def _load(call: Call) -> Reply:
    for served in await call.core.node.load(call.target.model):
        if served.reason is not None:
            raise InvalidInput(f"version {served.file.version} is refused: {served.reason}")
    return Reply.of({})


def unload(call: Call) -> Reply | Cancel:
    """Stop serving the model; parameters about dependent models are ignored, since there are none."""
    return _read_optional(call, lambda call: call.run(_unload(call)))


async def _unload(call: Call) -> Reply:
    await call.core.node.unload(call.target.model)
    return Reply.of({})


def _read_optional(call: Call, go_on: Callable[[Call], Reply | Cancel]) -> Reply | Cancel:
    """Parse a JSON body that may be empty, and call the next step."""
    return call.read(go_on, call.request.body or b"{}")


def infer(call: Call) -> Reply | Cancel:
    """Evaluate a model, with tensors as JSON or binary."""
    call.find(call.target.model, call.target.version)
    body, json_bytes = call.request.body, call.request.head.headers.get(b"inference-header-content-length", b"")
    if json_bytes == b"0":
        return _ask(call, open_inference.parse_raw(body, call.shape))
    text, rest = open_inference.split(body, json_bytes)

    def go_on(call: Call) -> Cancel:
        return _ask(call, open_inference.parse(call.document, rest, call.may_be_booleans, call.shape))

    return call.read(go_on, text)


def _ask(call: Call, inference: open_inference.Inference) -> Cancel:
    time_s = call.target.time_s
    if inference.timeout_us:
        time_s = min(time_s, inference.timeout_us / 1e6)
    form = "arrays" if any(inference.outputs.values()) else "flat"
    return call.ask(inference.question, form, partial(_write, inference), time_s=time_s)


def _write(inference: open_inference.Inference, call: Call, answers: Answers) -> Reply:
    served = call.served
    return open_inference.encode(served.file.name, str(served.file.version), served.m, inference, answers)


def _statistics(served: Served) -> dict[str, Any]:
    """Return the statistics of a version in the format of Triton's extension."""
    counted, unused = served.statistics, (0, 0.0)
    totals = {
        "success": (counted.answered, counted.queue_s + counted.compute_s),
        "fail": (counted.failed, counted.failed_s),
        "queue": (counted.answered, counted.queue_s),
        "compute_input": unused,
        "compute_infer": (counted.answered, counted.compute_s),
        "compute_output": unused,
        "cache_hit": unused,
        "cache_miss": unused,
    }
    return {
        "name": served.file.name,
        "version": str(served.file.version),
        "last_inference": counted.last_answer_ms,
        "inference_count": counted.rows,
        "execution_count": counted.batches,
        "inference_stats": {
            name: {"count": count, "ns": round(seconds * 1e9)} for name, (count, seconds) in totals.items()
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }


def _route(method: str, path: str, handler: Any, reply: Any, *statuses: int, **more: Any) -> Direct:
    """Return a route that can fail with some statuses."""
    responses = faults(schemas.InferenceError, 400, 401, 405, *statuses) | more.pop("responses", {})
    tags: list[Any] = ["Open Inference Protocol"]
    return Direct(path, handler, methods=[method], response_model=reply, responses=responses, tags=tags, **more)


def _routes() -> Iterator[Direct]:
    """Yield the routes of the protocol."""
    get, post = partial(_route, "GET"), partial(_route, "POST")
    empty = {"requestBody": {"required": False}}
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    model: dict[str, Any] = {"model": ModelName}
    version: dict[str, Any] = {**model, "version": Annotated[str, Path()]}
    not_ready = {"responses": faults(schemas.Ready, 503)}
    yield get("/v2", server_metadata, schemas.ServerMetadata)
    yield get("/v2/health/live", server_live, schemas.Liveness)
    yield get("/v2/health/ready", server_ready, schemas.Ready, **not_ready)
    yield get("/v2/models/stats", statistics, schemas.Statistics)
    yield post(
        "/v2/repository/index", repository_index, list[schemas.IndexEntry], 413, 415,
        body=schemas.IndexRequest, openapi_extra=empty,
    )  # fmt: skip
    for name, handler in (("load", load), ("unload", unload)):
        yield post(
            f"/v2/repository/models/{{model}}/{name}", handler, dict[str, Any], 403, 404, 413, 415, 503,
            body=schemas.RepositoryRequest, parameters=model, openapi_extra=empty,
        )  # fmt: skip
    for prefix, parameters in (("/v2/models/{model}", model), ("/v2/models/{model}/versions/{version}", version)):
        get = partial(_route, "GET", parameters=parameters)
        not_ready = {"responses": faults(schemas.ModelReady, 503)}
        yield get(prefix, model_metadata, schemas.ModelMetadata, 404, 503)
        yield get(f"{prefix}/ready", model_ready, schemas.ModelReady, 404, **not_ready)
        yield get(f"{prefix}/config", model_configuration, dict[str, Any], 404, 503)
        yield get(f"{prefix}/stats", model_statistics, schemas.Statistics, 404, 503)
        yield post(
            f"{prefix}/infer", infer, schemas.InferenceReply, 404, 413, 415, 500, 503, 504,
            body=schemas.InferenceRequest, parameters={**parameters, "x_deadline_ms": Deadline},
            responses={200: {"content": binary}}, openapi_extra={"requestBody": {"content": binary}},
        )  # fmt: skip


router = APIRouter()
router.routes += _routes()
