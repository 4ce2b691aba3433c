"""Tesseract: every served model has the HTTP interface of tesseract-core at ``/tesseract/{model}``.

Protocol: https://docs.pasteurlabs.ai/projects/tesseract-core. The differentiable input is ``x``, (n, d) or (d), the
differentiable output ``value``. Beyond the protocol ``apply`` takes ``outputs``, the quantities that it returns, and
``weights``, (m) or (n, m), with which all results are those of Σ_j weights_j f_j. Arrays are sent as lists of numbers
or in base64; references to files and GPU memory are refused.
"""

from __future__ import annotations

import binascii
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import orjson
from fastapi import APIRouter, Query
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, create_model

from hessquik_client.errors import InvalidInput, NotAcceptable, OutsideDomain, ServiceError
from hessquik_client.quantities import AXES, DIRECTIONAL, TEXTS, quantities_of, row_shapes
from hessquik_client.question import make_question, numbers

from .. import schemas
from ..codecs import Piece, read_shape, shaped
from ..front import Call, Dialect, too_large
from ..http.messages import JSON, Cancel, Head, Reply
from ..http.negotiation import best
from ..repository import Served
from ..routes.operation import Deadline, Direct, ModelName, faults
from ..scheduler import Answers
from ..wire import Array

__all__ = ["DIALECT", "router"]

FORMATS = ("json", "json+base64")
_TYPES = tuple(f"application/{name}" for name in FORMATS)
#: Number types of arrays, by their names in the protocol.
DATATYPES = frozenset(
    {"float16", "float32", "float64"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
#: Places of what a question consists of.
PLACES = {"inputs": "inputs.x", "weights": "inputs.weights", "directions": "tangent_vector.x"}
PLACES |= {"outside": "inputs.outside", "quantities": "inputs.outputs"}
#: Members of an encoded array.
_ARRAY = {"object_type", "shape", "dtype", "data"}


def _write_error(error: ServiceError, request_id: str) -> tuple[int, bytes]:
    """Write an error in FastAPI's format: for invalid input a list with the place of each fault, else one string."""
    status = 422 if error.status == 400 else error.status
    if status != 422:
        return status, orjson.dumps({"detail": error.detail})
    field = str(error.extra.get("field", "body"))
    place = field.split(".") if field.startswith("body") else ["body", *field.split(".")]
    fault = {"type": error.code, "loc": place, "msg": error.detail, "input": None}
    return status, orjson.dumps({"detail": [fault]})


DIALECT = Dialect(JSON, lambda path: path.startswith("/tesseract/"), _write_error)


class Output(NamedTuple):
    """An array of a reply.

    Attributes:
        name: Name in the reply.
        quantity: Name of the quantity.
        shape: Shape in the reply, without axes of length 1 for a single weight or direction.
        within: For a Jacobian, the member of the reply's object that contains it.
    """

    name: str
    quantity: str
    shape: tuple[int, ...]
    within: str = ""


class Body:
    """The body of a request about a model: its arrays, and how those of the reply are encoded.

    Args:
        call: The request, whose model is found and whose JSON object is read.
        endpoint: The endpoint, which determines the members of the object.

    Attributes:
        inputs: The points and the other inputs of the endpoint.
        is_base64: Whether the reply has arrays in base64; by default, whether the first array of the request has.
    """

    def __init__(self, call: Call, endpoint: Endpoint) -> None:
        """Check the members.

        Raises:
            InvalidInput: a member is missing or unknown, or names an input or output that is not differentiable.
        """
        self.call, self.served = call, call.served
        self.is_base64: bool | None = call.target.encoding
        self.inputs = _members("inputs", call.document.get("inputs"), ("x",), ("weights", "outputs", "outside"))
        vector = endpoint.vector[:1] if endpoint.vector else ()
        self._members = _members("body", call.document, ("inputs", *endpoint.named, *vector))
        for name, only in endpoint.named.items():
            if self._members[name] != [only]:
                raise InvalidInput.of(name, f'["{only}"]', "something else")

    def outputs(self) -> list[str]:
        """Return the requested quantities.

        Raises:
            InvalidInput: ``outputs`` is not a list of names of quantities without directions.
        """
        listed = self.inputs.get("outputs", ["value"])
        known = _outputs(self.served)
        if not isinstance(listed, list) or not listed or not all(name in known for name in listed):
            raise InvalidInput.of("inputs.outputs", f"a list of names out of {', '.join(known)}", "something else")
        return listed

    def array(self, name: str, given: Any) -> Array:
        """Return an array from nested lists or an encoded array.

        Raises:
            InvalidInput: ``given`` is not an array, or its encoding is not supported.
        """
        may_be_booleans = self.call.may_be_booleans
        if not isinstance(given, dict):
            return numbers(name, given, may_be_booleans)
        given = _members(name, given, ("shape", "dtype", "data"), ("object_type",))
        data = _members(f"{name}.data", given["data"], ("buffer", "encoding"), ("compression",))
        shape, dtype, encoding = read_shape(f"{name}.shape", given["shape"]), given["dtype"], data["encoding"]
        if encoding not in ("json", "raw", "base64") or data.get("compression") is not None:
            raise InvalidInput.of(f"{name}.data", "the encoding json or base64, without compression", "another one")
        if not isinstance(dtype, str) or dtype not in DATATYPES:
            raise InvalidInput.of(f"{name}.dtype", f"one of {', '.join(DATATYPES)}", "another one")
        if self.is_base64 is None:
            self.is_base64 = encoding == "base64"
        if encoding == "base64":
            array = _decoded(name, data["buffer"], np.dtype(dtype))
        else:
            array = numbers(name, data["buffer"], may_be_booleans).ravel()
        return shaped(name, array, shape)

    def points(self) -> Array:
        """Return the points ``x``."""
        return self.array("inputs.x", self.inputs["x"])

    def weights(self, x: Array) -> Array | None:
        """Return the weights of the outputs, if there are any.

        Raises:
            InvalidInput: their shape does not fit the model and the points.
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
            InvalidInput: the member is not an object with one array of this name and shape.
        """
        array = self.array(f"{member}.{name}", _members(member, self._members[member], (name,))[name])
        if array.shape != shape:
            raise InvalidInput.of(f"{member}.{name}", f"shape {list(shape)}", f"shape {list(array.shape)}")
        return array

    def values(self, names: Sequence[str], x: tuple[int, ...], is_weighted: bool) -> list[Output]:
        """Return the outputs of a reply for quantities at points of shape ``x``."""
        rows = row_shapes(tuple(names), self.served.d, self.served.m, 0, is_weighted)
        return [Output(name, name, (*x[:-1], *row)) for name, row in zip(names, rows, strict=True)]

    def ask(self, form: str, outputs: list[Output], x: Array, **given: Array | None) -> Cancel:
        """Queue the computation of outputs.

        Args:
            form: Form of the text of their numbers, see :class:`~service.scheduler.BatchKey`.
            outputs: The outputs of the reply.
            x: The points.
            given: ``weights`` and ``directions``, if any.
        """
        arrays = {"inputs": x} | {name: array for name, array in given.items() if array is not None}
        quantities, outside = [output.quantity for output in outputs], self.inputs.get("outside")
        try:
            question = make_question(arrays, quantities, None, None, self.call.shape, outside)
        except (InvalidInput, OutsideDomain) as error:
            field = str(error.extra.get("field"))
            place = PLACES.get(field, field)
            detail = error.detail.replace(field, place, 1)
            raise type(error)(detail, **{**error.extra, "field": place}) from None
        is_base64 = bool(self.is_base64)
        return self.call.ask(question, "arrays" if is_base64 else form, partial(_write, is_base64, outputs))


def _write(is_base64: bool, outputs: list[Output], call: Call, answers: Answers) -> Reply:
    """Write the reply, each output as an array of the protocol; in lists, NaN and infinity become null."""
    is_single, separator, pieces = call.question.is_single, b"{", list[Piece]()
    for output in outputs:
        array = orjson.dumps({"object_type": "array", "shape": output.shape, "dtype": call.question.dtype})[:-1]
        opening, closing = (b'{"%b":' % output.within.encode(), b"}") if output.within else (b"", b"")
        pieces.append(b'%b"%b":%b%b,"data":{"buffer":' % (separator, output.name.encode(), opening, array))
        parts, is_jacobian = answers[output.quantity], bool(output.within) and not is_single
        if is_base64:
            whole = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
            whole = _block_diagonal(whole) if is_jacobian else _transposed(whole) if output.within else whole
            pieces += (b'"', b64encode(whole.data), b'"')
        elif is_jacobian:
            pieces += _block_diagonal_lists(output.shape, b",".join(parts))
        else:
            pieces += [b",".join(parts)] if is_single else [b"[", b",".join(parts), b"]"]
        pieces.append(b',"encoding":"%b"}}%b' % (b"base64" if is_base64 else b"json", closing))
        separator = b","
    return Reply(200, _TYPES[is_base64].encode(), [*pieces, b"}"])


def _transposed(gradients: Array) -> Array:
    """Return Jacobians (n, m, d) from gradients (n, d, m)."""
    return np.ascontiguousarray(np.swapaxes(gradients, -1, -2))


def _block_diagonal(gradients: Array) -> Array:
    """Return the Jacobian of a batch (n, m, n, d) from the gradients of its rows (n, d, m)."""
    rows = _transposed(gradients)
    n, m, d = rows.shape
    whole = np.zeros((n, m, n, d), rows.dtype)
    whole[np.arange(n), :, np.arange(n)] = rows
    return whole


def _block_diagonal_lists(shape: tuple[int, ...], rows: bytes) -> list[Piece]:
    """Return the Jacobian of a batch as nested lists of text, from the text of the rows' Jacobians (m, d)."""
    n, m, _, d = shape
    vectors = rows[2:-2].replace(b"]],[[", b"],[").split(b"],[")
    zeros = b"[" + b",".join([b"0.0"] * d) + b"],"
    pieces: list[Piece] = [b"[[["]
    for number, vector in enumerate(vectors):
        row, j = divmod(number, m)
        if number:
            pieces.append(b",[" if j else b"],[[")
        pieces += (zeros * row, b"[", vector, b"]", b"," * (row < n - 1), (zeros * (n - 1 - row))[:-1], b"]")
    return [*pieces, b"]]"]


def _members(place: str, given: Any, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check that ``given`` is an object with all needed members and no unknown ones, and return it.

    Raises:
        InvalidInput: ``given`` is not such an object.
    """
    if not isinstance(given, dict):
        raise InvalidInput.of(place, "an object", "something else")
    if missing := set(needed) - given.keys():
        raise InvalidInput.of(f"{place}.{min(missing)}", "a value", "none")
    if given.keys() - {*needed, *others}:
        raise InvalidInput.of(place, f"only the members {', '.join((*needed, *others))}", "another one")
    return given


def _decoded(name: str, buffer: Any, dtype: np.dtype[Any]) -> Array:
    try:
        data = b64decode(buffer, validate=True)
        return np.frombuffer(data, dtype.newbyteorder("<"))
    except (binascii.Error, ValueError, TypeError):
        raise InvalidInput.of(f"{name}.data.buffer", f"base64 of {dtype.name} numbers", "something else") from None


def _outputs(served: Served) -> list[str]:
    """Return the quantities that ``apply`` can return for a model."""
    return [name for name in quantities_of(served.facts["members"]) if name not in DIRECTIONAL]


def _apply(body: Body) -> Cancel:
    """Evaluate the value, or the quantities in ``outputs``, such as gradient, Hessian, Laplacian."""
    x = body.points()
    weights = body.weights(x)
    return body.ask("json", body.values(body.outputs(), x.shape, weights is not None), x, weights=weights)


def _jacobian(body: Body) -> Cancel:
    """Evaluate ∂value/∂x, of the value's shape followed by that of x; blocks of different rows are 0."""
    x = body.points()
    weights = body.weights(x)
    (value,) = body.values(["value"], x.shape, weights is not None)
    size, most = 8 * x.size * math.prod(value.shape), body.call.core.settings.max_reply_bytes
    if size > most:
        raise too_large(size, most)
    output = Output("value", "gradient", (*value.shape, *x.shape), within="x")
    return body.ask("transposed", [output], x, weights=weights)


def _jacobian_vector_product(body: Body) -> Cancel:
    """Evaluate ∂value/∂x times a vector of the shape of x."""
    x = body.points()
    weights = body.weights(x)
    (value,) = body.values(["value"], x.shape, weights is not None)
    directions = body.vector("tangent_vector", "x", x.shape)[..., None, :]
    return body.ask("vectors", [value._replace(quantity="jvp")], x, weights=weights, directions=directions)


def _vector_jacobian_product(body: Body) -> Cancel:
    """Evaluate a vector of the shape of the value times ∂value/∂x."""
    x = body.points()
    weights = body.weights(x)
    (value,) = body.values(["value"], x.shape, weights is not None)
    cotangent = body.vector("cotangent_vector", "value", value.shape)
    weights = cotangent if weights is None else cotangent.astype(np.float64) * weights  # whole numbers could overflow
    return body.ask("vectors", [Output("x", "gradient", x.shape)], x, weights=weights)


def _abstract_eval(body: Body) -> Reply:
    """Return the shapes and dtypes that ``apply`` would return."""
    d, dtype = body.served.d, body.served.facts["dtype"]
    x = read_shape("inputs.x.shape", _members("inputs.x", body.inputs["x"], ("shape", "dtype"))["shape"])
    if len(x) not in (1, 2) or x[-1] != d:
        raise InvalidInput.of("inputs.x.shape", f"[{d}] or [n, {d}]", "another one")
    outputs = body.values(body.outputs(), x, body.inputs.get("weights") is not None)
    return Reply.of({output.name: {"shape": output.shape, "dtype": dtype} for output in outputs})


class Endpoint(NamedTuple):
    """An endpoint of the protocol for a model.

    Attributes:
        answer: Answers a body.
        reply: The reply's model.
        prefix: Of the members that name the differentiable input and output, if there are any.
        vector: The member with a vector, and the name that it goes by in there.
    """

    answer: Callable[[Body], Reply | Cancel]
    reply: Any
    prefix: str = ""
    vector: tuple[str, str] | None = None

    @property
    def named(self) -> dict[str, str]:
        """Return the members that list names, and the only name in each."""
        return {f"{self.prefix}_inputs": "x", f"{self.prefix}_outputs": "value"} if self.prefix else {}

    def body(self, name: str) -> type[BaseModel]:
        """Return the model of the body."""
        members: dict[str, Any] = {member: (list[Literal[only]], ...) for member, only in self.named.items()}  # type: ignore[valid-type]
        if self.vector is not None:
            member, key = self.vector
            members[member] = (dict[Literal[key], schemas.TesseractArray], ...)  # type: ignore[valid-type]
        doc = self.answer.__doc__
        return create_model(f"Tesseract_{name}", __base__=schemas.TesseractApply, __doc__=doc, **members)


ENDPOINTS = {
    "apply": Endpoint(_apply, schemas.TesseractOutputs),
    "jacobian": Endpoint(_jacobian, schemas.TesseractJacobians, "jac"),
    "jacobian_vector_product": Endpoint(
        _jacobian_vector_product, schemas.TesseractOutputs, "jvp", ("tangent_vector", "x")
    ),
    "vector_jacobian_product": Endpoint(
        _vector_jacobian_product, schemas.TesseractOutputs, "vjp", ("cotangent_vector", "value")
    ),
    "abstract_eval": Endpoint(_abstract_eval, schemas.TesseractShapes),
}


def health(call: Call) -> Reply:
    """Return 200 if the model can be evaluated."""
    call.core.repository.ready(call.target.model, None)
    return Reply.of({"status": "ok"})


def describe(call: Call) -> Reply:
    """Return the OpenAPI document of one model: shapes of arrays, differentiable arrays, and encodings."""
    served = call.core.repository.ready(call.target.model, None)
    d, m, dtype, known = served.d, served.m, served.facts["dtype"], _outputs(served)

    def array(shape: list[int | None], text: str) -> dict[str, Any]:
        return {**_ENCODED, "description": f"{text}, shape {shape}, {dtype}".replace("None", "n")}

    letters = {"d": d, "m": m, "p": d * (d + 1) // 2}
    outputs = {name: array([None, *(letters[axis] for axis in AXES[name])], TEXTS[name]) for name in known}
    inputs = {
        "x": array([None, d], "points, or one of shape [d]"),
        "weights": array([None, m], "everything is that of Σ_j weights_j f_j"),
        "outputs": {"type": "array", "items": {"enum": known}, "default": ["value"]},
        "outside": {"enum": ["allow", "refuse"]},
    }
    components = {
        "Apply_InputSchema": _object(inputs, ["x"]),
        "ApplyInputSchema": {
            **_object({"inputs": {"$ref": "#/components/schemas/Apply_InputSchema"}}),
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
    paths, schemas = _documented()
    return Reply.of(
        {
            "openapi": "3.1.0",
            "info": {"title": served.file.name, "version": str(served.file.version)},
            "paths": paths,
            "components": {"schemas": schemas | components},
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


@cache
def _documented() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the paths of one model and the schemas of their bodies, from FastAPI's document of the routes here."""
    document = get_openapi(title="", version="", routes=router.routes)
    paths = {path.removeprefix("/tesseract/{model}"): methods for path, methods in document["paths"].items()}
    del paths["/openapi.json"]
    for operation in (one for methods in paths.values() for one in methods.values()):
        operation["parameters"] = [one for one in operation["parameters"] if one["in"] != "path"]
    return paths, document["components"]["schemas"]


def _read_head(head: Head, known: frozenset[str]) -> tuple[bool | None, frozenset[str]]:
    """Return whether the client asks for arrays in base64; ``None`` if it does not say.

    Raises:
        NotAcceptable: the client asks for another encoding.
    """
    accept = head.headers.get(b"accept", b"")
    chosen = best(accept, _TYPES) if accept else _TYPES[0]
    if chosen is None:
        raise NotAcceptable(f"expected an Accept header that allows {' or '.join(_TYPES)}")
    return chosen == _TYPES[1] if b"json" in accept else None, known


def _endpoint(name: str, endpoint: Endpoint) -> Direct:
    """Return the route of an endpoint, which parses the body as JSON, whatever its Content-Type."""
    is_abstract = name == "abstract_eval"

    def answer(call: Call) -> Reply | Cancel:
        call.find(call.target.model, call.target.version)
        return call.read(lambda call: endpoint.answer(Body(call, endpoint)), may_have_text=True)

    return Direct(
        f"/tesseract/{{model}}/{name}",
        answer,
        _read_head,
        schemas.TesseractAbstract if is_abstract else endpoint.body(name),
        {"model": ModelName, "run_id": RunId} | ({} if is_abstract else {"x_deadline_ms": Deadline}),
        methods=["POST"],
        name=f"tesseract_{name}",
        summary=name.replace("_", " ").capitalize(),
        text=endpoint.answer.__doc__,
        response_model=endpoint.reply,
        **_OPTIONS,
    )


RunId = Annotated[str | None, Query(description="Names logs, and has no effect here.")]
_OPTIONS: dict[str, Any] = {
    "tags": ["Tesseract"],
    "responses": {
        **faults(schemas.TesseractFaults, 422),
        **faults(schemas.TesseractError, 401, 404, 405, 406, 413, 500, 503, 504),
    },
}

router = APIRouter()
router.routes += [
    *(_endpoint(name, endpoint) for name, endpoint in ENDPOINTS.items()),
    *(
        Direct(
            f"/tesseract/{{model}}/{path}",
            handler,
            parameters={"model": ModelName},
            methods=["GET"],
            name=f"tesseract_{handler.__name__}",
            response_model=dict[str, Any],
            **_OPTIONS,
        )
        for path, handler in (("health", health), ("openapi.json", describe))
    ),
]
