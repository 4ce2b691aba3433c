"""Parsing and writing of bodies of the Open Inference Protocol v2, with the binary tensor extension.

    body = JSON, or JSON + raw tensors in the order of the JSON (little-endian, row-major, without padding);
    Inference-Header-Content-Length is the length of the JSON; 0 means that the body is the single input tensor.

Specification: https://github.com/kserve/open-inference-protocol and Triton's ``extension_binary_data``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from hessquik_client.errors import InvalidInput, MalformedBody
from hessquik_client.quantities import QUANTITIES, quantities_of, row_shapes
from hessquik_client.question import Question, Shape, make_question, numbers

from .codecs import Piece, json_rows, read_shape, shaped
from .http.messages import JSON, Reply
from .wire import Array

__all__ = [
    "DATATYPES",
    "INPUTS",
    "Inference",
    "describe_inputs",
    "describe_outputs",
    "encode",
    "parse",
    "parse_raw",
    "split",
]

#: Tensors of a request: the points, and what may go with them.
INPUTS = ("inputs", "weights", "directions")
#: Names of the protocol's number types; BOOL and BYTES are no numbers.
DATATYPES = {
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    **{f"INT{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
}
_MODEL_DATATYPE = {"float32": "FP32", "float64": "FP64"}
#: Longer time limits are cut to this one.
MAX_TIMEOUT_US = 10**12


@dataclass(frozen=True, slots=True)
class Inference:
    """A parsed request.

    Attributes:
        question: The checked request.
        outputs: The quantities in the order of the reply, each with whether it is sent as binary.
        id: The client's id of the request, which the reply repeats.
        timeout_us: The client's time limit in microseconds; 0 if it set none.
    """

    question: Question
    outputs: Mapping[str, bool]
    id: str | None
    timeout_us: int


def describe_inputs(d: int, m: int, dtype: str) -> list[dict[str, Any]]:
    """Return the input tensors of a model: name, datatype, and shape with −1 for a variable length."""
    shapes = {"inputs": [-1, d], "weights": [-1, m], "directions": [-1, -1, d]}
    return [{"name": name, "datatype": _MODEL_DATATYPE[dtype], "shape": shape} for name, shape in shapes.items()]


def describe_outputs(d: int, m: int, dtype: str, members: int) -> list[dict[str, Any]]:
    """Return the output tensors of a model, as :func:`describe_inputs` does; with weights, m is 1."""
    names = quantities_of(members)
    return [
        {"name": name, "datatype": _MODEL_DATATYPE[dtype], "shape": [-1, *shape]}
        for name, shape in zip(names, row_shapes(names, d, m, -1, False), strict=True)
    ]


def split(body: bytes, json_bytes: bytes) -> tuple[bytes, memoryview]:
    """Split a body into its JSON and the bytes after it.

    Args:
        body: The whole body.
        json_bytes: The header Inference-Header-Content-Length, empty if there is none.

    Raises:
        MalformedBody: the header is not a length within the body.
    """
    length = len(body)
    if json_bytes:
        if not (json_bytes.isdigit() and len(json_bytes) < 12 and int(json_bytes) <= length):
            raise MalformedBody(f"expected Inference-Header-Content-Length from 0 to {length}, got something else")
        length = int(json_bytes)
    return body[:length], memoryview(body)[length:]


def parse(document: Mapping[str, Any], rest: memoryview, may_be_booleans: bool, shape: Shape) -> Inference:
    """Parse a request and check it against a model.

    Args:
        document: The JSON object; long lists may be arrays already.
        rest: The bytes after the JSON.
        may_be_booleans: Whether the JSON may hold booleans, which numpy would convert to numbers.
        shape: The sizes and limits of the model.

    Raises:
        InvalidInput: the request is malformed or does not fit the model.
    """
    arrays = _read_inputs(document.get("inputs"), rest, may_be_booleans)
    parameters = _object(document, "parameters")
    outputs = _read_outputs(document.get("outputs"), _flag(parameters, "binary_data_output", False))
    request_id = document.get("id")
    if not isinstance(request_id, str | None) or not _is_text(request_id):
        raise InvalidInput.of("id", "a string", "something else")
    timeout_us = parameters.get("timeout", 0)
    if isinstance(timeout_us, bool) or not isinstance(timeout_us, int) or timeout_us < 0:
        raise InvalidInput.of("parameters.timeout", "a whole number of microseconds", "something else")
    given = parameters.get
    question = make_question(arrays, list(outputs), None, given("dtype"), shape, given("outside"))
    return Inference(question, outputs, request_id or None, min(timeout_us, MAX_TIMEOUT_US))


def encode(model: str, version: str, m: int, inference: Inference, answers: Mapping[str, Sequence[Any]]) -> Reply:
    """Write the reply.

    Args:
        model: The model's name.
        version: Its version.
        m: Its outputs.
        inference: The request.
        answers: Per quantity, consecutive pieces of rows: arrays, or flat text if no output is sent as binary.
    """
    question = inference.question
    head: list[Piece] = [b'{"model_name":%b,"model_version":%b,"outputs":[' % (_text(model), _text(version))]
    tensors: list[Piece] = []
    separator = b""
    for name, is_binary in inference.outputs.items():
        dims = _dims(name, question, m)
        given = (separator, _text(name), _MODEL_DATATYPE[question.dtype].encode(), _text(dims))
        head.append(b'%b{"name":%b,"datatype":"%b","shape":%b,' % given)
        separator = b","
        parts = answers[name]
        if is_binary:
            size = math.prod(dims) * np.dtype(question.dtype).itemsize
            head.append(b'"parameters":{"binary_data_size":%d}}' % size)
            tensors += [np.ascontiguousarray(part).reshape(-1).view(np.uint8).data for part in parts]
            continue
        head.append(b'"data":[')
        for part in parts:
            text = json_rows(np.ascontiguousarray(part, np.float64).ravel()) if isinstance(part, np.ndarray) else part
            head += (text, b",")
        head[-1] = b"]}"
    head.append(b"]}" if inference.id is None else b'],"id":%b}' % _text(inference.id))
    if not tensors:
        return Reply(200, JSON, head)
    length = (b"inference-header-content-length", b"%d" % sum(map(len, head)))
    return Reply(200, b"application/octet-stream", [*head, *tensors], [length])


def _dims(name: str, question: Question, m: int) -> list[int]:
    """Return the shape of an output."""
    n, d = question.inputs.shape
    k = 0 if question.directions is None else question.directions.shape[1]
    (row,) = row_shapes((name,), d, m, k, question.weights is not None)
    return [*row] if question.is_single else [n, *row]


def _text(value: Any) -> bytes:
    return orjson.dumps(value)


def _is_text(value: str | None) -> bool:
    """Return whether a string has no lone surrogates, which JSON can escape and UTF-8 cannot hold."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_raw(body: bytes, shape: Shape) -> Inference:
    """Parse a body that holds only points in the model's own dtype; the answer is the value, as binary."""
    item_type = np.dtype(shape.dtype).newbyteorder("<")
    row_bytes = shape.d * item_type.itemsize
    if not body or len(body) % row_bytes:
        raise InvalidInput.of(
            "inputs",
            f"points of {row_bytes} bytes each ({shape.d} numbers of {shape.dtype})",
            f"{len(body)} bytes",
        )
    points = np.frombuffer(body, item_type).reshape(-1, shape.d)
    return Inference(make_question({"inputs": points}, None, None, None, shape), {"value": True}, None, 0)


def _read_inputs(listed: Any, rest: memoryview, may_be_booleans: bool) -> dict[str, Array]:
    """Return the tensors of a request by name, from its JSON and from the bytes after it."""
    if not isinstance(listed, list) or not all(isinstance(tensor, dict) for tensor in listed):
        raise InvalidInput.of("inputs", "a list of tensors", "something else")
    arrays: dict[str, Array] = {}
    for tensor in listed:
        name = tensor.get("name")
        if name not in INPUTS or name in arrays:
            raise InvalidInput.of("inputs", f"the tensors {', '.join(INPUTS)}, each once", "something else")
        if str(tensor.get("datatype")) not in DATATYPES:
            raise InvalidInput.of(name, f"a datatype out of {', '.join(DATATYPES)}", "another one")
        item_type, dims = np.dtype(DATATYPES[tensor["datatype"]]), read_shape(name, tensor.get("shape"), 1)
        parameters = _object(tensor, "parameters")
        if any(parameter.startswith("shared_memory") for parameter in parameters):
            raise InvalidInput.of(name, "data in the request", "shared memory, which is not served")
        size = parameters.get("binary_data_size")
        if size is None:
            array = numbers(name, tensor.get("data"), may_be_booleans).ravel()
        else:
            expected = math.prod(dims) * item_type.itemsize
            if type(size) is not int or size != expected or size > len(rest) or "data" in tensor:
                raise InvalidInput.of(name, f"{expected} bytes of binary data and no other data", "something else")
            array, rest = np.frombuffer(rest[:size], item_type), rest[size:]
        arrays[name] = shaped(name, array, dims)
    if rest:
        raise InvalidInput.of("body", "no bytes after the last binary tensor", f"{len(rest)}")
    return arrays


def _read_outputs(listed: Any, is_binary: bool) -> dict[str, bool]:
    """Return the requested quantities, each with whether it is sent as binary; ``value`` if none is named."""
    if listed is None or listed == []:
        return {"value": is_binary}
    if not isinstance(listed, list) or not all(isinstance(output, dict) for output in listed):
        raise InvalidInput.of("outputs", "a list of objects with a name", "something else")
    outputs: dict[str, bool] = {}
    for output in listed:
        name, parameters = output.get("name"), _object(output, "parameters")
        if name not in QUANTITIES or name in outputs:
            raise InvalidInput.of("outputs", f"names out of {', '.join(QUANTITIES)}, each once", "something else")
        if parameters.get("classification") or any(key.startswith("shared_memory") for key in parameters):
            raise InvalidInput.of(name, "no parameter but binary_data", "classification or shared memory")
        outputs[name] = _flag(parameters, "binary_data", is_binary)
    return outputs


def _object(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a member that must be an object; an empty object if it is missing."""
    member = document.get(name)
    if member is None:
        return {}
    if not isinstance(member, dict):
        raise InvalidInput.of(name, "an object", "something else")
    return member


def _flag(parameters: Mapping[str, Any], name: str, otherwise: bool) -> bool:
    flag = parameters.get(name, otherwise)
    if not isinstance(flag, bool):
        raise InvalidInput.of(name, "true or false", "something else")
    return flag
