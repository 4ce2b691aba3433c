"""The OpenAPI document: what the hand-written parsers of :mod:`service.codecs` take, and what routes answer.

Requests do not pass through these models, which would cost more than computing a small network; a test holds that
the document and the parsers agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from service import errors
from service.errors import ServiceError
from service.quantities import QUANTITIES, Quantity
from service.settings import Settings

__all__ = ["document"]

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Row = Annotated[list[Number], Field(min_length=1)]
Rows = Annotated[list[Row], Field(min_length=1)]
Stack = Annotated[list[Rows], Field(min_length=1)]
#: Replies: null stands for a number that is not finite.
Entry = float | None
Vector = list[Entry]
Matrix = list[Vector]
Cube = list[Matrix]
Tesseract = list[Cube]
Dtype = Literal["float32", "float64"]
Version = Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")]
State = Literal["ready", "loading", "failed"]


class QuantityRequest(BaseModel):
    """Points, and how to look at them."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"inputs": [[0.5, -1.0]]}})

    inputs: Row | Rows = Field(description="(n, d) points, or one point of d numbers: the reply then has no n axis.")
    weights: Row | Rows | None = Field(
        None, description="(m) or (n, m): derivatives of Σ_j weights_j f_j; the m axis of the reply becomes 1."
    )
    directions: Rows | Stack | None = Field(None, description="(k, d) or (n, k, d), for jvp, hvp and curvature.")
    dtype: Dtype | None = Field(None, description="What to compute in; the model's own if not given.")


class EvaluateRequest(QuantityRequest):
    """Points, and what is asked of them."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"inputs": [[0.5, -1.0]], "quantities": ["value", "gradient"]}}
    )

    quantities: Annotated[list[Quantity], Field(min_length=1)] | None = Field(
        None, description="Any of them, each once; value if not given.", json_schema_extra={"uniqueItems": True}
    )


class Answer(BaseModel):
    """One key per quantity. Axes: n points (absent for a single point), d inputs, k directions, m outputs."""

    model: str
    version: Version
    value: Vector | Matrix | None = Field(None, description="(n, m)")
    gradient: Matrix | Cube | None = Field(None, description="(n, d, m): ∂f_j/∂x_a")
    hessian: Cube | Tesseract | None = Field(None, description="(n, d, d, m): ∂²f_j/∂x_a∂x_b")
    laplacian: Vector | Matrix | None = Field(None, description="(n, m): Σ_a ∂²f_j/∂x_a²")
    hessian_diagonal: Matrix | Cube | None = Field(None, description="(n, d, m): ∂²f_j/∂x_a²")
    jvp: Matrix | Cube | None = Field(None, description="(n, k, m): vᵀ∇f_j")
    hvp: Cube | Tesseract | None = Field(None, description="(n, k, d, m): ∇²f_j v")
    curvature: Matrix | Cube | None = Field(None, description="(n, k, m): vᵀ∇²f_j v")


class Facts(BaseModel):
    """State, sizes and metadata of a model."""

    name: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    versions: list[Version]
    default_version: Version
    state: State
    reason: str | None = Field(None, description="Why it failed.")
    d: int | None = Field(description="Inputs.")
    m: int | None = Field(description="Outputs.")
    dtype: Dtype | None
    device: str | None
    parameters: int | None
    metadata: dict[str, Any] | None = Field(
        description="What its file says: description, names, bounds, training with its errors."
    )


class ModelList(BaseModel):
    """Every model, in the order of names."""

    models: list[Facts]


class Limits(BaseModel):
    """The most that one request may have."""

    rows: int
    body_bytes: int
    reply_bytes: int


class ModelDetails(Facts):
    """One version of a model."""

    version: Version
    architecture: dict[str, Any] | None
    quantities: list[Quantity]
    dtypes: list[Dtype]
    limits: Limits


class Attempt(BaseModel):
    """How reading one file went."""

    version: Version
    state: State
    reason: str | None


class Loaded(Facts):
    """The model after loading, and how that went."""

    loaded: list[Attempt]


class Unloaded(BaseModel):
    """The model is no longer served."""

    name: str
    state: Literal["unloaded"]


class Liveness(BaseModel):
    """The process answers."""

    live: Literal[True]


class Readiness(BaseModel):
    """Whether the service can answer, or why not."""

    ready: bool
    reasons: list[str]


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What was expected, and what came.")
    code: str
    request_id: str
    field: str | None = Field(None, description="The field at fault.")
    row: int | None = Field(None, description="Its first row at fault.")
    expected: str | None = None
    got: str | None = None


_MODELS = (QuantityRequest, EvaluateRequest, Answer, ModelList, ModelDetails, Loaded, Unloaded, Liveness, Readiness)

#: Errors of any path; then those of paths that name a model, take a body, compute, or administer.
_ANY = (errors.Unauthorized, errors.MethodNotAllowed)
_NAMED = (errors.ModelNotFound, errors.VersionNotFound, errors.InvalidInput)
_ASKED = (
    errors.MalformedBody,
    errors.NotAcceptable,
    errors.BodyTooLarge,
    errors.ReplyTooLarge,
    errors.UnsupportedMediaType,
    errors.EvaluationFailed,
    errors.NotReady,
    errors.Overloaded,
    errors.WorkerLost,
    errors.DeadlineExceeded,
)
_ADMIN = (errors.ModelNotFound, errors.Forbidden, errors.NotReady)

_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_VERSION = {
    "name": "version",
    "in": "query",
    "description": "The highest that is ready if not given.",
    "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,8}$"},
}
_DTYPE = {
    "name": "dtype",
    "in": "query",
    "description": "For a binary body.",
    "schema": {"enum": ["float32", "float64"]},
}
_LISTED = {
    "name": "quantities",
    "in": "query",
    "description": "For a binary body: names separated by commas.",
    "schema": {"type": "array", "items": {"enum": list(QUANTITIES)}, "uniqueItems": True},
    "style": "form",
    "explode": False,
}


def document(settings: Settings, version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a service with these settings."""
    _, definitions = models_json_schema([(model, "validation") for model in (*_MODELS, Problem)], ref_template=_REF)
    schemas = definitions["$defs"]
    for request in ("QuantityRequest", "EvaluateRequest"):
        batch = schemas[request]["properties"]["inputs"]["anyOf"][1]
        batch["maxItems"] = settings.max_rows
    deadline = {
        "name": "X-Deadline-Ms",
        "in": "header",
        "description": "Milliseconds within which the answer has to be there.",
        "schema": {"type": "integer", "minimum": 1, "maximum": settings.max_deadline_ms},
    }
    asking = [_MODEL, _VERSION, _DTYPE, deadline]
    paths = {
        "/v1/models": {"get": _operation("models", "Every model", "ModelList", _ANY)},
        "/v1/models/{model}": {
            "get": _operation("models", "One model", "ModelDetails", (*_ANY, *_NAMED), [_MODEL, _VERSION])
        },
        **{
            f"/v1/models/{{model}}/{quantity}": {"post": _question(f"The {quantity}", "QuantityRequest", asking)}
            for quantity in ("value", "gradient", "hessian", "laplacian")
        },
        "/v1/models/{model}/evaluate": {
            "post": _question("Any set of quantities in one pass", "EvaluateRequest", [*asking, _LISTED])
        },
        "/v1/models/{model}/load": {
            "post": _operation("models", "Read a model from disk again", "Loaded", (*_ANY, *_ADMIN), [_MODEL])
        },
        "/v1/models/{model}/unload": {
            "post": _operation("models", "Stop serving a model", "Unloaded", (*_ANY, *_ADMIN), [_MODEL])
        },
        "/livez": {"get": {**_operation("operation", "Liveness", "Liveness", ()), "security": []}},
        "/readyz": {"get": {**_operation("operation", "Readiness", "Readiness", ()), "security": []}},
        "/metrics": {"get": _operation("operation", "Metrics in Prometheus' text format", None, _ANY)},
    }
    paths["/readyz"]["get"]["responses"]["503"] = _reply("Not ready, and why", "Readiness")
    return {
        "openapi": "3.1.0",
        "info": {"title": "hessquik-service", "version": version, "description": _DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        **({"security": [{"key": []}]} if settings.api_keys else {}),
    }


_REF = "#/components/schemas/{model}"
_SAFETENSORS = "application/x-safetensors"
_DESCRIPTION = (
    "Exact values, gradients, Hessians and more of saved networks. Every reply carries X-Request-Id. "
    "The same server speaks UM-Bridge 1.0 (/Info, /ModelInfo, /Evaluate, …) and the Open Inference Protocol v2 "
    "(/v2/…), which their own documents describe."
)


def _operation(
    tag: str, summary: str, reply: str | None, faults: Iterable[type[ServiceError]], parameters: Iterable[Any] = ()
) -> dict[str, Any]:
    """A path's method."""
    return {
        "tags": [tag],
        "summary": summary,
        "parameters": list(parameters),
        "responses": {"200": _reply(summary, reply), **_faults(faults)},
    }


def _question(summary: str, request: str, parameters: list[Any]) -> dict[str, Any]:
    """A method that computes."""
    operation = _operation("derivatives", summary, "Answer", (*_ANY, *_NAMED, *_ASKED), parameters)
    binary = {"schema": {"type": "string", "format": "binary"}}
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model=request)}}, _SAFETENSORS: binary},
    }
    operation["responses"]["200"]["content"][_SAFETENSORS] = binary
    return operation


def _reply(description: str, model: str | None) -> dict[str, Any]:
    if model is None:
        return {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}
    content = {"application/json": {"schema": {"$ref": _REF.format(model=model)}}}
    return {"description": description, "content": content}


def _faults(faults: Iterable[type[ServiceError]]) -> dict[str, Any]:
    """Problem details by status, with the codes that each may have and an example of the first."""
    by_status: dict[str, list[type[ServiceError]]] = {}
    for fault in faults:
        by_status.setdefault(str(fault.status), []).append(fault)
    return {
        status: {
            "description": "; ".join(f"`{fault.code}`: {(fault.__doc__ or '').strip()}" for fault in same),
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": _REF.format(model="Problem")},
                    "example": _example(same[0]),
                }
            },
            **({"headers": {"Retry-After": {"schema": {"type": "integer"}}}} if same[0].retry_after_s else {}),
        }
        for status, same in sorted(by_status.items())
    }


def _example(fault: type[ServiceError]) -> dict[str, Any]:
    return {
        "type": f"urn:hessquik:error:{fault.code}",
        "title": fault.title,
        "status": fault.status,
        "detail": (fault.__doc__ or "").strip(),
        "code": fault.code,
        "request_id": "3f9a1c0b7d52-1",
    }
