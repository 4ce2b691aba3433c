"""Reader of ONNX graphs, which are interpreted on a fixed number of rows; onnx's reference evaluates constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessquik.activations import softplusActivation
from hessquik.errors import FormatError, UnsupportedError
from hessquik.importing import onnx_operations as operations
from hessquik.importing.graph import Affine, Node, Pointwise, refuse
from hessquik.importing.interpreting import (
    Features,
    apply_affine,
    as_float64,
    features_in,
    maximum,
    minimum,
    multiply,
    readable,
    rectify,
)
from hessquik.importing.torch_operations import POINTWISE as TORCH

__all__ = ["HANDLERS", "Signature", "expect_known", "read", "signature"]

#: Rows where the model leaves their number open.
ROWS = 7


@dataclass(frozen=True, slots=True)
class Signature:
    """The input and the output of a model.

    Attributes:
        input: Name of the input.
        output: Name of the output.
        shape: Of the input, rows first.
        dtype: Of the input.
        takes_any_rows: Whether the number of rows may differ from that of the shape.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    takes_any_rows: bool

    @property
    def width(self) -> int:
        """Number of inputs of a point."""
        return int(torch.Size(self.shape[1:]).numel())


def signature(model: Any, d: int | None = None) -> Signature:
    """Return the input and the output of a model.

    Args:
        model: The model.
        d: Number of inputs, where the model leaves it open.

    Raises:
        UnsupportedError: the model has several inputs or outputs, or they are not arrays of real numbers.
    """
    import onnx

    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in constants]
    for what, found in (("input", inputs), ("output", model.graph.output)):
        if len(found) != 1:
            names = ", ".join(each.name for each in found)
            raise UnsupportedError(
                f"the model must have one {what}, an array (n, {'d' if what == 'input' else 'm'}), got {len(found)} "
                f"({names:.200}); export it with one"
            )
    kind = inputs[0].type.tensor_type
    types = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.DOUBLE: torch.float64}
    if kind.elem_type not in types:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise UnsupportedError(
            f"input {inputs[0].name} must hold real numbers, since derivatives with respect to others do not exist, "
            f"got {name}"
        )
    sizes = [size.dim_value for size in kind.shape.dim]
    if len(sizes) == 2 and not sizes[1] and d is not None:
        sizes[1] = d
    if len(sizes) < 2 or not all(sizes[1:]):
        raise UnsupportedError(
            f"input {inputs[0].name} must have the shape (n, d) with a number for d, got {sizes or 'none'}; pass "
            "example_input, or export the model with a fixed number of inputs"
        )
    shape = (sizes[0] or ROWS, *sizes[1:])
    return Signature(inputs[0].name, model.graph.output[0].name, shape, types[kind.elem_type], not sizes[0])


def expect_known(model: Any, what: Signature) -> None:
    """Refuse a model with an operator that cannot be exact, before anything of it is computed.

    Raises:
        UnsupportedError: it has one that depends on the input.
    """
    dependent = {what.input}
    for number, node in enumerate(model.graph.node):
        if node.op_type != "Shape" and not dependent.isdisjoint(node.input):
            call = _Node(node, number, model.opset_import)
            if not call.is_known:
                raise _unknown(call)
            dependent |= set(node.output)


def read(model: Any, what: Signature, point: Node) -> Node:
    """Return a model's output as a value of a graph, from the value that it takes.

    Raises:
        FormatError: a tensor is not what it says, or a node takes what nothing before it gives.
        UnsupportedError: the model does something that cannot be exact here.
    """
    values: dict[str, Any] = {"": None}
    for tensor in model.graph.initializer:
        values[tensor.name] = _weights(tensor)
    values[what.input] = Features(point, what.shape[1:])
    for number, node in enumerate(model.graph.node):
        call = _Node(node, number, model.opset_import)
        missing = [name for name in node.input if name not in values]
        if missing:
            raise FormatError(
                f"node {call.place}: the model must have a value named {missing[0]!r} before it is used"
            )
        args = [values[name] for name in node.input]
        with readable(call.place):
            result = _interpret(call, args, what.shape[0]) if _depends(args) else call.compute(*args)
        results = result if isinstance(result, list | tuple) else [result]
        values.update(zip(node.output, results, strict=False))  # Dropout's mask and the like are left out
    output = values.get(what.output)
    if not isinstance(output, Features):
        raise refuse(what.output, "does not depend on the input", "return what the network computes of it")
    return output.node


def _weights(tensor: Any) -> Tensor:
    """Return the numbers of a tensor.

    Raises:
        FormatError: its type, its shape and its bytes do not belong together.
    """
    from onnx import numpy_helper

    try:
        weights: Tensor = as_float64(torch.as_tensor(numpy_helper.to_array(tensor).copy()))
    except Exception as error:  # any error that a damaged file causes
        name = tensor.name[:64]
        raise FormatError(f"tensor {name!r} must have numbers of its type and shape ({str(error)[:100]})") from None
    return weights


class _Node:
    """One node of a graph."""

    def __init__(self, node: Any, number: int, opsets: Sequence[Any]) -> None:
        """Keep the node and the versions of the operators."""
        import onnx

        self.node, self.opsets = node, opsets
        self.attributes: Mapping[str, Any] = {
            each.name: _text(onnx.helper.get_attribute_value(each)) for each in node.attribute
        }
        self.operator: str = node.op_type
        self.version = next((each.version for each in opsets if each.domain == node.domain), 1)
        self.is_standard = node.domain in {"", "ai.onnx"} or node.domain.startswith("ai.onnx.")
        self.place = f"{node.name or number} ({node.domain + '.' if node.domain else ''}{node.op_type})"
        self._run: Callable[..., Any] | None = None

    @property
    def is_known(self) -> bool:
        """Return True if there is a way to interpret the operator."""
        tables = (HANDLERS, operations.POINTWISE, operations.ADDITIVE)
        return self.is_standard and any(self.operator in table for table in tables)

    def compute(self, *args: Any) -> Any:
        """Evaluate the node on tensors, with the reference implementation of the standard."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        if not self.is_standard or self.operator in {"If", "Loop", "Scan"}:
            raise _unknown(self)
        if self.operator in _PRECISE:
            return _PRECISE[self.operator](*args)
        if self._run is None:
            names = dict.fromkeys(name for name in self.node.input if name)
            inputs = [onnx.ValueInfoProto(name=name) for name in names]
            outputs = [onnx.ValueInfoProto(name=name) for name in self.node.output if name]
            graph = onnx.helper.make_graph([self.node], "node", inputs, outputs)
            model = onnx.helper.make_model(graph, opset_imports=self.opsets)
            self._run = ReferenceEvaluator(model).run
        feeds = {
            name: arg.numpy() for name, arg in zip(self.node.input, args, strict=True) if name and arg is not None
        }
        results = [as_float64(torch.tensor(np.asarray(result).copy())) for result in self._run(None, feeds)]
        return results[0] if len(results) == 1 else results


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The comparison z > t, which is accepted only as a part of torch's exported softplus.

    Attributes:
        call: The node.
        node: z.
        bound: t.
    """

    call: _Node
    node: Node
    bound: float


def _depends(args: Sequence[Any]) -> bool:
    return bool(features_in(args)) or any(isinstance(arg, _Comparison) for arg in args)


#: Operators that the reference implementation computes to few digits.
_PRECISE: dict[str, Callable[[Tensor], Tensor]] = {"Erf": torch.erf, "Gelu": torch.nn.functional.gelu}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _unknown(call: _Node) -> UnsupportedError:
    """Return the error for an operator that cannot be exact."""
    if call.is_standard and call.operator in operations.REFUSED:
        return refuse(call.place, *operations.REFUSED[call.operator])
    if not call.is_standard:
        return refuse(call.place, "is an operator of your own", "write it with the standard's operators")
    return refuse(
        call.place,
        "is not among the operators that can be exact here",
        "write it with those that the table of supported operations lists",
    )


def _interpret(call: _Node, args: list[Any], rows: int) -> Any:
    """Convert a node to values of the graph, given its arguments."""
    compared = next((arg.call for arg in args if isinstance(arg, _Comparison)), None)
    if compared is not None and call.operator != "Where":
        raise _unknown(compared)
    if not call.is_known:
        raise _unknown(call)
    if call.operator in HANDLERS:
        return HANDLERS[call.operator](call, args, rows)
    if call.operator in operations.POINTWISE:
        x = args[0]
        return Features(operations.POINTWISE[call.operator](call.place, x.node, dict(call.attributes)), x.shape)
    additive = operations.ADDITIVE[call.operator]
    positions = range(len(args)) if additive is None else additive
    return apply_affine(call.place, call.compute, args, positions, rows)


def _unchanged(call: _Node, args: list[Any], rows: int) -> Any:
    """Return the value as it is, unless it becomes an integer or is dropped at random."""
    import onnx

    to = call.attributes.get("to", onnx.TensorProto.FLOAT)
    if call.operator == "Cast" and to in {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}:
        raise refuse(call.place, "rounds the values to few digits", "keep the values as float32 or float64")
    if call.operator == "Cast" and to not in {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}:
        raise refuse(call.place, "makes other numbers of the values", "keep the values as float32 or float64")
    if call.operator == "Dropout" and len(args) > 2 and args[2] is not None and bool(args[2]):
        raise refuse(call.place, "drops features at random", "export the model in evaluation mode")
    return args[0]


def _normalise(call: _Node, args: list[Any], rows: int) -> Any:
    if call.attributes.get("training_mode"):
        raise refuse(call.place, "normalises with the statistics of the batch", "export the model in evaluation mode")
    return apply_affine(call.place, lambda *a: _first(call.compute(*a)), args, (2, 3), rows)


def _compare(call: _Node, args: list[Any], rows: int) -> _Comparison:
    """Interpret z > t with one number t."""
    z, bound = args
    if not isinstance(z, Features) or isinstance(bound, Features) or bound.numel() != 1:
        raise _unknown(call)
    return _Comparison(call, z.node, float(bound))


def _choose(call: _Node, args: list[Any], rows: int) -> Features:
    """Interpret softplus with a threshold as torch exports it: z where βz > t, and log(1 + exp(βz)) / β elsewhere."""
    condition, x, y = args
    if not (isinstance(condition, _Comparison) and isinstance(x, Features) and isinstance(y, Features)):
        raise _unknown(call)
    (compared, b), (value, a), (result, c) = (_multiple(each) for each in (condition.node, x.node, y.node))
    if (
        isinstance(result, Pointwise)
        and isinstance(result.function, softplusActivation)
        and result.function.beta == 1
    ):
        argument, e = _multiple(result.of)
        if compared is value is argument and math.isclose(b, e) and math.isclose(c * e, a) and e / a > 0:
            return Features(TORCH["softplus"](call.place, x.node, e / a, condition.bound), x.shape)
    raise _unknown(call)


def _multiple(node: Node) -> tuple[Node, float]:
    """Return v and a of a value a v."""
    if (
        isinstance(node, Affine)
        and len(node.terms) == 1
        and node.offset is None
        and isinstance(node.terms[0][1], float)
    ):
        value, factor = _multiple(node.terms[0][0])
        return value, factor * node.terms[0][1]
    return node, 1.0


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, list) else result


def _power(call: _Node, args: list[Any], rows: int) -> Features:
    base, exponent = args
    if not isinstance(base, Features) and base.numel() == 1 and float(base) > 0:
        scaled = multiply(call.place, exponent, base.log(), rows)
        return Features(TORCH["exp"](call.place, scaled.node), scaled.shape)
    if isinstance(exponent, Features) or exponent.numel() != 1:
        raise refuse(
            call.place, "raises to a power that is not one number", "write x^y as exp(y log x) with smooth parts"
        )
    number = float(exponent)
    if number != int(number) and abs(number) != 0.5:
        raise refuse(call.place, f"raises to the power {number}", "use whole powers or square roots")
    return Features(TORCH["pow"](call.place, base.node, number), base.shape)


def _clip(call: _Node, args: list[Any], rows: int) -> Features:
    x, low, high = (*args, None, None)[:3]
    low, high = (
        call.attributes.get(key) if bound is None else float(bound) for key, bound in (("min", low), ("max", high))
    )
    return Features(TORCH["clamp"](call.place, x.node, low, high), x.shape)


def _among(choose: Callable[..., Features]) -> Callable[[_Node, list[Any], int], Any]:
    def fold(call: _Node, args: list[Any], rows: int) -> Any:
        result = args[0]
        for arg in args[1:]:
            if not features_in([result, arg]):
                result = (torch.maximum if choose is maximum else torch.minimum)(result, arg)
            else:
                result = choose(call.place, result, arg, rows)
        return result

    return fold


def _scaler(call: _Node, args: list[Any], rows: int) -> Features:
    """Interpret (x − offset) · scale, as scikit-learn's scalers are exported."""
    offset, scale = (torch.tensor(call.attributes[key], dtype=torch.float64) for key in ("offset", "scale"))
    scaled = multiply(call.place, args[0], scale, rows)
    found: Features = apply_affine(call.place, torch.add, (scaled, -offset * scale), (1,), rows)
    return found


def _regressor(call: _Node, args: list[Any], rows: int) -> Features:
    """Interpret x Aᵀ + b, as scikit-learn's linear models are exported."""
    targets = call.attributes.get("targets", 1)
    matrix = torch.tensor(call.attributes["coefficients"], dtype=torch.float64).reshape(targets, -1).T
    offset = torch.tensor(call.attributes.get("intercepts", [0.0] * targets), dtype=torch.float64)
    if call.attributes.get("post_transform", "NONE") != "NONE":
        raise refuse(call.place, "transforms its result", "export the model with post_transform NONE")
    product = apply_affine(call.place, torch.matmul, (args[0], matrix), (), rows)
    found: Features = apply_affine(call.place, torch.add, (product, offset), (1,), rows)
    return found


def _slopes(call: _Node, args: list[Any], rows: int) -> Features:
    """Interpret PReLU, whose slopes belong to channels before version 7 of the operators."""
    x, slopes = args
    if call.version < 7 and slopes.numel() > 1:
        slopes = slopes.reshape(1, -1, *(1,) * (len(x.shape) - 1))
    return rectify(call.place, x, slopes, rows)


def _pad(call: _Node, args: list[Any], rows: int) -> Features:
    """Interpret padding, whose number is an attribute before version 11 of the operators."""
    found: Features
    if not call.attributes.get("value"):
        found = apply_affine(call.place, call.compute, args, operations.ADDITIVE["Pad"] or (), rows)
        return found
    frame = call.compute(torch.zeros(rows, *args[0].shape, dtype=torch.float64))
    inside = apply_affine(call.place, lambda u: call.compute(u) - frame, args[:1], (), rows)
    found = apply_affine(call.place, torch.add, (inside, frame), (1,), rows)
    return found


def _shape(call: _Node, args: list[Any], rows: int) -> Tensor:
    sizes = [rows, *args[0].shape]
    start, end = call.attributes.get("start", 0), call.attributes.get("end", len(sizes))
    return torch.tensor(sizes[start:end])


#: Operators that need more than their row in a table.
HANDLERS: dict[str, Callable[[_Node, list[Any], int], Any]] = {
    **dict.fromkeys(operations.UNCHANGED, _unchanged),
    "BatchNormalization": _normalise,
    "Clip": _clip,
    "Greater": _compare,
    "Div": lambda call, args, rows: multiply(call.place, args[0], args[1], rows, divide=True),
    "LinearRegressor": _regressor,
    "Max": _among(maximum),
    "Min": _among(minimum),
    "Mul": lambda call, args, rows: multiply(call.place, args[0], args[1], rows),
    "PRelu": _slopes,
    "Pad": _pad,
    "Pow": _power,
    "Scaler": _scaler,
    "Shape": _shape,
    "Where": _choose,
}
