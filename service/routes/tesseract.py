"""Tesseract: every served model speaks the HTTP interface of tesseract-core, at ``/tesseract/{model}``.

Protocol: https://docs.pasteurlabs.ai/projects/tesseract-core. The differentiable input is ``x``, (n, d) or (d), the
differentiable output ``value``. Beyond the protocol ``apply`` takes ``outputs``, the quantities that it returns, and
``weights``, (m) or (n, m), with which everything is that of Σ_j weights_j f_j. Arrays come and go as lists of numbers
or in base64; files and GPU handles, by which others name what lies elsewhere, are refused.
"""

from __future__ import annotations

import binascii
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
from fastapi import APIRouter

from hessquik_client.errors import InvalidInput, NotAcceptable, OutsideDomain, ReplyTooLarge, ServiceError
from hessquik_client.quantities import AXES, DIRECTIONAL, TEXTS, quantities_of, row_shapes
from hessquik_client.question import make_question
from service import schemas
from service.http.messages import JSON, Cancel, Head, Reply, Request
from service.http.negotiation import best
from service.json_reader import numbers
from service.repository import Served
from service.routes.operation import Deadline, Dialect, Direct, ModelName, read_query, with_object
from service.wire import Array

if TYPE_CHECKING:
    from service.app import Application

__all__ = ["DIALECT", "router"]

FORMATS = ("json", "json+base64")
_TYPES = tuple(f"application/{name}" for name in FORMATS)
#: Number types of arrays, by their names in the protocol.
DATATYPES = frozenset(
    {"float16", "float32", "float64"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
_MAX_RANK = 3
#: Places of what a question consists of.
PLACES = {"inputs": "inputs.x", "weights": "inputs.weights", "directions": "tangent_vector.x"}
PLACES |= {"outside": "inputs.outside", "quantities": "inputs.outputs"}
#: Members of an encoded array.
_ARRAY = {"object_type", "shape", "dtype", "data"}


def _write_error(error: ServiceError, request_id: str) -> tuple[int, bytes]:
    """Write an error as FastAPI does: of what does not fit, a list with the place of each fault; else one string."""
    status = 422 if error.status == 400 else error.status
    if status != 422:
        return status, orjson.dumps({"detail": error.detail})
    field = str(error.extra.get("field", "body"))
    place = field.split(".") if field.startswith("body") else ["body", *field.split(".")]
    fault = {"type": error.code, "loc": place, "msg": error.detail, "input": None}
    return status, orjson.dumps({"detail": [fault]})


DIALECT = Dialect(JSON, lambda path: path.startswith("/tesseract/"), _write_error)


class Asked(NamedTuple):
    """A request's model, encoding and time.

    Attributes:
        model: From the path.
        is_base64: Whether arrays are wanted in base64; ``None`` for as they come.
        time_s: For the whole request.
    """

    model: str
    is_base64: bool | None
    time_s: float


class Call:
    """A request about a model.

    Args:
        application: What answers.
        request: The request.
        document: Its body.
        may_be_booleans: Whether the body may hold any, which numpy would take for numbers.
    """

    def __init__(
        self, application: Application, request: Request, document: dict[str, Any], may_be_booleans: bool
    ) -> None:
        """Find the model.

        Raises:
            ModelNotFound: there is none of this name.
            InvalidInput: the inputs are no object of known members.
        """
        asked: Asked = request.head.target.asked
        self.served: Served = application.core.repository.ready(asked.model, None)
        request.model = self.served.file.name
        self._application, self._request, self._document = application, request, document
        self._may_be_booleans = may_be_booleans
        self._is_base64 = asked.is_base64
        self.inputs = _members("inputs", document.get("inputs"), ("x",), ("weights", "outputs", "outside"))

    def expect(self, *members: str) -> None:
        """Expect the body to have these members and no others.

        Raises:
            InvalidInput: it has not.
        """
        _members("body", self._document, members)

    def expect_names(self, kind: str) -> None:
        """Expect the only differentiable input and output to be named.

        Raises:
            InvalidInput: others are, or none.
        """
        for member, only in ((f"{kind}_inputs", "x"), (f"{kind}_outputs", "value")):
            if self._document[member] != [only]:
                raise InvalidInput.of(member, f'["{only}"]', "something else")

    def outputs(self) -> list[str]:
        """Return the quantities that are asked for.

        Raises:
            InvalidInput: they are not names of quantities without directions.
        """
        listed = self.inputs.get("outputs", ["value"])
        known = _outputs(self.served)
        if not isinstance(listed, list) or not listed or not all(name in known for name in listed):
            raise InvalidInput.of("inputs.outputs", f"a list of names out of {', '.join(known)}", "something else")
        return listed

    def array(self, name: str, given: Any) -> Array:
        """Return an array that came as lists, or encoded; a reply is encoded as the first of a request.

        Raises:
            InvalidInput: it is none, or in a form that is not served.
        """
        if not isinstance(given, dict):
            return numbers(name, given, self._may_be_booleans)
        given = _members(name, given, ("shape", "dtype", "data"), ("object_type",))
        data = _members(f"{name}.data", given["data"], ("buffer", "encoding"), ("compression",))
        shape, dtype, encoding = _shape(name, given["shape"]), given["dtype"], data["encoding"]
        if encoding not in ("json", "raw", "base64") or data.get("compression") is not None:
            raise InvalidInput.of(f"{name}.data", "the encoding json or base64, without compression", "another one")
        if not isinstance(dtype, str) or dtype not in DATATYPES:
            raise InvalidInput.of(f"{name}.dtype", f"one of {', '.join(DATATYPES)}", "another one")
        if self._is_base64 is None:
            self._is_base64 = encoding == "base64"
        if encoding == "base64":
            array = _decoded(name, data["buffer"], np.dtype(dtype))
        else:
            array = numbers(name, data["buffer"], self._may_be_booleans).ravel()
        if array.size != math.prod(shape):
            raise InvalidInput.of(name, f"{math.prod(shape)} numbers for its shape", f"{array.size}")
        return array.reshape(shape)

    def points(self) -> Array:
        """Return x."""
        return self.array("inputs.x", self.inputs["x"])

    def weights(self, x: Array) -> Array | None:
        """Return the weights of the outputs, if there are any.

        Raises:
            InvalidInput: they do not fit the model and the points.
        """
        given, m = self.inputs.get("weights"), self.served.m
        if given is None:
            return None
        array = self.array("inputs.weights", given)
        if array.shape not in ((m,), (*x.shape[:-1], m)):
            shapes = f"shape [{m}] or {[*x.shape[:-1], m]}"
            raise InvalidInput.of("inputs.weights", shapes, f"shape {list(array.shape)}")
        return array

    def vector(self, member: str, name: str, shape: tuple[int, ...]) -> Array:
        """Return a tangent or cotangent vector.

        Raises:
            InvalidInput: it is not one array of this name and shape.
        """
        array = self.array(f"{member}.{name}", _members(member, self._document[member], (name,))[name])
        if array.shape != shape:
            raise InvalidInput.of(f"{member}.{name}", f"shape {list(shape)}", f"shape {list(array.shape)}")
        return array

    def ask(
        self, quantities: list[str], x: Array, write: Callable[[dict[str, Array]], Any], **given: Array | None
    ) -> Cancel:
        """Ask for quantities; ``write`` makes the reply of their arrays, which have no n axis for a single point."""
        arrays = {name: array for name, array in given.items() if array is not None}
        outside, shape = self.inputs.get("outside"), self._application.core.shape(self.served)
        try:
            question = make_question({"inputs": x, **arrays}, quantities, None, None, shape, outside)
        except (InvalidInput, OutsideDomain) as error:
            field = str(error.extra.get("field"))
            place = PLACES.get(field, field)
            detail = error.detail.replace(field, place, 1)
            raise type(error)(detail, **{**error.extra, "field": place}) from None

        def reply(answers: Mapping[str, Any]) -> Reply:
            whole = {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in answers.items()}
            found = write({name: array[0] if question.is_single else array for name, array in whole.items()})
            text = orjson.dumps(self._encoded(found), option=orjson.OPT_SERIALIZE_NUMPY)
            return Reply(200, _TYPES[bool(self._is_base64)].encode(), [text])

        deadline_s = self._request.began_s + self._request.head.target.asked.time_s
        return self._application.ask(self._request, self.served, question, "arrays", deadline_s, reply)

    def expect_room(self, floats: int) -> None:
        """Refuse a reply of so many numbers if it is larger than may be.

        Raises:
            ReplyTooLarge: it would be.
        """
        size, most = 8 * floats, self._application.core.settings.max_reply_bytes
        if size > most:
            raise ReplyTooLarge(
                f"expected a reply of at most {most} bytes, got {size}", limit_bytes=most, reply_bytes=size
            )

    def _encoded(self, found: Any) -> Any:
        """Return arrays, and objects of arrays, as the protocol has them; JSON has null where it has no number."""
        if isinstance(found, dict):
            return {name: self._encoded(value) for name, value in found.items()}
        array: Array = np.ascontiguousarray(found)
        data = {"buffer": array.astype(np.float64), "encoding": "json"}
        if self._is_base64:
            data = {"buffer": b64encode(array.data).decode(), "encoding": "base64"}
        return {"object_type": "array", "shape": array.shape, "dtype": array.dtype.name, "data": data}


def _members(place: str, given: Any, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return an object with the members that it needs and none that are unknown.

    Raises:
        InvalidInput: it is none.
    """
    if not isinstance(given, dict):
        raise InvalidInput.of(place, "an object", "something else")
    if missing := set(needed) - given.keys():
        raise InvalidInput.of(f"{place}.{min(missing)}", "a value", "none")
    if given.keys() - {*needed, *others}:
        raise InvalidInput.of(place, f"only the members {', '.join((*needed, *others))}", "another one")
    return given


def _shape(name: str, listed: Any) -> tuple[int, ...]:
    is_shape = isinstance(listed, list) and len(listed) <= _MAX_RANK
    if not is_shape or not all(type(size) is int and 0 <= size < 1 << 40 for size in listed):
        raise InvalidInput.of(f"{name}.shape", f"at most {_MAX_RANK} whole numbers", "something else")
    return tuple(listed)


def _decoded(name: str, buffer: Any, dtype: np.dtype[Any]) -> Array:
    try:
        data = b64decode(buffer, validate=True)
        return np.frombuffer(data, dtype.newbyteorder("<"))
    except (binascii.Error, ValueError, TypeError):
        raise InvalidInput.of(f"{name}.data.buffer", f"base64 of {dtype.name} numbers", "something else") from None


def _outputs(served: Served) -> list[str]:
    """Return the quantities that ``apply`` has."""
    return [name for name in quantities_of(served.facts["members"]) if name not in DIRECTIONAL]


def _shapes(served: Served, names: list[str], x: tuple[int, ...], is_weighted: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of quantities at points of a shape."""
    rows = row_shapes(tuple(names), served.d, served.m, 0, is_weighted)
    return {name: (*x[:-1], *row) for name, row in zip(names, rows, strict=True)}


def _apply(call: Call) -> Cancel:
    """The value, or what ``outputs`` names, such as gradient, Hessian, Laplacian; ``weights`` as everywhere."""
    call.expect("inputs")
    x, outputs = call.points(), call.outputs()
    return call.ask(outputs, x, lambda found: {name: found[name] for name in outputs}, weights=call.weights(x))


def _jacobian(call: Call) -> Cancel:
    """∂value/∂x, of the value's shape followed by that of x; rows of a batch do not depend on each other."""
    call.expect("inputs", "jac_inputs", "jac_outputs")
    call.expect_names("jac")
    x = call.points()
    weights = call.weights(x)
    call.expect_room(x.size * math.prod(_shapes(call.served, ["value"], x.shape, weights is not None)["value"]))

    def write(found: dict[str, Array]) -> Any:
        rows = np.swapaxes(found["gradient"], -1, -2)
        if rows.ndim == 2:
            return {"value": {"x": rows}}
        n, m, d = rows.shape
        whole = np.zeros((n, m, n, d), rows.dtype)
        whole[np.arange(n), :, np.arange(n)] = rows
        return {"value": {"x": whole}}

    return call.ask(["gradient"], x, write, weights=weights)


def _jacobian_vector_product(call: Call) -> Cancel:
    """∂value/∂x times a vector of the shape of x."""
    call.expect("inputs", "jvp_inputs", "jvp_outputs", "tangent_vector")
    call.expect_names("jvp")
    x = call.points()
    directions = call.vector("tangent_vector", "x", x.shape)[..., None, :]
    return call.ask(
        ["jvp"], x, lambda found: {"value": found["jvp"][..., 0, :]}, weights=call.weights(x), directions=directions
    )


def _vector_jacobian_product(call: Call) -> Cancel:
    """A vector of the shape of the value times ∂value/∂x."""
    call.expect("inputs", "vjp_inputs", "vjp_outputs", "cotangent_vector")
    call.expect_names("vjp")
    x = call.points()
    weights = call.weights(x)
    shape = _shapes(call.served, ["value"], x.shape, weights is not None)["value"]
    cotangent = call.vector("cotangent_vector", "value", shape)
    weights = cotangent if weights is None else cotangent * weights
    return call.ask(["gradient"], x, lambda found: {"x": found["gradient"][..., 0]}, weights=weights)


def _abstract_eval(call: Call) -> Reply:
    """The shapes and types that ``apply`` would return."""
    call.expect("inputs")
    d, dtype = call.served.d, call.served.facts["dtype"]
    x = _shape("inputs.x", _members("inputs.x", call.inputs["x"], ("shape", "dtype"))["shape"])
    if len(x) not in (1, 2) or x[-1] != d:
        raise InvalidInput.of("inputs.x.shape", f"[{d}] or [n, {d}]", "another one")
    shapes = _shapes(call.served, call.outputs(), x, call.inputs.get("weights") is not None)
    return _reply({name: {"shape": shape, "dtype": dtype} for name, shape in shapes.items()})


def health(application: Application, request: Request) -> Reply:
    """Say that the model can be asked."""
    application.core.repository.ready(request.head.target.asked["model"], None)
    return _reply({"status": "ok"})


def describe(application: Application, request: Request) -> Reply:
    """The OpenAPI document of one model: its arrays' shapes, what can be differentiated, and the encodings."""
    served = application.core.repository.ready(request.head.target.asked["model"], None)
    d, m, dtype, known = served.d, served.m, served.facts["dtype"], _outputs(served)

    def array(shape: list[int | None], text: str) -> dict[str, Any]:
        return {**_ENCODED, "description": f"{text}, shape {shape}, {dtype}".replace("None", "n")}

    def named(prefix: str) -> dict[str, Any]:
        one = {"type": "array", "minItems": 1, "maxItems": 1}
        return {
            f"{prefix}_inputs": {**one, "items": {"const": "x"}},
            f"{prefix}_outputs": {**one, "items": {"const": "value"}},
        }

    letters = {"d": d, "m": m, "p": d * (d + 1) // 2}
    outputs = {name: array([None, *(letters[axis] for axis in AXES[name])], TEXTS[name]) for name in known}
    inputs = {
        "x": array([None, d], "points, or one of shape [d]"),
        "weights": array([None, m], "everything is that of Σ_j weights_j f_j"),
        "outputs": {"type": "array", "items": {"enum": known}, "default": ["value"]},
        "outside": {"enum": ["allow", "refuse"]},
    }
    given = {"inputs": {"$ref": "#/components/schemas/Apply_InputSchema"}}
    vectors = {"tangent_vector": _object({"x": _ENCODED}), "cotangent_vector": _object({"value": _ENCODED})}
    bodies = {
        "apply": given,
        "jacobian": {**given, **named("jac")},
        "jacobian_vector_product": {**given, **named("jvp"), "tangent_vector": vectors["tangent_vector"]},
        "vector_jacobian_product": {**given, **named("vjp"), "cotangent_vector": vectors["cotangent_vector"]},
        "abstract_eval": {"inputs": {"type": "object"}},
    }
    replies = {"apply": {"$ref": "#/components/schemas/ApplyOutputSchema"}}
    schemas = {
        "Apply_InputSchema": _object(inputs, ["x"]),
        "ApplyInputSchema": {
            **_object(given),
            "differentiable_arrays": {"x": {"dtype": dtype, "shape": [None, d]}},
            "field_order": {"": list(inputs)},
        },
        "Apply_OutputSchema": _object(outputs, []),
        "ApplyOutputSchema": {
            "$ref": "#/components/schemas/Apply_OutputSchema",
            "differentiable_arrays": {"value": {"dtype": dtype, "shape": [None, m]}},
            "field_order": {"": list(outputs)},
        },
    }
    paths = {
        f"/{name}": {"post": _operation(_object(body), replies.get(name, {"type": "object"}))}
        for name, body in bodies.items()
    }
    return _reply(
        {
            "openapi": "3.1.0",
            "info": {"title": served.file.name, "version": str(served.file.version)},
            "paths": {**paths, "/health": {"get": _operation(None, {"type": "object"})}},
            "components": {"schemas": schemas},
            "x-supported-output-formats": FORMATS,
            "x-supported-gpu-transports": ["none"],
            "x-supported-compressions": ["none"],
        }
    )


_ENCODED: dict[str, Any] = {
    "type": "object",
    "required": ["shape", "dtype", "data"],
    "properties": {"shape": {"type": "array"}, "dtype": {"enum": sorted(DATATYPES)}, "data": {"type": "object"}},
}


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _operation(body: dict[str, Any] | None, reply: dict[str, Any]) -> dict[str, Any]:
    given = {} if body is None else {"requestBody": {"content": {"application/json": {"schema": body}}}}
    return {**given, "responses": {"200": {"content": {"application/json": {"schema": reply}}}}}


def _reply(document: Mapping[str, Any]) -> Reply:
    return Reply(200, JSON, [orjson.dumps(document)])


def _post(operation: Callable[[Call], Reply | Cancel], application: Application, request: Request) -> Reply | Cancel:
    """Read the body, which is JSON whatever the header says, and find the model."""

    def go_on(document: dict[str, Any], may_be_booleans: bool) -> Reply | Cancel:
        return operation(Call(application, request, document, may_be_booleans))

    return with_object(application, request, go_on, may_have_text=True)


def _read_head(application: Application, head: Head, names: Mapping[str, str]) -> Asked:
    """Read the time for the request and the encoding of the reply; ``run_id``, which names logs, has no effect."""
    read_query(head.query, {"run_id"})
    time_s = application.core.time_ms(head.headers.get(b"x-deadline-ms", b"")) / 1000
    accept = head.headers.get(b"accept", b"")
    chosen = best(accept, _TYPES) if accept else _TYPES[0]
    if chosen is None:
        raise NotAcceptable(f"expected to be asked for {' or '.join(_TYPES)}")
    return Asked(names["model"], chosen == _TYPES[1] if b"json" in accept else None, time_s)


def _parameters(model: ModelName, x_deadline_ms: Deadline = None) -> None:
    """The parameters of every operation."""


def _model(model: ModelName) -> None:
    """The parameter of what has no body."""


_FAULTS: dict[int | str, dict[str, Any]] = {
    422: {"model": schemas.TesseractFaults, "description": "Something does not fit."},
    **{
        status: {"model": schemas.TesseractError, "description": description}
        for status, description in {
            401: "A key is missing.",
            404: "There is no such model.",
            405: "The method is another one.",
            406: "The encoding is not one that is served.",
            413: "Request or reply are too large.",
            500: "The network could not be evaluated.",
            503: "The service is busy or not ready.",
            504: "There was no answer in time.",
        }.items()
    },
}
_OPERATIONS: dict[str, tuple[Callable[[Call], Reply | Cancel], Any, Any]] = {
    "apply": (_apply, schemas.TesseractApply, schemas.TesseractOutputs),
    "jacobian": (_jacobian, schemas.TesseractJacobian, schemas.TesseractJacobians),
    "jacobian_vector_product": (_jacobian_vector_product, schemas.TesseractJvp, schemas.TesseractOutputs),
    "vector_jacobian_product": (_vector_jacobian_product, schemas.TesseractVjp, schemas.TesseractOutputs),
    "abstract_eval": (_abstract_eval, schemas.TesseractAbstract, schemas.TesseractShapes),
}
_OPTIONS: dict[str, Any] = {"tags": ["Tesseract"], "responses": _FAULTS}

router = APIRouter()
router.routes += [
    *(
        Direct(
            f"/tesseract/{{model}}/{name}",
            partial(_post, operation),
            _read_head,
            body,
            _parameters,
            methods=["POST"],
            name=f"tesseract_{name}",
            operation_id=f"tesseract_{name}",
            summary=name.replace("_", " ").capitalize(),
            text=operation.__doc__,
            response_model=reply,
            **_OPTIONS,
        )
        for name, (operation, body, reply) in _OPERATIONS.items()
    ),
    *(
        Direct(
            f"/tesseract/{{model}}/{path}",
            handler,
            parameters=_model,
            methods=["GET"],
            name=f"tesseract_{handler.__name__}",
            operation_id=f"tesseract_{handler.__name__}",
            response_model=dict[str, Any],
            **_OPTIONS,
        )
        for path, handler in (("health", health), ("openapi.json", describe))
    ),
]
