"""Reader of ONNX graphs, which are interpreted on a fixed number of rows; onnx's reference evaluates constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hessquik.errors import FormatError, UnsupportedError
from hessquik.importing import onnx_operations as operations
from hessquik.importing.graph import MAX_WIDTH, Node, refuse
from hessquik.importing.interpreting import Features, apply_affine, as_float64, features_in, readable
from hessquik.importing.onnx_handlers import HANDLERS, OF_FIRST, Comparison
from hessquik.importing.onnx_node import Call, as_tensor, unknown

__all__ = ["Signature", "expect_known", "expect_size", "read", "signature"]

#: Rows where the model leaves their number open: a number that sizes of features seldom are.
ROWS = 61
#: Numbers of all points, where the model fixes their number.
MAX_ENTRIES = 1 << 22
#: Weights beyond have squares that overflow.
LARGEST = 1e150


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
        return math.prod(self.shape[1:])


def signature(model: Any, d: int | None = None) -> Signature:
    """Return the input and the output of a model.

    Args:
        model: The model.
        d: Number of inputs, where the model leaves it open.

    Raises:
        UnsupportedError: the model has several inputs or outputs, or they are not arrays of real numbers.
    """
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
    name = inputs[0].name
    dtype, (rows, *sizes) = _dtype(name, kind.elem_type), _shape(name, kind, d)
    return Signature(name, model.graph.output[0].name, (rows or ROWS, *sizes), dtype, not rows)


def _dtype(name: str, code: int) -> torch.dtype:
    """Return the type of an input.

    Raises:
        UnsupportedError: it is neither float32 nor float64.
    """
    import onnx

    kind = onnx.TensorProto.DataType.Name(code) if code in onnx.TensorProto.DataType.values() else str(code)
    types = {"FLOAT": torch.float32, "DOUBLE": torch.float64}
    if kind not in types and "FLOAT" in kind:
        raise UnsupportedError(
            f"input {name} must hold float32 or float64, which have enough digits for derivatives, got {kind}; "
            "export the model in float32"
        )
    if kind not in types:
        raise UnsupportedError(
            f"input {name} must hold real numbers, since derivatives with respect to others do not exist, got "
            f"{kind}; export the part of the network that takes real numbers"
        )
    return types[kind]


def _shape(name: str, kind: Any, d: int | None) -> list[int]:
    """Return the shape of an input, rows first; their number is 0 if it is open.

    Raises:
        FormatError: a size is below 0.
        UnsupportedError: it has no axis of rows, or leaves other sizes than the number of rows open.
    """
    sizes = [size.dim_value for size in kind.shape.dim] if kind.HasField("shape") else [0, 0]
    if min(sizes, default=0) < 0:
        raise FormatError(f"input {name} must have a shape of positive sizes, got {sizes}")
    if len(sizes) < 2:
        raise UnsupportedError(
            f"input {name} must have the shape (n, d), with one row per point, got {sizes}; export the model with "
            "an axis of rows before the others"
        )
    if len(sizes) == 2:
        sizes[1] = sizes[1] or d or 0
    if not all(sizes[1:]):
        instead = "pass example_input, or export the model" if len(sizes) == 2 else "export the model"
        raise UnsupportedError(
            f"input {name} must have the shape (n, d) with a number for d, got {sizes}; {instead} with a fixed "
            "number of inputs"
        )
    return sizes


def expect_known(model: Any, what: Signature) -> None:
    """Refuse a model with an operator that cannot be exact, before anything of it is computed.

    Raises:
        UnsupportedError: it has one that depends on the input, and the output on it.
    """
    dependent = {what.input}
    for number, node in _needed(model.graph, [what.output]):
        if node.op_type not in _OF_SHAPE and not dependent.isdisjoint(node.input):
            call = Call(node, number, model.opset_import)
            if not _is_known(call):
                raise unknown(call)
            dependent |= set(node.output)


def expect_size(what: Signature) -> None:
    """Refuse a model whose input is too large for matrices of its features.

    Raises:
        UnsupportedError: it is.
    """
    if what.width > MAX_WIDTH or math.prod(what.shape) > MAX_ENTRIES:
        raise UnsupportedError(
            f"input {what.input} must have at most {MAX_WIDTH} numbers per point and {MAX_ENTRIES} in all, got "
            f"{what.shape}; export the model with a free number of points, or with fewer inputs"
        )


def read(model: Any, what: Signature, point: Node) -> Node:
    """Return a model's output as a value of a graph, from the value that it takes.

    Raises:
        FormatError: a tensor is not what it says, or a node takes what nothing before it gives.
        UnsupportedError: the model does something that cannot be exact here.
    """
    values: dict[str, Any] = {"": None, what.input: Features(point, what.shape[1:], 0)}
    _Reader(model.opset_import, what.shape[0], values).read(model.graph, [what.output])
    output = values.get(what.output)
    if not isinstance(output, Features):
        raise refuse(what.output, "does not depend on the input", "return what the network computes of it")
    if not output.node.width:
        raise refuse(what.output, "holds no numbers", "return what the network computes")
    if output.axis:
        raise refuse(what.output, f"has the rows along axis {output.axis}", "transpose it, to one row per point")
    return output.node


#: Operators whose second operand has an axis before version 7.
_BY_AXIS = ("Add", "Div", "Mul", "Pow", "Sub")
#: Operators that depend on the shape of a value alone.
_OF_SHAPE = ("Shape", "Size")


def _needed(graph: Any, outputs: Sequence[str]) -> list[tuple[int, Any]]:
    """Return the nodes that outputs are computed from, with their numbers, in order."""
    wanted, found = set(outputs), []
    for number, node in reversed(list(enumerate(graph.node))):
        if not wanted.isdisjoint(node.output):
            found.append((number, node))
            wanted |= _taken(node)
    return found[::-1]


def _taken(node: Any) -> set[str]:
    """Return the names of the values that a node takes, those in its branches among them."""
    inner = (part for each in node.attribute for part in each.g.node)
    return {name for name in node.input if name}.union(*map(_taken, inner))


def _is_known(call: Call) -> bool:
    """Return True if there is a way to interpret the operator."""
    return any(call.operator in table for table in (HANDLERS, operations.POINTWISE, operations.ADDITIVE))


def _weights(tensor: Any) -> Tensor:
    """Return the numbers of a tensor.

    Raises:
        FormatError: its type, its shape and its bytes do not belong together.
    """
    from onnx import numpy_helper

    try:
        weights: Tensor = as_float64(as_tensor(numpy_helper.to_array(tensor)))
    except Exception as error:  # any error that a damaged file causes
        name = tensor.name[:64]
        raise FormatError(f"tensor {name!r} must have numbers of its type and shape ({str(error)[:100]})") from None
    return weights


@dataclass(frozen=True, slots=True)
class _Reader:
    """Interpreter of a graph and of its branches.

    Attributes:
        opsets: Versions of the operators.
        rows: Number of rows.
        values: Tensors and :class:`Features` by name, to which it adds.
    """

    opsets: Sequence[Any]
    rows: int
    values: dict[str, Any]

    def read(self, graph: Any, outputs: Sequence[str]) -> None:
        """Interpret what outputs of a graph are computed from."""
        nodes = _needed(graph, outputs)
        wanted = set(outputs).union(*(_taken(node) for _, node in nodes))
        self.values.update((tensor.name, _weights(tensor)) for tensor in graph.initializer if tensor.name in wanted)
        sparse = {tensor.values.name for tensor in graph.sparse_initializer}
        for number, node in nodes:
            call = Call(node, number, self.opsets)
            if not sparse.isdisjoint(node.input) or "sparse_value" in call.attributes:
                raise refuse(call.place, "has a sparse tensor", "export the model with dense weights")
            missing = [name for name in node.input if name not in self.values]
            if missing:
                raise FormatError(
                    f"node {call.place}: the model must have a value named {missing[0]!r} before it is used"
                )
            results = self._results(call, [self.values[name] for name in node.input])
            if not all(node.output[: len(results)]):  # which end onnxruntime's process
                raise refuse(call.place, "leaves out some of its results", "export the model with a name for each")
            further = wanted.intersection(node.output[len(results) :])  # such as Dropout's mask
            if further:
                raise refuse(call.place, f"gives {min(further)!r} beside its result", "use its first output alone")
            self.values.update(zip(node.output, results, strict=False))

    def _results(self, call: Call, args: list[Any]) -> Sequence[Any]:
        if call.operator == "If" and isinstance(args[0], Tensor):
            with readable(call.place):
                branch = call.attributes["then_branch" if bool(args[0]) else "else_branch"]
                names = [output.name for output in branch.output]
            self.read(branch, names)
            return [self.values[name] for name in names]
        _expect_present_form(call, args)
        depends = bool(features_in(args)) or any(isinstance(arg, Comparison) for arg in args)
        if depends:
            _expect_finite(call, args)
        with readable(call.place):
            result = _interpret(call, args, self.rows) if depends else call.compute(*args)
        return result if isinstance(result, list | tuple) else [result]


def _expect_finite(call: Call, args: Sequence[Any]) -> None:
    """Refuse constants that are no numbers or whose products overflow, by their names; bounds may be infinite."""
    for name, arg in zip(call.node.input, args, strict=True):
        is_wrong = torch.isnan if call.operator == "Clip" else lambda numbers: ~(numbers.abs() < LARGEST)
        if isinstance(arg, Tensor) and arg.is_floating_point() and bool(is_wrong(arg).any()):
            does = f"takes the tensor {name!r}, which has NaN, infinity or numbers beyond {LARGEST:.0e}"
            raise refuse(call.place, does, "export the model with finite weights")


def _expect_present_form(call: Call, args: Sequence[Any]) -> None:
    """Refuse operators of old versions whose results differ from those of the present ones, which alone are read.

    The standard's reference has the present ones alone as well, so that the comparison of values does not tell.
    """
    instead = "convert the model to version 7 of the operators or later"
    if call.operator == "Selu" and call.version < 6 and not {"alpha", "gamma"} <= call.attributes.keys():
        raise refuse(call.place, "has other slopes by default than in the present version", instead)
    if call.operator in _BY_AXIS and call.version < 7 and "axis" in call.attributes:
        left, right = (len(arg.shape) + isinstance(arg, Features) for arg in args)
        if call.attributes["axis"] % left != left - right:
            raise refuse(call.place, "aligns its second operand by other axes than the last", instead)


def _interpret(call: Call, args: list[Any], rows: int) -> Any:
    """Convert a node to values of the graph, given its arguments."""
    compared = next((arg.call for arg in args if isinstance(arg, Comparison)), None)
    if compared is not None and call.operator != "Where":
        raise unknown(compared)
    if not _is_known(call):
        raise unknown(call)
    if call.operator in OF_FIRST and (not isinstance(args[0], Features) or features_in(args[1:])):
        raise refuse(
            call.place, "has numbers that depend on the inputs", "use constants, or write it with Mul and Add"
        )
    if call.operator in HANDLERS:
        return HANDLERS[call.operator](call, args, rows)
    if call.operator in operations.POINTWISE:
        x = args[0]
        return replace(x, node=operations.POINTWISE[call.operator](call.place, x.node, dict(call.attributes)))
    additive = operations.ADDITIVE[call.operator]
    positions = range(len(args)) if additive is None else additive
    return apply_affine(call.place, call.compute, args, positions, rows)
