"""The Open Inference Protocol v2: what Triton's and KServe's clients speak, with Triton's extensions.

Specification: https://github.com/kserve/open-inference-protocol; extensions: Triton's ``docs/protocol``. Bodies of
inference are :mod:`service.open_inference`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from fastapi import APIRouter

from hessquik_client.errors import InvalidInput, ServiceError
from service import open_inference, schemas
from service.http.messages import JSON, Cancel, Head, Reply, Request
from service.json_reader import SHORT_BYTES, expect_object, has_booleans, read_json, read_long_json
from service.repository import Served, find_files
from service.routes.operation import Deadline, Dialect, Direct, ModelName, read_query, with_object
from service.statistics import Total

if TYPE_CHECKING:
    from service.app import Application

__all__ = ["DIALECT", "router"]

PLATFORM = "hessquik"
EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics", "parameters"]
_TYPES = {"float32": "TYPE_FP32", "float64": "TYPE_FP64"}
_STATES = {"ready": "READY", "loading": "LOADING", "failed": "UNAVAILABLE"}


def _write_error(error: ServiceError, request_id: str) -> tuple[int, bytes]:
    """Write an error as one string; what does not fit the model is 400 here."""
    return 400 if error.status == 422 else error.status, orjson.dumps({"error": error.detail})


DIALECT = Dialect(JSON, lambda path: path == "/v2" or path.startswith("/v2/"), _write_error)


def _reply(document: Any, status: int = 200) -> Reply:
    return Reply(status, JSON, [orjson.dumps(document)])


def _named(application: Application, request: Request) -> Served:
    """Return the version of the model that the path names, ready or not."""
    names = request.head.target.asked
    return application.core.repository.get(names["model"], names.get("version"))


def _ready(application: Application, names: Mapping[str, str]) -> Served:
    """Return the version of the model that the path names."""
    return application.core.repository.ready(names["model"], names.get("version"))


def server_live(application: Application, request: Request) -> Reply:
    """Return 200 while the server answers."""
    return _reply({"live": True})


def server_ready(application: Application, request: Request) -> Reply:
    """Return the server's readiness, as /readyz does."""
    is_ready = not application.why_not_ready()
    return _reply({"ready": is_ready}, 200 if is_ready else 503)


def server_metadata(application: Application, request: Request) -> Reply:
    """Name, version, and those extensions that are served."""
    name = "hessquik-service"
    return _reply({"name": name, "version": installed_version(name), "extensions": EXTENSIONS})


def model_metadata(application: Application, request: Request) -> Reply:
    """Tensors of a model and their shapes."""
    served = _ready(application, request.head.target.asked)
    name, shape = served.file.name, (served.d, served.m, served.facts["dtype"])
    return _reply(
        {
            "name": name,
            "versions": [str(version) for version in sorted(application.core.repository.versions(name))],
            "platform": PLATFORM,
            "inputs": open_inference.describe_inputs(*shape),
            "outputs": open_inference.describe_outputs(*shape, served.facts["members"]),
        }
    )


def model_ready(application: Application, request: Request) -> Reply:
    """Return 200 if a model can be evaluated."""
    served = _named(application, request)
    is_ready = served.state == "ready"
    return _reply({"name": served.file.name, "ready": is_ready}, 200 if is_ready else 503)


def model_configuration(application: Application, request: Request) -> Reply:
    """A model as Triton's configuration has it, for its load generator: shapes there are without the rows."""
    served = _ready(application, request.head.target.asked)
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
    return _reply(
        {
            "name": served.file.name,
            "platform": PLATFORM,
            "backend": PLATFORM,
            "max_batch_size": application.core.settings.max_rows,
            "input": inputs,
            "output": outputs,
            "dynamic_batching": {},
        }
    )


def model_statistics(application: Application, request: Request) -> Reply:
    """Counts of one version, or of all of a model."""
    served = _named(application, request)
    is_one = "version" in request.head.target.asked
    all_of_them = application.core.repository.versions(served.file.name).values()
    return _reply({"model_stats": [_statistics(one) for one in ([served] if is_one else all_of_them)]})


def statistics(application: Application, request: Request) -> Reply:
    """Counts of every version of every model."""
    repository = application.core.repository
    every = [served for name in repository.names() for served in repository.versions(name).values()]
    return _reply({"model_stats": [_statistics(served) for served in every]})


def repository_index(application: Application, request: Request) -> Reply | Cancel:
    """Every version in the folder and in service; only ready ones if the body says so."""

    def index(document: dict[str, Any], _: bool = False) -> Reply:
        repository = application.core.repository
        found = {(file.name, file.version): ("UNAVAILABLE", "unloaded") for file in find_files(repository.root)}
        for name in repository.names():
            for version, served in repository.versions(name).items():
                found[name, version] = (_STATES[served.state], served.reason or "")
        return _reply(
            [
                {"name": name, "version": str(version), "state": state, "reason": reason}
                for (name, version), (state, reason) in sorted(found.items())
                if state == "READY" or document.get("ready") is not True
            ]
        )

    return index({}) if not request.body else with_object(application, request, index)


def load(application: Application, request: Request) -> Reply | Cancel:
    """Read the model's files again."""

    def begin(document: dict[str, Any], _: bool = False) -> Cancel:
        if document.get("parameters"):
            raise InvalidInput.of("parameters", "none, as models come from the service's own folder", "some")
        return application.run(request, _load(application, request.head.target.asked["model"]))

    return begin({}) if not request.body else with_object(application, request, begin)


async def _load(application: Application, model: str) -> Reply:
    for served in await application.core.load(model):
        if served.reason is not None:
            raise InvalidInput(f"version {served.file.version} is refused: {served.reason}")
    return _reply({})


def unload(application: Application, request: Request) -> Reply | Cancel:
    """Stop serving the model; nothing depends on another, so that parameters have no meaning."""

    def begin(document: dict[str, Any], _: bool = False) -> Cancel:
        return application.run(request, _unload(application, request.head.target.asked["model"]))

    return begin({}) if not request.body else with_object(application, request, begin)


async def _unload(application: Application, model: str) -> Reply:
    await application.core.unload(model)
    return _reply({})


class Asked(NamedTuple):
    """The question in the head of an inference.

    Attributes:
        names: The model's and, if given, the version's.
        json_bytes: The length of the JSON part as it was given, empty if it was not.
        time_s: For the whole request.
    """

    names: Mapping[str, str]
    json_bytes: bytes
    time_s: float


def _read_infer_head(application: Application, head: Head, names: Mapping[str, str]) -> Asked:
    read_query(head.query)
    time_s = application.core.time_ms(head.headers.get(b"x-deadline-ms", b"")) / 1000
    if head.length is None or head.length > SHORT_BYTES:
        _ready(application, names)  # or the body need not be sent
    return Asked(names, head.headers.get(b"inference-header-content-length", b""), time_s)


def infer(application: Application, request: Request) -> Reply | Cancel:
    """Evaluate, in JSON or with binary tensors."""
    asked: Asked = request.head.target.asked
    application.core.expect_room()
    served = _ready(application, asked.names)
    request.model = served.file.name
    shape = application.core.shape(served)
    if asked.json_bytes == b"0":
        return _ask(application, request, served, open_inference.parse_raw(request.body, shape))
    text, rest = open_inference.split(request.body, asked.json_bytes)
    if len(text) <= SHORT_BYTES:
        inference = open_inference.parse(expect_object(read_json(text)), rest, has_booleans(text), shape)
        return _ask(application, request, served, inference)

    async def read() -> Cancel:
        with application.core.repository.holding(served):
            document, may_be_booleans = await read_long_json(text, shape.max_rows)
            parsed = open_inference.parse(expect_object(document), rest, may_be_booleans, shape)
            return _ask(application, request, served, parsed)

    return application.run(request, read())


def _ask(application: Application, request: Request, served: Served, inference: open_inference.Inference) -> Cancel:
    time_s = request.head.target.asked.time_s
    if inference.timeout_us:
        time_s = min(time_s, inference.timeout_us / 1e6)
    form = "arrays" if any(inference.outputs.values()) else "flat"
    write = partial(open_inference.encode, served.file.name, str(served.file.version), served.m, inference)
    return application.ask(request, served, inference.question, form, request.began_s + time_s, write)


def _statistics(served: Served) -> dict[str, Any]:
    """Return a version's counts in the extension's words."""
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


def _model(model: ModelName) -> None:
    """The parameters of a model."""


def _model_version(model: ModelName, version: str) -> None:
    """The parameters of a version."""


def _infer(model: ModelName, x_deadline_ms: Deadline = None) -> None:
    """The parameters of an inference."""


def _infer_version(model: ModelName, version: str, x_deadline_ms: Deadline = None) -> None:
    """The parameters of an inference with a version."""


def _faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    descriptions = {
        400: "The request does not fit.",
        401: "A key is needed.",
        403: "An admin key is needed.",
        404: "There is no such model or version.",
        405: "The path does not have this method.",
        413: "The body or the reply is too large.",
        415: "The body is encoded.",
        500: "The model could not be evaluated.",
        503: "The service is overloaded or not ready.",
        504: "The answer was not there in time.",
    }
    return {
        status: {"model": schemas.InferenceError, "description": descriptions[status]}
        for status in (400, 401, 405, *statuses)
    }


def _routes() -> list[Direct]:
    """Return the protocol's paths."""
    tagged: dict[str, Any] = {"tags": ["Open Inference Protocol"]}
    ready: dict[int | str, dict[str, Any]] = {503: {"model": schemas.Ready, "description": "Not ready."}}
    model_is_ready: dict[int | str, dict[str, Any]] = {
        503: {"model": schemas.ModelReady, "description": "Not ready."}
    }

    def get(path: str, handler: Any, reply: Any, parameters: Any = None, responses: Any = None) -> Direct:
        faults = {**_faults(*(() if parameters is None else (404, 503))), **(responses or {})}
        return Direct(
            path,
            handler,
            parameters=parameters,
            methods=["GET"],
            response_model=reply,
            responses=faults,
            **tagged,
        )

    def post(path: str, handler: Any, body: Any, reply: Any, *statuses: int, **more: Any) -> Direct:
        return Direct(
            path,
            handler,
            body=body,
            methods=["POST"],
            response_model=reply,
            responses=_faults(*statuses) | more.pop("responses", {}),
            **more,
            **tagged,
        )

    empty = {"requestBody": {"required": False}}
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    routes = [
        get("/v2", server_metadata, schemas.ServerMetadata),
        get("/v2/health/live", server_live, schemas.Liveness),
        get("/v2/health/ready", server_ready, schemas.Ready, responses=ready),
        get("/v2/models/stats", statistics, schemas.Statistics),
        post(
            "/v2/repository/index", repository_index, schemas.IndexRequest, list[schemas.IndexEntry], 413, 415,
            openapi_extra=empty,
        ),
    ]  # fmt: skip
    for name, handler in (("load", load), ("unload", unload)):
        path = f"/v2/repository/models/{{model}}/{name}"
        routes.append(
            post(
                path, handler, schemas.RepositoryRequest, dict[str, Any], 403, 404, 413, 415, 503,
                parameters=_model, openapi_extra=empty,
            )
        )  # fmt: skip
    for prefix, parameters, asking in (
        ("/v2/models/{model}", _model, _infer),
        ("/v2/models/{model}/versions/{version}", _model_version, _infer_version),
    ):
        routes += [
            get(prefix, model_metadata, schemas.ModelMetadata, parameters),
            get(f"{prefix}/ready", model_ready, schemas.ModelReady, parameters, model_is_ready),
            get(f"{prefix}/config", model_configuration, dict[str, Any], parameters),
            get(f"{prefix}/stats", model_statistics, schemas.Statistics, parameters),
            post(
                f"{prefix}/infer", infer, schemas.InferenceRequest, schemas.InferenceReply,
                404, 413, 415, 500, 503, 504,
                read_head=_read_infer_head, parameters=asking, responses={200: {"content": binary}},
                openapi_extra={"requestBody": {"content": binary}},
            ),
        ]  # fmt: skip
    return routes


router = APIRouter()
router.routes += _routes()
