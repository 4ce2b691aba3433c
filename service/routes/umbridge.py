"""UM-Bridge 1.0: every served model is a function from one input vector to one output vector, with derivatives.

Protocol: https://um-bridge-benchmarks.readthedocs.io/en/docs/umbridge/lib.html. It has one point per request; those
that come at the same time are computed together, like all others. ``config`` may name ``version``, ``dtype``
and ``outside``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import orjson
from fastapi import APIRouter
from pydantic import BaseModel, Field, create_model

from hessquik_client.errors import InvalidInput, InvalidOutput, ServiceError
from hessquik_client.question import make_question, numbers

from .. import schemas
from ..front import Call, Dialect
from ..http.messages import JSON, Cancel, Reply
from ..routes.operation import Deadline, Direct, faults
from ..scheduler import Answers
from ..wire import Array

__all__ = ["DIALECT", "router"]


class Feature(NamedTuple):
    """An operation that computes.

    Attributes:
        text: Its formula.
        quantity: What it is called here.
        indices: Of input and output vectors, which it names.
        vectors: Those that it takes besides the point, out of :data:`VECTORS`.
    """

    text: str
    quantity: str
    indices: tuple[str, ...]
    vectors: tuple[str, ...]


VECTORS = {"sens": "The weights of the outputs: m numbers.", "vec": "A direction: d numbers."}
FEATURES = {
    "Evaluate": Feature("F(x).", "value", (), ()),
    "Gradient": Feature("Jᵀ·sens.", "gradient", ("outWrt", "inWrt"), ("sens",)),
    "ApplyJacobian": Feature("J·vec.", "jvp", ("outWrt", "inWrt"), ("vec",)),
    "ApplyHessian": Feature("(Σ_k sens_k H_k)·vec.", "hvp", ("outWrt", "inWrt1", "inWrt2"), ("sens", "vec")),
}
PATHS = frozenset({"/Info", "/ModelInfo", "/InputSizes", "/OutputSizes", *(f"/{feature}" for feature in FEATURES)})
#: Errors that are not the caller's input, and keep their own status.
_OWN_STATUS = frozenset({401, 403, 405, 499})
#: Larger numbers cannot be versions.
_MAX_VERSION = 10**9


def _write_error(error: ServiceError, request_id: str) -> tuple[int, bytes]:
    """Write an error in the protocol's format: statuses below 500 become 400, except 401, 403, 405 and 499."""
    kind = type(error).__name__
    if error.status >= 500 or error.status in _OWN_STATUS:
        status = error.status
    else:
        status, kind = 400, kind if kind == "ModelNotFound" else "InvalidInput"
    return status, orjson.dumps({"error": {"type": kind, "message": error.detail}})


DIALECT = Dialect(JSON, PATHS.__contains__, _write_error)


def _find(call: Call) -> dict[str, Any]:
    """Find the model that the body names; return the configuration in the body.

    Raises:
        ModelNotFound: there is no such model.
        InvalidInput: the name is not a string, or the configuration has unknown keys.
    """
    name, config = call.document.get("name"), call.document.get("config")
    if not isinstance(name, str):
        raise InvalidInput.of("name", "a string", "something else")
    call.core.repository.versions(name)  # that it is not there is said before anything else
    call.request.model = name
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise InvalidInput.of("config", "an object", type(config).__name__)
    if unknown := config.keys() - {"version", "dtype", "outside"}:
        raise InvalidInput.of("config", "the keys version, dtype and outside at most", min(unknown)[:40])
    version = config.get("version")
    if isinstance(version, bool) or not isinstance(version, int | str | None):
        raise InvalidInput.of("config.version", "a number or a string", "something else")
    if isinstance(version, int):
        version = str(version) if 0 < version < _MAX_VERSION else "0"
    call.find(name, version)
    return config


def _ask(feature: Feature, call: Call) -> Cancel:
    """Queue the computation of one quantity at one point."""
    config, document, served = _find(call), call.document, call.served
    given = document.get("input")
    if not isinstance(given, list | np.ndarray) or len(given) != 1:
        raise InvalidInput.of("input", "a list of 1 vector", "something else")
    arrays = {"inputs": _vector(call, "input[0]", given[0], served.d)}
    for name in feature.indices:
        index = document.get(name)
        if isinstance(index, bool) or index != 0:
            raise InvalidInput.of(name, "0, the only index there is (they count from 0)", "something else")
    if "sens" in feature.vectors:
        arrays["weights"] = _vector(call, "sens", document.get("sens"), served.m)
    if "vec" in feature.vectors:
        arrays["directions"] = _vector(call, "vec", document.get("vec"), served.d)[None]
    question = make_question(arrays, None, feature.quantity, config.get("dtype"), call.shape, config.get("outside"))
    return call.ask(question, "flat", partial(_write, feature))


def _vector(call: Call, name: str, given: Any, length: int) -> Array:
    """Return a vector of ``length`` numbers; a single number is a vector of length 1.

    Raises:
        InvalidInput: ``given`` is not a list of ``length`` finite numbers.
    """
    array = numbers(name, [given] if isinstance(given, int | float) else given, call.may_be_booleans)
    if array.shape != (length,):
        raise InvalidInput.of(name, f"a list of {length} numbers", f"shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InvalidInput.of(name, "finite numbers", "one that is not")
    return array


def _write(feature: Feature, _: Call, answers: Answers) -> Reply:
    """Write the output as a flat list of numbers; a value is a list of one vector.

    Raises:
        InvalidOutput: a number is not finite.
    """
    text = b",".join(answers[feature.quantity])
    if b"null" in text:
        raise InvalidOutput("expected finite numbers, the model's answer at this point has others")
    is_value = feature.quantity == "value"
    return Reply(200, JSON, [b'{"output":[[%b]]}' % text if is_value else b'{"output":[%b]}' % text])


def _describe(document: Callable[[Call], Mapping[str, Any]], call: Call) -> Reply:
    """Answer a request for the description of a model."""
    _find(call)
    return Reply.of(document(call))


def info(call: Call) -> Reply:
    """List the names of the models that are ready."""
    repository = call.core.repository
    names = [name for name in repository.names() if repository.default(name).state == "ready"]
    return Reply.of({"protocolVersion": 1.0, "models": names})


def _body(name: str, feature: Feature) -> type[BaseModel]:
    """Return the model of an operation's body."""
    members: dict[str, Any] = {index: (schemas.UMBridgeIndex, ...) for index in feature.indices}
    members |= {vector: (schemas.UMBridgeVector, Field(description=VECTORS[vector])) for vector in feature.vectors}
    return create_model(f"UMBridge{name}", __base__=schemas.UMBridgePoint, __doc__=feature.text, **members)


def _operation(
    name: str, text: str, go_on: Callable[[Call], Reply | Cancel], body: Any, reply: Any, **parameters: Any
) -> Direct:
    """Return a route that parses the body as JSON, whatever its Content-Type."""
    return Direct(
        f"/{name}",
        lambda call: call.read(go_on),
        body=body,
        parameters=parameters,
        methods=["POST"],
        name=name,
        text=text,
        response_model=reply,
        **_OPTIONS,
    )


_DESCRIPTIONS: dict[str, tuple[str, Callable[[Call], Mapping[str, Any]], Any]] = {
    "ModelInfo": (
        "The quantities that can be asked of a model.",
        lambda call: {"support": dict.fromkeys(FEATURES, True)},
        schemas.UMBridgeSupport,
    ),
    "InputSizes": (
        "The length of the input vector.",
        lambda call: {"inputSizes": [call.served.d]},
        schemas.UMBridgeInputSizes,
    ),
    "OutputSizes": (
        "The length of the output vector.",
        lambda call: {"outputSizes": [call.served.m]},
        schemas.UMBridgeOutputSizes,
    ),
}
_FAULTS = {
    400: "`InvalidInput` or `ModelNotFound`.",
    401: "`Unauthorized`.",
    405: "`MethodNotAllowed`.",
    500: "`InvalidOutput` or `EvaluationFailed`.",
    503: "`Overloaded`, `NotReady` or `WorkerLost`.",
    504: "`DeadlineExceeded`.",
}
_OPTIONS: dict[str, Any] = {
    "tags": ["UM-Bridge"],
    "responses": faults(schemas.UMBridgeError, *_FAULTS, texts=_FAULTS),
}

router = APIRouter()
router.routes += [
    Direct("/Info", info, methods=["GET"], response_model=schemas.UMBridgeInfo, **_OPTIONS),
    *(
        _operation(name, text, partial(_describe, document), schemas.UMBridgeRequest, reply)
        for name, (text, document, reply) in _DESCRIPTIONS.items()
    ),
    *(
        _operation(
            name,
            feature.text,
            partial(_ask, feature),
            _body(name, feature),
            schemas.UMBridgeOutputs if name == "Evaluate" else schemas.UMBridgeOutput,
            x_deadline_ms=Deadline,
        )
        for name, feature in FEATURES.items()
    ),
]
