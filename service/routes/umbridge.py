"""UM-Bridge 1.0: every served model is a function of one input vector to one output vector, with all derivatives.

Protocol: https://um-bridge-benchmarks.readthedocs.io/en/docs/umbridge/lib.html. It has one point per request; those
that come at the same time are computed together, like all others. ``config`` may name ``version``, ``dtype``
and ``outside``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from fastapi import APIRouter

from hessquik_client.errors import InvalidInput, InvalidOutput, ServiceError
from hessquik_client.question import make_question
from service import schemas
from service.http.messages import JSON, Cancel, Head, Reply, Request
from service.json_reader import numbers
from service.repository import Served
from service.routes.operation import Deadline, Dialect, Direct, read_query, with_object
from service.wire import Array

if TYPE_CHECKING:
    from service.app import Application

__all__ = ["DIALECT", "router"]

FEATURES = ("Evaluate", "Gradient", "ApplyJacobian", "ApplyHessian")
PATHS = frozenset({"/Info", "/ModelInfo", "/InputSizes", "/OutputSizes", *(f"/{feature}" for feature in FEATURES)})
#: Errors that are not the caller's input, and keep their own status.
_OWN_STATUS = frozenset({401, 403, 405, 499})
#: Larger numbers cannot be versions.
_MAX_VERSION = 10**9


def _write_error(error: ServiceError, request_id: str) -> tuple[int, bytes]:
    """Write an error in the protocol's words: two keys, 400 and three types, and 500, 503 and 504 as they are."""
    kind = type(error).__name__
    if error.status >= 500 or error.status in _OWN_STATUS:
        status = error.status
    else:
        status, kind = 400, kind if kind == "ModelNotFound" else "InvalidInput"
    return status, orjson.dumps({"error": {"type": kind, "message": error.detail}})


DIALECT = Dialect(JSON, PATHS.__contains__, _write_error)


class Call:
    """A request about a model: its body, and the model that it names.

    Args:
        application: What answers.
        request: The request.
        document: Its body.
        may_be_booleans: Whether the body may hold any, which numpy would take for numbers.
    """

    def __init__(
        self, application: Application, request: Request, document: Mapping[str, Any], may_be_booleans: bool
    ) -> None:
        """Find the model.

        Raises:
            ModelNotFound: there is none of this name.
            InvalidInput: the name is no string, or the configuration has something else.
        """
        name = document.get("name")
        if not isinstance(name, str):
            raise InvalidInput.of("name", "a string", "something else")
        repository = application.core.repository
        repository.versions(name)
        config = document.get("config")
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
        self.served: Served = repository.ready(name, version)
        request.model = self.served.file.name
        self._application = application
        self._request = request
        self._document = document
        self._dtype, self._outside = config.get("dtype"), config.get("outside")
        self._may_be_booleans = may_be_booleans

    def point(self) -> Array:
        """Return the only input vector, (d)."""
        given = self._document.get("input")
        if not isinstance(given, list | np.ndarray) or len(given) != 1:
            raise InvalidInput.of("input", "a list of 1 vector", "something else")
        return self.vector("input[0]", given[0], self.served.d)

    def check_indices(self, *names: str) -> None:
        """Expect every index of an input or output vector to be 0."""
        for name in names:
            index = self._document.get(name)
            if isinstance(index, bool) or index != 0:
                raise InvalidInput.of(name, "0, the only index there is (they count from 0)", "something else")

    def sens(self) -> Array:
        """Return what outputs are weighted with, (m)."""
        return self.vector("sens", self._document.get("sens"), self.served.m)

    def vec(self) -> Array:
        """Return a direction among the inputs, (d)."""
        return self.vector("vec", self._document.get("vec"), self.served.d)

    def vector(self, name: str, given: Any, length: int) -> Array:
        """Return a vector of so many numbers; a number alone is one of length 1.

        Raises:
            InvalidInput: it is something else.
        """
        listed = [given] if isinstance(given, int | float) else given
        array = numbers(name, listed, self._may_be_booleans)
        if array.shape != (length,):
            raise InvalidInput.of(name, f"a list of {length} numbers", f"shape {list(array.shape)}")
        if not np.isfinite(array).all():
            raise InvalidInput.of(name, "finite numbers", "one that is not")
        return array

    def ask(self, quantity: str, point: Array, sens: Array | None = None, vec: Array | None = None) -> Cancel:
        """Ask for one quantity at one point; the reply is a flat list of numbers."""
        given = {"inputs": point, "weights": sens, "directions": None if vec is None else vec[None]}
        arrays = {name: array for name, array in given.items() if array is not None}
        shape = self._application.core.shape(self.served)
        question = make_question(arrays, None, quantity, self._dtype, shape, self._outside)
        deadline_s = self._request.began_s + self._request.head.target.asked
        write = partial(_write, quantity)
        return self._application.ask(self._request, self.served, question, "flat", deadline_s, write)


def _write(quantity: str, answers: Mapping[str, Any]) -> Reply:
    """Write the output: of a value, a list of one vector.

    Raises:
        InvalidOutput: it is not finite.
    """
    text = b",".join(answers[quantity])
    if b"null" in text:
        raise InvalidOutput("expected finite numbers, the model's answer at this point has others")
    return Reply(200, JSON, [b'{"output":[[%b]]}' % text if quantity == "value" else b'{"output":[%b]}' % text])


def _evaluate(call: Call) -> Cancel:
    """F(x)."""
    return call.ask("value", call.point())


def _gradient(call: Call) -> Cancel:
    """Jᵀ·sens."""
    point = call.point()
    call.check_indices("outWrt", "inWrt")
    return call.ask("gradient", point, sens=call.sens())


def _apply_jacobian(call: Call) -> Cancel:
    """J·vec."""
    point = call.point()
    call.check_indices("outWrt", "inWrt")
    return call.ask("jvp", point, vec=call.vec())


def _apply_hessian(call: Call) -> Cancel:
    """(Σ_k sens_k H_k)·vec."""
    point = call.point()
    call.check_indices("outWrt", "inWrt1", "inWrt2")
    return call.ask("hvp", point, sens=call.sens(), vec=call.vec())


def _model_info(call: Call) -> Reply:
    """The quantities that can be asked of a model."""
    return _reply({"support": dict.fromkeys(FEATURES, True)})


def _input_sizes(call: Call) -> Reply:
    """The length of the input vector."""
    return _reply({"inputSizes": [call.served.d]})


def _output_sizes(call: Call) -> Reply:
    """The length of the output vector."""
    return _reply({"outputSizes": [call.served.m]})


def info(application: Application, request: Request) -> Reply:
    """The names of the models that are ready."""
    repository = application.core.repository
    names = [name for name in repository.names() if repository.default(name).state == "ready"]
    return _reply({"protocolVersion": 1.0, "models": names})


def _reply(document: Mapping[str, Any]) -> Reply:
    return Reply(200, JSON, [orjson.dumps(document)])


def _post(operation: Callable[[Call], Reply | Cancel], application: Application, request: Request) -> Reply | Cancel:
    """Read the body, which is JSON whatever the header says, and find the model."""

    def go_on(document: dict[str, Any], may_be_booleans: bool) -> Reply | Cancel:
        return operation(Call(application, request, document, may_be_booleans))

    return with_object(application, request, go_on)


def _read_time(application: Application, head: Head, names: Mapping[str, str]) -> float:
    """Read the time for the request in seconds."""
    read_query(head.query)
    return application.core.time_ms(head.headers.get(b"x-deadline-ms", b"")) / 1000


def _parameters(x_deadline_ms: Deadline = None) -> None:
    """The parameters of every operation."""


_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.UMBridgeError, "description": description}
    for status, description in {
        400: "`InvalidInput` or `ModelNotFound`.",
        401: "`Unauthorized`.",
        405: "`MethodNotAllowed`.",
        500: "`InvalidOutput` or `EvaluationFailed`.",
        503: "`Overloaded`, `NotReady` or `WorkerLost`.",
        504: "`DeadlineExceeded`.",
    }.items()
}
_OPERATIONS: dict[str, tuple[Callable[[Call], Reply | Cancel], Any, Any]] = {
    "ModelInfo": (_model_info, schemas.UMBridgeRequest, schemas.UMBridgeSupport),
    "InputSizes": (_input_sizes, schemas.UMBridgeRequest, schemas.UMBridgeInputSizes),
    "OutputSizes": (_output_sizes, schemas.UMBridgeRequest, schemas.UMBridgeOutputSizes),
    "Evaluate": (_evaluate, schemas.UMBridgePoint, schemas.UMBridgeOutputs),
    "Gradient": (_gradient, schemas.UMBridgeGradient, schemas.UMBridgeOutput),
    "ApplyJacobian": (_apply_jacobian, schemas.UMBridgeJacobian, schemas.UMBridgeOutput),
    "ApplyHessian": (_apply_hessian, schemas.UMBridgeHessian, schemas.UMBridgeOutput),
}
_OPTIONS: dict[str, Any] = {"tags": ["UM-Bridge"], "responses": _FAULTS}

router = APIRouter()
router.routes += [
    Direct("/Info", info, methods=["GET"], response_model=schemas.UMBridgeInfo, **_OPTIONS),
    *(
        Direct(
            f"/{name}",
            partial(_post, operation),
            _read_time,
            body,
            _parameters,
            methods=["POST"],
            name=name,
            operation_id=name,
            text=operation.__doc__,
            response_model=reply,
            **_OPTIONS,
        )
        for name, (operation, body, reply) in _OPERATIONS.items()
    ),
]
