"""UM-Bridge 1.0: every served model is a function of one input vector to one output vector, with all derivatives.

Protocol: https://um-bridge-benchmarks.readthedocs.io/en/docs/umbridge/lib.html. It has one point per request; those
that come at the same time are computed together, like all others. ``config`` may name ``version`` and ``dtype``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import orjson
from starlette.routing import Route

from service.codecs import Shape, load_json, make_question, numbers
from service.core import Core
from service.door import Dialect, Receive, Reply, Scope, Send, header, read_body, send_reply
from service.errors import InvalidInput, InvalidOutput, MalformedBody, ServiceError
from service.repository import Served
from service.wire import Array

__all__ = ["DIALECT", "routes"]

JSON = b"application/json"
FEATURES = ("Evaluate", "Gradient", "ApplyJacobian", "ApplyHessian")
PATHS = frozenset({"/Info", "/ModelInfo", "/InputSizes", "/OutputSizes", *(f"/{feature}" for feature in FEATURES)})
#: Errors that are not the caller's input, and keep their own status.
_OWN_STATUS = frozenset({401, 403, 405, 499})


def routes(core: Core) -> list[Route]:
    """The protocol's paths."""
    operations: dict[str, Operation] = {
        "ModelInfo": _model_info,
        "InputSizes": _input_sizes,
        "OutputSizes": _output_sizes,
        "Evaluate": _evaluate,
        "Gradient": _gradient,
        "ApplyJacobian": _apply_jacobian,
        "ApplyHessian": _apply_hessian,
    }
    posts = [
        Route(f"/{name}", Post(core, name, operation), methods=["POST"]) for name, operation in operations.items()
    ]
    return [Route("/Info", Info(core), methods=["GET"]), *posts]


def _write_error(error: ServiceError, request_id: str) -> tuple[int, bytes]:
    """An error in the protocol's words: two keys, three types with status 400, and 500, 503 and 504 as they are."""
    kind = type(error).__name__
    if error.status >= 500 or error.status in _OWN_STATUS:
        status = error.status
    else:
        status, kind = 400, kind if kind == "ModelNotFound" else "InvalidInput"
    return status, orjson.dumps({"error": {"type": kind, "message": error.detail}})


DIALECT = Dialect(JSON, PATHS.__contains__, _write_error)


class Info:
    """GET /Info: the names of the models that are ready."""

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Always answer."""
        scope["hessquik.route"] = "/Info"
        repository = self._core.repository
        names = [name for name in repository.names() if repository.default(name).state == "ready"]
        await send_reply(send, Reply(200, JSON, [orjson.dumps({"protocolVersion": 1.0, "models": names})]))


class Call:
    """A request about a model: its body, the model it names, and what it takes to ask.

    Args:
        core: The service.
        document: The body.
        has_booleans: Whether the body may hold any.
    """

    def __init__(self, core: Core, document: Mapping[str, Any], has_booleans: bool) -> None:
        """Find the model.

        Raises:
            ModelNotFound: there is none of this name.
            InvalidInput: the name is no string, or the configuration has something else.
        """
        name = document.get("name")
        if not isinstance(name, str):
            raise InvalidInput.of("name", "a string", "something else")
        core.repository.versions(name)
        config = document.get("config")
        config = {} if config is None else config
        if not isinstance(config, dict) or not config.keys() <= {"version", "dtype"}:
            raise InvalidInput.of("config", "an object with the keys version and dtype at most", "something else")
        version = config.get("version")
        if isinstance(version, bool) or not isinstance(version, int | str | None):
            raise InvalidInput.of("config.version", "a number or a string", "something else")
        self.served: Served = core.repository.ready(name, None if version is None else str(version))
        self._core = core
        self._document = document
        self._dtype = config.get("dtype")
        self._has_booleans = has_booleans

    def point(self) -> Array:
        """The only input vector, (d)."""
        given = self._document.get("input")
        if not isinstance(given, list) or len(given) != 1:
            raise InvalidInput.of("input", "a list of 1 vector", "something else")
        return self.vector("input[0]", given[0], self.served.d)

    def check_indices(self, *names: str) -> None:
        """Every index of an input or output vector has to be 0."""
        for name in names:
            index = self._document.get(name)
            if isinstance(index, bool) or index != 0:
                raise InvalidInput.of(name, "0, the only index there is (they count from 0)", "something else")

    def sens(self) -> Array:
        """What outputs are weighted with, (m)."""
        return self.vector("sens", self._document.get("sens"), self.served.m)

    def vec(self) -> Array:
        """A direction among the inputs, (d)."""
        return self.vector("vec", self._document.get("vec"), self.served.d)

    def vector(self, name: str, given: Any, length: int) -> Array:
        """A vector of so many numbers; a number alone is one of length 1.

        Raises:
            InvalidInput: it is something else.
        """
        listed = [given] if isinstance(given, int | float) else given
        array = numbers(name, listed, self._has_booleans)
        if array.shape != (length,):
            raise InvalidInput.of(name, f"a list of {length} numbers", f"shape {list(array.shape)}")
        if not np.isfinite(array).all():
            raise InvalidInput.of(name, "finite numbers", "one that is not")
        return array

    async def ask(
        self, quantity: str, scope: Scope, point: Array, sens: Array | None = None, vec: Array | None = None
    ) -> list[float]:
        """One quantity at one point, as a flat list.

        Raises:
            InvalidOutput: it is not finite.
        """
        given = {"inputs": point, "weights": sens, "directions": None if vec is None else vec[None]}
        arrays = {name: array for name, array in given.items() if array is not None}
        shape = Shape(self.served.d, self.served.m, self.served.facts["dtype"], 1)
        question = make_question(arrays, None, quantity, self._dtype, shape)
        deadline_s = self._core.deadline_s(header(scope, b"x-deadline-ms"))
        answer = (await self._core.arrays(self.served, question, deadline_s, scope))[quantity]
        if not np.isfinite(answer).all():
            raise InvalidOutput("expected finite numbers, the model's answer at this point has others")
        return list(answer.astype(np.float64).ravel().tolist())


Operation = Callable[[Call, Scope], Awaitable[dict[str, Any]]]


class Post:
    """POST of one operation. The body is JSON whatever the header says.

    Args:
        core: The service.
        name: The operation's, and its path's.
        operation: What makes the reply.
    """

    def __init__(self, core: Core, name: str, operation: Operation) -> None:
        """Keep them."""
        self._core = core
        self._path = f"/{name}"
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, find the model, answer."""
        scope["hessquik.route"] = self._path
        body = await read_body(scope, receive, self._core.settings.max_body_bytes)
        document = load_json(body)
        if not isinstance(document, dict):
            raise MalformedBody("expected a JSON object, got something else")
        call = Call(self._core, document, b"true" in body or b"false" in body)
        await send_reply(send, Reply(200, JSON, [orjson.dumps(await self._operation(call, scope))]))


async def _model_info(call: Call, scope: Scope) -> dict[str, Any]:
    return {"support": dict.fromkeys(FEATURES, True)}


async def _input_sizes(call: Call, scope: Scope) -> dict[str, Any]:
    return {"inputSizes": [call.served.d]}


async def _output_sizes(call: Call, scope: Scope) -> dict[str, Any]:
    return {"outputSizes": [call.served.m]}


async def _evaluate(call: Call, scope: Scope) -> dict[str, Any]:
    """f(x)."""
    return {"output": [await call.ask("value", scope, call.point())]}


async def _gradient(call: Call, scope: Scope) -> dict[str, Any]:
    """Jᵀ·sens."""
    point = call.point()
    call.check_indices("outWrt", "inWrt")
    return {"output": await call.ask("gradient", scope, point, sens=call.sens())}


async def _apply_jacobian(call: Call, scope: Scope) -> dict[str, Any]:
    """J·vec."""
    point = call.point()
    call.check_indices("outWrt", "inWrt")
    return {"output": await call.ask("jvp", scope, point, vec=call.vec())}


async def _apply_hessian(call: Call, scope: Scope) -> dict[str, Any]:
    """(Σ_k sens_k H_k)·vec."""
    point = call.point()
    call.check_indices("outWrt", "inWrt1", "inWrt2")
    return {"output": await call.ask("hvp", scope, point, sens=call.sens(), vec=call.vec())}
