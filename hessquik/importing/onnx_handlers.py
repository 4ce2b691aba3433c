"""ONNX operators that need more than their row in a table, by the names of the standard."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hessquik.activations import softplusActivation
from hessquik.expressions import Formula
from hessquik.importing import onnx_operations as operations
from hessquik.importing.bilinear import apply_bilinear
from hessquik.importing.graph import Affine, Node, Pointwise, affine, refuse
from hessquik.importing.interpreting import (
    Features,
    apply_affine,
    features_in,
    maximum,
    minimum,
    multiply,
    rectify,
)
from hessquik.importing.onnx_node import Call, unknown
from hessquik.importing.sklearn_kernels import kernel
from hessquik.importing.torch_operations import POINTWISE as TORCH

__all__ = ["HANDLERS", "OF_FIRST", "Comparison"]

#: Added to the standard deviation by the definition of MeanVarianceNormalization.
_MVN_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison z > t, which is accepted only as a part of torch's exported softplus.

    Attributes:
        call: The node that compares.
        node: z.
        bound: t.
    """

    call: Call
    node: Node
    bound: float


def _unchanged(call: Call, args: list[Any], rows: int) -> Any:
    """Return the value as it is, unless it becomes an integer or is dropped at random."""
    import onnx

    value, types = args[0], onnx.TensorProto
    to = call.attributes.get("to", types.FLOAT)
    if call.operator == "Cast" and to in {types.FLOAT16, types.BFLOAT16}:
        raise refuse(call.place, "rounds the values to few digits", "keep the values as float32 or float64")
    becomes_integer = (
        isinstance(args[1], Tensor) and not args[1].is_floating_point()
        if call.operator == "CastLike"
        else call.operator == "Cast" and to not in {types.FLOAT, types.DOUBLE}
    )
    if becomes_integer:
        raise refuse(call.place, "makes other numbers of the values", "keep the values as float32 or float64")
    if call.operator == "Dropout" and _is_training(call, args):
        raise refuse(call.place, "drops features at random", "export the model in evaluation mode")
    return value if isinstance(value, Features) else value.double()


def _is_training(call: Call, args: list[Any]) -> bool:
    """Return True if Dropout or BatchNormalization works as in training."""
    if call.version < 7:
        return not call.attributes.get("is_test")
    if call.operator == "Dropout":
        return len(args) > 2 and args[2] is not None and bool(args[2])
    if call.version < 14:
        return len([name for name in call.node.output if name]) > 1
    return bool(call.attributes.get("training_mode"))


def _batch_norm(call: Call, args: list[Any], rows: int) -> Any:
    """Interpret (x − mean) · scale / √(var + ε) + B, with the numbers of each channel."""
    if _is_training(call, args):
        raise refuse(call.place, "normalises with the statistics of the batch", "export the model in evaluation mode")
    epsilon, is_spatial = call.attributes.get("epsilon", 1e-5), call.attributes.get("spatial", 1)

    def normalise(x: Tensor, *numbers: Tensor) -> Tensor:
        channels = (-1, *(1,) * (x.ndim - 2)) if is_spatial else x.shape[1:]
        scale, offset, mean, var = (each.reshape(channels) for each in numbers)
        return (x - mean) * (scale / torch.sqrt(var + epsilon)) + offset

    return apply_affine(call.place, normalise, args, (2, 3), rows)


def _standardised(
    call: Call, x: Features, axes: Sequence[int], inverse: Formula, rows: int, is_centred: bool = True
) -> Features:
    """Return (x − mean) · f(var), over axes; f is the formula ``inverse``."""
    place, dims = call.place, tuple(axes)
    if is_centred:
        x = apply_affine(place, lambda u: u - u.mean(dims, keepdim=True), (x,), (), rows)
    variance = apply_affine(place, lambda u: u.mean(dims, keepdim=True), (_applied(call, "square", x),), (), rows)
    factor = Pointwise(place, variance.node.width, variance.node, inverse)
    return multiply(place, x, replace(variance, node=factor), rows)


def _inverse_root(call: Call) -> Formula:
    """Return 1 / √(z + ε)."""
    return ["power", ["add", "z", float(call.attributes.get("epsilon", 1e-5))], -0.5]


def _scaled(call: Call, x: Features, scale: Tensor, offset: Tensor | None, rows: int) -> Features:
    """Return x · scale + offset."""
    product = multiply(call.place, x, scale, rows)
    if offset is None:
        return product
    found: Features = apply_affine(call.place, torch.add, (product, offset), (1,), rows)
    return found


def _layer_norm(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret LayerNormalization, and RMSNormalization, which does not subtract the mean."""
    x, scale, offset = (*args, None)[:3]
    rank = len(x.shape) + 1
    axes = range(call.attributes.get("axis", -1) % rank, rank)
    is_centred = call.operator == "LayerNormalization"
    return _scaled(call, _standardised(call, x, axes, _inverse_root(call), rows, is_centred), scale, offset, rows)


def _group_norm(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret GroupNormalization, and InstanceNormalization, where each channel is a group."""
    x, scale, offset = args
    _expect_rows_first(call, x)
    channels = x.shape[0]
    groups = call.attributes.get("num_groups", channels)
    grouped = apply_affine(call.place, lambda u: u.reshape(rows, groups, -1), (x,), (), rows)
    standard = _standardised(call, grouped, (2,), _inverse_root(call), rows)
    value = replace(x, node=standard.node)
    columns = (channels, *(1,) * (len(x.shape) - 1))
    scale, offset = (each.repeat_interleave(channels // len(each)).reshape(columns) for each in (scale, offset))
    return _scaled(call, value, scale, offset, rows)


def _expect_rows_first(call: Call, x: Features) -> None:
    if x.axis:
        raise refuse(call.place, f"has the rows along axis {x.axis}", "transpose its input before")


def _mean_variance(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret MeanVarianceNormalization, (x − mean) / (√var + ε)."""
    axes = call.attributes.get("axes", [0, 2, 3])
    return _standardised(call, args[0], axes, ["power", ["add", ["sqrt", "z"], _MVN_EPSILON], -1], rows)


def _compare(call: Call, args: list[Any], rows: int) -> Comparison:
    """Interpret z > t with one number t."""
    z, bound = args
    if not isinstance(z, Features) or isinstance(bound, Features) or bound.numel() != 1:
        raise unknown(call)
    return Comparison(call, z.node, float(bound))


def _choose(call: Call, args: list[Any], rows: int) -> Any:
    """Interpret a choice by a constant mask, or softplus with a threshold."""
    condition, x, y = args
    if isinstance(condition, Tensor):
        return apply_affine(call.place, lambda u, v: torch.where(condition, u, v), (x, y), (0, 1), rows)
    if isinstance(condition, Comparison) and isinstance(x, Features) and isinstance(y, Features):
        return _softplus(call, condition, x, y)
    raise unknown(call)


def _softplus(call: Call, condition: Comparison, x: Features, y: Features) -> Features:
    """Interpret softplus as torch exports it: z where βz > t, and log(1 + exp(βz)) / β elsewhere."""
    (compared, b), (value, a), (result, c) = (_multiple(each) for each in (condition.node, x.node, y.node))
    if (
        isinstance(result, Pointwise)
        and isinstance(result.function, softplusActivation)
        and result.function.beta == 1
    ):
        argument, e = _multiple(result.of)
        if compared is value is argument and math.isclose(b, e) and math.isclose(c * e, a) and e / a > 0:
            return replace(x, node=TORCH["softplus"](call.place, x.node, e / a, condition.bound))
    raise unknown(call)


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


def _power(call: Call, args: list[Any], rows: int) -> Any:
    base, exponent = args
    if isinstance(base, Tensor) and base.is_floating_point() and bool((base > 0).all()):
        scaled = multiply(call.place, exponent, base.log(), rows)
        return replace(scaled, node=TORCH["exp"](call.place, scaled.node))
    if isinstance(exponent, Features) or exponent.numel() != 1:
        raise refuse(
            call.place, "raises to a power that is not one number", "write x^y as exp(y log x) with smooth parts"
        )
    number = float(exponent)
    if number != int(number) and abs(number) != 0.5:
        formula = ["exp", ["mul", number, ["log", "z"]]]
        return replace(base, node=Pointwise(call.place, base.node.width, base.node, formula))
    return replace(base, node=TORCH["pow"](call.place, base.node, number))


def _clip(call: Call, args: list[Any], rows: int) -> Any:
    x, low, high = (*args, None, None)[:3]
    low, high = (
        call.attributes.get(key) if bound is None else float(bound) for key, bound in (("min", low), ("max", high))
    )
    low, high = (None if bound is None or math.isinf(bound) else bound for bound in (low, high))
    return replace(x, node=TORCH["clamp"](call.place, x.node, low, high))


def _among(choose: Callable[..., Features]) -> Callable[[Call, list[Any], int], Any]:
    def fold(call: Call, args: list[Any], rows: int) -> Any:
        result = args[0]
        for arg in args[1:]:
            if not features_in([result, arg]):
                result = (torch.maximum if choose is maximum else torch.minimum)(result, arg)
            else:
                result = choose(call.place, result, arg, rows)
        return result

    return fold


def _scaler(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret (x − offset) · scale, as scikit-learn's scalers are exported."""
    offset, scale = (torch.tensor(call.attributes[key], dtype=torch.float64) for key in ("offset", "scale"))
    return _scaled(call, args[0], scale, -offset * scale, rows)


def _regressor(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret x Aᵀ + b, as scikit-learn's linear models are exported."""
    targets = call.attributes.get("targets", 1)
    matrix = torch.tensor(call.attributes["coefficients"], dtype=torch.float64).reshape(targets, -1).T
    offset = torch.tensor(call.attributes.get("intercepts", [0.0] * targets), dtype=torch.float64)
    if call.attributes.get("post_transform", "NONE") != "NONE":
        raise refuse(call.place, "transforms its result", "export the model with post_transform NONE")
    product = apply_affine(call.place, torch.matmul, (args[0], matrix), (), rows)
    found: Features = apply_affine(call.place, torch.add, (product, offset), (1,), rows)
    return found


def _support_vectors(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret Σᵢ αᵢ k(x, cᵢ) + ρ, as scikit-learn's support vectors are exported."""
    _expect_rows_first(call, args[0])
    given, x = call.attributes, args[0].node
    if given.get("post_transform", "NONE") != "NONE" or given.get("one_class"):
        raise refuse(call.place, "transforms its result", "export a regressor with post_transform NONE")
    weights, rho = (torch.tensor(given[key], dtype=torch.float64) for key in ("coefficients", "rho"))
    if not given.get("n_supports"):
        return Features(affine(call.place, [(x, weights[:, None])], rho), (1,), 0)
    gamma, offset, degree = given.get("kernel_params") or (0.0, 0.0, 3.0)
    points = torch.tensor(given["support_vectors"], dtype=torch.float64).reshape(-1, x.width)
    values = kernel(call.place, x, points, given.get("kernel_type", "LINEAR").lower(), gamma, degree, offset)
    return Features(affine(call.place, [(values, weights[:, None])], rho), (1,), 0)


def _slopes(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret PReLU, whose slopes belong to channels before version 7 of the operators."""
    x, slopes = args
    if call.version < 7 and slopes.numel() > 1:
        slopes = slopes.reshape(1, -1, *(1,) * (len(x.shape) - 1))
    return rectify(call.place, x, slopes, rows)


def _pad(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret padding, whose number is an attribute before version 11 of the operators."""
    found: Features
    if not call.attributes.get("value"):
        found = apply_affine(call.place, call.compute, args, operations.ADDITIVE["Pad"] or (), rows)
        return found
    frame = call.compute(torch.zeros(args[0].whole(rows), dtype=torch.float64))
    inside = apply_affine(call.place, lambda u: call.compute(u) - frame, args[:1], (), rows)
    found = apply_affine(call.place, torch.add, (inside, frame), (1,), rows)
    return found


def _scatter(call: Call, args: list[Any], rows: int) -> Any:
    """Interpret the replacement of some entries by others, or their addition."""
    if call.attributes.get("reduction", "none") not in {"none", "add"}:
        raise refuse(call.place, "multiplies or compares entries", "use Mul, or a smooth function")
    return apply_affine(call.place, call.compute, args, (0, 2), rows)


def _shape(call: Call, args: list[Any], rows: int) -> Tensor:
    sizes = torch.tensor(args[0].whole(rows))
    if call.operator == "Size":
        return sizes.prod()
    start, end = call.attributes.get("start", 0), call.attributes.get("end", len(sizes))
    return sizes[start:end]


def _multilinear(call: Call, args: list[Any], rows: int, compute: Callable[..., Any] | None = None) -> Any:
    """Interpret MatMul and Einsum, which are linear in each of their operands."""
    if len(features_in(args)) == 2:
        return apply_bilinear(call.place, compute or call.compute, args, rows)
    return apply_affine(call.place, compute or call.compute, args, (), rows)


def _sum(call: Call, value: Features, args: list[Any], rows: int) -> Features:
    """Return the sum over the axes that a reduction names."""
    given = _axes(call, args)
    if not given and call.attributes.get("noop_with_empty_axes"):
        return value
    axes, keeps = tuple(given or range(len(value.shape) + 1)), bool(call.attributes.get("keepdims", 1))
    found: Features = apply_affine(call.place, lambda u: u.sum(axes, keepdim=keeps), (value,), (), rows)
    return found


def _axes(call: Call, args: list[Any]) -> list[int]:
    """Return the axes that a reduction names, by an attribute or, later, by its second input."""
    given = args[1].tolist() if len(args) > 1 and args[1] is not None else call.attributes.get("axes", [])
    return [int(axis) for axis in given]


def _folded(combine: Callable[..., Features]) -> Callable[[Call, list[Any], int], Features]:
    """Return a handler of a reduction over one axis, as operations on two values."""

    def handle(call: Call, args: list[Any], rows: int) -> Features:
        x, shape, axes = args[0], args[0].whole(rows), _axes(call, args)
        if len(axes) != 1 or axes[0] % len(shape) == (x.axis or 0):
            raise refuse(call.place, "reduces several axes, or rows", "reduce one axis of the features")
        axis, keeps = axes[0] % len(shape), bool(call.attributes.get("keepdims", 1))
        parts = [
            apply_affine(
                call.place, lambda u, i=i: u.narrow(axis, i, 1) if keeps else u.select(axis, i), (x,), (), rows
            )
            for i in range(shape[axis])
        ]
        found: Features = functools.reduce(lambda left, right: combine(call.place, left, right, rows), parts)
        return found

    return handle


def _applied(call: Call, name: str | None, x: Features) -> Features:
    """Return σ(x) with σ given by its name."""
    return x if name is None else replace(x, node=TORCH[name](call.place, x.node))


def _reduced(inner: str | None, outer: str | None = None) -> Callable[[Call, list[Any], int], Features]:
    """Return a handler of σ(Σ τ(x)) with τ and σ given by their names."""

    def handle(call: Call, args: list[Any], rows: int) -> Features:
        return _applied(call, outer, _sum(call, _applied(call, inner, args[0]), args, rows))

    return handle


def _norm(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret ReduceL2, which is |x| where it reduces one feature."""
    squares = _reduced("square")(call, args, rows)
    is_of_one = squares.node.width == args[0].node.width
    return _reduced("abs")(call, args, rows) if is_of_one else _applied(call, "sqrt", squares)


def _soft_shrink(call: Call, args: list[Any], rows: int) -> Features:
    """Interpret x − min(max(x, −λ), λ), the one form of Shrink that does not jump."""
    x, bound, bias = args[0], call.attributes.get("lambd", 0.5), call.attributes.get("bias", 0.0)
    if bound != bias:
        raise refuse(call.place, "jumps where |x| is lambd", "use it with bias equal to lambd, or a smooth function")
    clipped = replace(x, node=TORCH["clamp"](call.place, x.node, -bound, bound))
    found: Features = apply_affine(call.place, torch.sub, (x, clipped), (), rows)
    return found


def _thresholded(call: Call, args: list[Any], rows: int) -> Features:
    if call.attributes.get("alpha", 1.0) != 0:
        raise refuse(call.place, "jumps where x is alpha", "use it with alpha 0, or a smooth function")
    return _applied(call, "relu", args[0])


def _biased(name: str) -> Callable[[Call, list[Any], int], Any]:
    """Return a handler of σ(x + b), for operators of onnxruntime."""

    def handle(call: Call, args: list[Any], rows: int) -> Any:
        z = apply_affine(call.place, torch.add, args, (0, 1), rows) if len(args) > 1 else args[0]
        return replace(z, node=operations.POINTWISE["Gelu"](call.place, z.node, {"approximate": name}))

    return handle


def _fused_product(call: Call, args: list[Any], rows: int) -> Any:
    """Interpret α σ(A) σ(B) of onnxruntime, with operands that may be transposed."""
    given = call.attributes
    if given.get("transBatchA") or given.get("transBatchB"):
        raise unknown(call)

    def compute(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.mT if given.get("transA") else a, b.mT if given.get("transB") else b
        return (a @ b) * float(given.get("alpha", 1.0))

    return _multilinear(call, args, rows, compute)


def _fused_gemm(call: Call, args: list[Any], rows: int) -> Any:
    """Interpret α A B + β C of onnxruntime with an activation after it."""
    given = call.attributes
    z = _fused_product(call, args[:2], rows)
    if len(args) > 2:
        z = apply_affine(call.place, lambda u, c: u + given.get("beta", 1.0) * c, (z, args[2]), (1,), rows)
    function = operations.POINTWISE.get(given.get("activation", ""))
    if function is None:
        raise unknown(call)
    numbers = {key: given[f"activation_{key}"] for key in ("alpha", "beta", "gamma") if f"activation_{key}" in given}
    return replace(z, node=function(call.place, z.node, numbers))


#: Operators that need more than their row in a table.
HANDLERS: dict[str, Callable[[Call, list[Any], int], Any]] = {
    **dict.fromkeys(operations.UNCHANGED, _unchanged),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization"), _group_norm),
    **dict.fromkeys(("MatMul", "Einsum"), _multilinear),
    **dict.fromkeys(("Shape", "Size"), _shape),
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Greater": _compare,
    "Div": lambda call, args, rows: multiply(call.place, args[0], args[1], rows, divide=True),
    "LinearRegressor": _regressor,
    "Max": _among(maximum),
    "MeanVarianceNormalization": _mean_variance,
    "Min": _among(minimum),
    "Mul": lambda call, args, rows: multiply(call.place, args[0], args[1], rows),
    "PRelu": _slopes,
    "Pad": _pad,
    "Pow": _power,
    "ReduceL1": _reduced("abs"),
    "ReduceL2": _norm,
    "ReduceLogSum": _reduced(None, "log"),
    "ReduceMax": _folded(maximum),
    "ReduceMin": _folded(minimum),
    "ReduceProd": _folded(multiply),
    "ReduceSumSquare": _reduced("square"),
    "SVMRegressor": _support_vectors,
    "Scaler": _scaler,
    **dict.fromkeys(("ScatterElements", "ScatterND"), _scatter),
    "Shrink": _soft_shrink,
    "ThresholdedRelu": _thresholded,
    "Where": _choose,
    "com.microsoft.BiasGelu": _biased("none"),
    "com.microsoft.FastGelu": _biased("tanh"),
    "com.microsoft.FusedGemm": _fused_gemm,
    "com.microsoft.FusedMatMul": _fused_product,
}

#: Operators whose first input alone may depend on the model's.
OF_FIRST = (
    "Clip",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "PRelu",
    "RMSNormalization",
)
