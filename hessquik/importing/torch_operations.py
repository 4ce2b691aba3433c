"""Tables of torch's operations by the kind of their interpretation.

Names are those of the ATen operators in programs of ``torch.export``, without their overloads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from hessquik import activations as act
from hessquik.activations import hessQuikActivationFunction
from hessquik.expressions import Formula
from hessquik.importing.graph import Node, Pointwise, affine, refuse
from hessquik.importing.univariate import is_nonnegative

__all__ = [
    "ADDITIVE",
    "ALIASES",
    "BY_SHAPE",
    "DROPS",
    "FORMULAS",
    "PLAIN",
    "POINTWISE",
    "PRODUCTS",
    "REFUSED",
    "UNCHANGED",
]

Function = hessQuikActivationFunction | Formula

#: Softplus is the identity to the last bit from here on.
FAR = 40.0
#: Least threshold of softplus: that of torch, where it jumps by a relative 1e-10.
SMOOTH = 20.0
#: Relative difference of a product a · (1/a) from 1 at most.
ROUNDED = 1e-15
#: The largest number of float32: exporters have it as the bound of what has none.
LARGEST = 3.4e38
#: A clamp is written from its lower bound up to here, which costs at most three digits.
NEAR = 1024.0
#: Largest whole power of formulas.
MAX_POWER = 16
_SELU = (1.6732632423543772, 1.0507009873554805)


def _apply(function: Function) -> Callable[..., Node]:
    return lambda place, z: Pointwise(place, z.width, z, function)


def _scaled(place: str, z: Node, function: Function, inner: float = 1.0, outer: float = 1.0) -> Node:
    """Return ``outer`` · σ(``inner`` · z)."""
    argument = affine(place, [(z, float(inner))])
    return affine(place, [(Pointwise(place, z.width, argument, function), float(outer))])


def _sum(place: str, z: Node, *terms: tuple[Function, float, float]) -> Node:
    """Return Σ ``outer`` · σ(``inner`` · z) over (σ, inner, outer)."""
    return affine(place, [(_scaled(place, z, function, inner), outer) for function, inner, outer in terms])


def _gelu(place: str, z: Node, approximate: str = "none") -> Node:
    return Pointwise(place, z.width, z, act.geluTanhActivation() if approximate == "tanh" else act.geluActivation())


def _elu(place: str, z: Node, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Node:
    """Return ``scale`` · z where z > 0, and ``scale`` · ``alpha`` · (exp(``input_scale`` · z) − 1) elsewhere."""
    if not input_scale > 0:
        raise refuse(place, f"multiplies its argument by {input_scale} in an exponential", "use an alpha above 0")
    slope = alpha * input_scale
    activation = act.eluActivation(1.0 if math.isclose(slope, 1.0, rel_tol=ROUNDED) else slope)
    return _scaled(place, z, activation, input_scale, scale / input_scale)


def _softplus(place: str, z: Node, beta: float = 1.0, threshold: float = 20.0) -> Node:
    if not beta > 0:
        raise refuse(place, f"is softplus of the steepness beta = {beta}", "use one above 0")
    if threshold < SMOOTH:
        raise refuse(
            place,
            f"jumps where its argument is {threshold / beta}, which is its value from there on",
            f"use a threshold of {SMOOTH} or more",
        )
    return Pointwise(place, z.width, z, act.softplusActivation(float(beta), float(threshold)))


def _power(place: str, z: Node, exponent: Any) -> Node:
    """Return z to a power; one that is neither whole nor ±½ is exp(p log z), which is defined for z > 0."""
    exponent = float(exponent)
    if exponent == 1:
        return z
    if isinstance(z, Pointwise) and z.function == ["sqrt", "z"] and exponent % 2 == 0 and is_nonnegative(z.of):
        return _power(place, z.of, exponent / 2)
    if exponent == 2:
        return _scaled(place, z, act.quadraticActivation(), outer=2.0)
    if not abs(exponent) <= 1 << MAX_POWER:
        raise refuse(place, f"raises to the power {exponent}", "raise to a smaller power")
    if exponent == int(exponent):
        return Pointwise(place, z.width, z, _whole_power(int(exponent)))
    formula = ["power", "z", exponent] if abs(exponent) == 0.5 else ["exp", ["mul", exponent, ["log", "z"]]]
    return Pointwise(place, z.width, z, formula)


def _whole_power(exponent: int) -> Formula:
    """Return z to a whole power, by squaring where formulas have no such power."""
    if abs(exponent) <= MAX_POWER:
        return ["power", "z", exponent]
    half = _whole_power(int(exponent / 2))
    return (
        ["power", half, 2]
        if exponent % 2 == 0
        else ["mul", "z" if exponent > 0 else ["power", "z", -1], ["power", half, 2]]
    )


def _clamp(place: str, z: Node, low: float | None = None, high: float | None = None) -> Node:
    """Return min(max(z, low), high), as low + ReLU(z − low) − ReLU(z − high); far bounds leave z its digits."""
    import torch

    def full(number: float) -> Any:
        return torch.full((z.width,), float(number), dtype=torch.float64)

    def relu(sign: float, bound: float) -> Node:
        return Pointwise(place, z.width, affine(place, [(z, sign)], full(-sign * bound)), act.reluActivation())

    high = None if high is None or high >= LARGEST else high
    low = None if low is None or low <= -LARGEST else low if high is None else min(low, high)
    above = [] if high is None else [(relu(1.0, high), -1.0)]
    if low is not None and abs(low) <= NEAR:
        return affine(place, [(relu(1.0, low), 1.0), *above], full(low))
    return affine(place, [(z, 1.0), *([] if low is None else [(relu(-1.0, low), 1.0)]), *above])


#: Functions of one variable: the node from its place, the value and the operation's other arguments.
POINTWISE: dict[str, Callable[..., Node]] = {
    "tanh": _apply(act.tanhActivation()),
    "sigmoid": _apply(act.sigmoidActivation()),
    "softplus": _softplus,
    "silu": _apply(act.siluActivation()),
    "gelu": _gelu,
    "mish": _apply(act.mishActivation()),
    "softsign": _apply(act.softsignActivation()),
    "swish": lambda place, z, beta=1.0: _scaled(place, z, act.siluActivation(), beta, 1 / beta),
    "elu": _elu,
    "selu": lambda place, z: _elu(place, z, *_SELU),
    "celu": lambda place, z, alpha=1.0: _elu(place, z, alpha, 1.0, 1 / alpha),
    "relu": _apply(act.reluActivation()),
    "leaky_relu": lambda place, z, slope=0.01: Pointwise(place, z.width, z, act.reluActivation(float(slope))),
    "relu6": lambda place, z: _clamp(place, z, 0.0, 6.0),
    "hardtanh": lambda place, z, low=-1.0, high=1.0: _clamp(place, z, low, high),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda place, z, high: _clamp(place, z, None, high),
    "abs": _apply(["abs", "z"]),
    "log_sigmoid": lambda place, z: _scaled(place, z, act.softplusActivation(1.0, FAR), -1.0, -1.0),
    "exp": _apply(act.expActivation()),
    "exp2": lambda place, z: _scaled(place, z, act.expActivation(), math.log(2)),
    "expm1": _apply(["expm1", "z"]),
    "log": _apply(["log", "z"]),
    "log2": lambda place, z: _scaled(place, z, ["log", "z"], outer=1 / math.log(2)),
    "log10": lambda place, z: _scaled(place, z, ["log", "z"], outer=1 / math.log(10)),
    "log1p": _apply(["log1p", "z"]),
    "sin": _apply(act.sinActivation()),
    "cos": _apply(["cos", "z"]),
    "sinh": lambda place, z: _sum(place, z, (["expm1", "z"], 1.0, 0.5), (["expm1", "z"], -1.0, -0.5)),
    "cosh": lambda place, z: _sum(place, z, (act.expActivation(), 1.0, 0.5), (act.expActivation(), -1.0, 0.5)),
    "atan": _apply(act.arctanActivation()),
    "erf": _apply(["erf", "z"]),
    "erfc": lambda place, z: _scaled(place, z, ["ndtr", "z"], -math.sqrt(2), 2.0),
    "special_ndtr": _apply(["ndtr", "z"]),
    "sqrt": _apply(["sqrt", "z"]),
    "rsqrt": _apply(["power", "z", -0.5]),
    "reciprocal": _apply(["power", "z", -1]),
    "square": lambda place, z: _power(place, z, 2),
    "pow": _power,
}

#: Other names of operations.
ALIASES = {
    **dict.fromkeys(("true_divide", "divide"), "div"),
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    "norm": "linalg_vector_norm",
    **{f"special_{name}": name for name in ("erf", "erfc", "exp2", "expm1", "log1p")},
    "_cdist_forward": "cdist",
    "_fused_rms_norm": "native_rms_norm",
    "absolute": "abs",
    "arctan": "atan",
    "clip": "clamp",
    "fmax": "maximum",
    "fmin": "minimum",
    "float_power": "pow",
    "linalg_matmul": "matmul",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "special_expit": "sigmoid",
    "subtract": "sub",
}

#: Operations that leave each value as it is.
UNCHANGED = {
    "alias",
    "clone",
    "contiguous",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "positive",
    "to",
    "_to_copy",
    "type_as",
}
#: Operations that drop values at random in training, and leave them as they are in evaluation mode.
DROPS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}

#: Operations to which one argument gives its shape alone, with the position of that argument.
BY_SHAPE = {
    **dict.fromkeys(
        ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"), 0
    ),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), 1),
}

#: Linear operations that add nothing: those on shapes, and sums.
_SHAPES = """
    view _unsafe_view reshape flatten unflatten squeeze unsqueeze permute transpose t slice select index_select narrow
    split split_with_sizes chunk unbind expand repeat flip roll sum mean cumsum diff movedim tile numpy_T mT
    pixel_shuffle pixel_unshuffle index gather take_along_dim repeat_interleave broadcast_to ravel diagonal trace
    tril triu unfold expand_as view_as reshape_as trapezoid cumulative_trapezoid diag_embed tensor_split hsplit rot90
    fliplr deg2rad rad2deg
"""
_PRODUCTS = """
    mm matmul mv bmm dot vdot inner outer ger kron einsum tensordot bilinear _trilinear linalg_vecdot cross
    linalg_cross addmm addmv addbmm baddbmm linear
"""
#: Operations that multiply values: affine ones if all factors but one are constants, and products of two values.
PRODUCTS = frozenset(_PRODUCTS.split())
#: Linear operations, with the positions of arguments that are added: these become the offset.
ADDITIVE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_SHAPES.split(), ()),
    **dict.fromkeys(sorted(PRODUCTS), ()),
    "add": (0, 1),
    "sub": (0, 1),
    "rsub": (0, 1),
    "neg": (),
    "mul": (),
    "div": (),
    "linear": (2,),
    "bilinear": (3,),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm"), (0,)),
    "batch_norm": (2, 3),
    **dict.fromkeys(("cat", "stack", "hstack", "vstack", "dstack", "column_stack"), (0,)),
    **dict.fromkeys(("select_scatter", "slice_scatter", "diagonal_scatter"), (0, 1)),
    **dict.fromkeys(("index_add", "index_copy", "index_fill", "scatter", "scatter_add"), (0, 3)),
    "index_put": (0, 2),
    "constant_pad_nd": (2,),
    "pad": (3,),
}

_PLAIN = """
    _weight_norm_interface aminmax arange block_diag bucketize cumprod eye floor_divide full_like linspace
    logcumsumexp logspace logsumexp new_empty new_full new_ones new_zeros norm ones ones_like remainder scalar_tensor
    std tril_indices triu_indices zeros zeros_like _unsafe_view transpose
"""
#: Further primitive operators that compute functions, although torch does not mark them as such.
PLAIN = frozenset(_PLAIN.split())


def _centred(t: Any, x: Any, dims: Any) -> Any:
    return t.sub(x, t.mean(x, dims, True))


def _mean_square(t: Any, x: Any, dims: Any) -> Any:
    return t.mean(t.square(x), dims, True)


def _unit(t: Any, x: Any, dims: Any, eps: float) -> Any:
    """Return x / √(mean x² + ε), the mean being over some axes."""
    return t.mul(x, t.rsqrt(t.add(_mean_square(t, x, dims), eps)))


def _affine(t: Any, x: Any, weight: Any, bias: Any) -> Any:
    scaled = x if weight is None else t.mul(x, weight)
    return scaled if bias is None else t.add(scaled, bias)


def _last(shape: Any) -> list[int]:
    return list(range(-len(shape), 0))


def _layer_norm(t: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    return _affine(t, _unit(t, _centred(t, x, _last(shape)), _last(shape), eps), weight, bias)


def _rms_norm(t: Any, x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    return _affine(t, _unit(t, x, _last(shape), t.precision if eps is None else eps), weight, None)


def _group_norm(t: Any, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    sizes = t.size(x)
    parts = t.reshape(x, [sizes[0], groups, -1])
    per_channel = [1, sizes[1], *(1 for _ in sizes[2:])]
    weight, bias = (part if part is None else t.reshape(part, per_channel) for part in (weight, bias))
    return _affine(t, t.reshape(_unit(t, _centred(t, parts, [2]), [2], eps), list(sizes)), weight, bias)


def _instance_norm(
    t: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    uses_input: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    if not uses_input:
        return t.batch_norm(x, weight, bias, mean, var, False, momentum, eps, False)
    return _group_norm(t, x, t.size(x)[1], weight, bias, eps)


def _variance(
    t: Any, x: Any, dims: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> Any:
    dims = [dims] if isinstance(dims, int) else dims or list(range(len(t.size(x))))
    squares = t.square(_centred(t, x, dims))
    number = math.prod(t.size(x)[dim] for dim in dims)
    return t.div(t.sum(squares, dims, keepdim), number - (float(unbiased) if correction is None else correction))


def _norm(t: Any, x: Any, order: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Any:
    if order not in {2, None, "fro"} or dims is None or dims == []:
        raise refuse(t.place, *REFUSED["pdist"])
    return t.sqrt(t.sum(t.square(x), [dims] if isinstance(dims, int) else dims, keepdim))


def _norm_of_matrices(t: Any, x: Any, order: Any = "fro", dims: Any = (-2, -1), keepdim: bool = False) -> Any:
    """Interpret a norm of rows, or the Frobenius norm of matrices: others are of singular values."""
    is_of_matrices = not isinstance(dims, int) and dims is not None and len(dims) == 2
    return _norm(t, x, "singular values" if is_of_matrices and order == 2 else order, dims, keepdim)


def _distances(t: Any, a: Any, b: Any, order: float = 2.0, *_: Any) -> Any:
    return _norm(t, t.sub(t.unsqueeze(a, -2), t.unsqueeze(b, -3)), order, [-1])


def _distance(t: Any, a: Any, b: Any, order: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return _norm(t, t.add(t.sub(a, b), eps), order, [-1], keepdim)


def _largest(t: Any, x: Any, dims: Any = (), keepdim: bool = False, *, of_two: str = "maximum") -> Any:
    """Return the largest number along axes, by halves: the largest of two numbers has a kink, no other has."""
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims:
        raise refuse(t.place, *REFUSED["sort"])
    for dim in dims:
        size = t.size(x)[dim]
        while size > 1:
            half = size // 2
            best = getattr(t, of_two)(t.narrow(x, dim, 0, half), t.narrow(x, dim, half, half))
            x = t.cat([best, t.narrow(x, dim, 2 * half, size - 2 * half)], dim) if size % 2 else best
            size -= half
    return x if keepdim else t.squeeze(x, dims)


def _max(t: Any, x: Any, other: Any = None, keepdim: bool = False, *, of_two: str = "maximum") -> Any:
    if other is None or isinstance(other, int):
        return _largest(t, x, () if other is None else other, keepdim, of_two=of_two), None
    return getattr(t, of_two)(x, other)


def _gated(t: Any, x: Any, dim: int = -1) -> Any:
    left, right = t.chunk(x, 2, dim)
    return t.mul(left, t.sigmoid(right))


def _threshold(t: Any, x: Any, threshold: float, value: float) -> Any:
    if threshold != value:
        raise refuse(
            t.place, f"jumps from {value} to {threshold} where its argument is {threshold}", "use a smooth function"
        )
    return t.add(t.relu(t.sub(x, threshold)), threshold)


#: Operations as formulas of others, from the operators t and the operation's arguments.
FORMULAS: dict[str, Callable[..., Any]] = {
    "addcdiv": lambda t, x, a, b, *, value=1: t.add(x, t.mul(t.div(a, b), value)),
    "addcmul": lambda t, x, a, b, *, value=1: t.add(x, t.mul(t.mul(a, b), value)),
    "amax": _largest,
    "amin": functools.partial(_largest, of_two="minimum"),
    "cdist": _distances,
    "copy": lambda t, x, source, *_: t.expand_as(source, x),
    "fill": lambda t, x, value: t.add(t.zeros_like(x), value),
    "glu": _gated,
    "group_norm": _group_norm,
    "hardsigmoid": lambda t, x: t.clamp(t.add(t.div(x, 6.0), 0.5), 0.0, 1.0),
    "hardswish": lambda t, x: t.mul(x, t.hardsigmoid(x)),
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "lerp": lambda t, a, b, weight: t.add(a, t.mul(t.sub(b, a), weight)),
    "linalg_matrix_norm": _norm_of_matrices,
    "linalg_norm": lambda t, x, order=None, dims=None, keepdim=False: _norm_of_matrices(t, x, order, dims, keepdim),
    "linalg_vector_norm": _norm,
    "logaddexp": lambda t, a, b: t.add(b, t.softplus(t.sub(a, b), 1.0, FAR)),
    "masked_fill": lambda t, x, mask, value: t.where(mask, value, x),
    "max": _max,
    "min": functools.partial(_max, of_two="minimum"),
    "native_batch_norm": lambda t, *args: (t.batch_norm(*args, False), None, None),
    "_native_batch_norm_legit_no_training": lambda t, x, weight, bias, mean, var, momentum, eps: (
        t.batch_norm(x, weight, bias, mean, var, False, momentum, eps, False),
        None,
        None,
    ),
    "native_group_norm": lambda t, x, weight, bias, n, c, size, groups, eps: (
        _group_norm(t, x, groups, weight, bias, eps),
        None,
        None,
    ),
    "native_layer_norm": lambda t, *args: (_layer_norm(t, *args), None, None),
    "native_rms_norm": lambda t, *args: (_rms_norm(t, *args), None),
    "pairwise_distance": _distance,
    "rms_norm": _rms_norm,
    "softshrink": lambda t, x, bound=0.5: t.sub(t.relu(t.sub(x, bound)), t.relu(t.sub(t.neg(x), bound))),
    "std": lambda t, *args, **kwargs: t.sqrt(_variance(t, *args, **kwargs)),
    "threshold": _threshold,
    "var": _variance,
    "zero": lambda t, x: t.zeros_like(x),
}

_ROWS = "use fully-connected layers, whose every output depends on one row"
_INTEGER = "import the part of the network behind the table, which takes real numbers"
_EVAL = "call module.eval() before"

#: Operations that are refused with a specific message: what they do, what to do instead, and their names.
_REASONS = (
    (
        "is a convolution, which is not kept as one here",
        "use nn.Linear on the flattened input",
        "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    (
        "normalises with the statistics of the batch, so that rows depend on each other",
        "call module.eval() before, and let it track statistics (track_running_stats=True)",
        "_native_batch_norm_legit _native_batch_norm_legit_functional _batch_norm_with_update",
    ),
    (
        "stops the gradient (detach, or torch.no_grad), so that the module's own derivatives are not those of its "
        "values",
        "remove it",
        "detach",
    ),
    (
        "drops features or draws slopes at random",
        _EVAL,
        "dropout feature_dropout alpha_dropout feature_alpha_dropout rrelu",
    ),
    (
        "sums exponentials, which overflow for large values unless the largest value is subtracted, and the largest "
        "has kinks",
        "return the values before it and apply it to those, or write exp(z) / exp(z).sum(-1, keepdim=True) if all z "
        "are small",
        "softmax _softmax log_softmax _log_softmax _safe_softmax logsumexp",
    ),
    (
        "is attention, whose softmax sums exponentials that overflow unless the largest is subtracted, and the "
        "largest has kinks",
        _ROWS,
        "scaled_dot_product_attention _native_multi_head_attention _transformer_encoder_layer_fwd",
    ),
    (
        "takes a maximum, which has kinks where its arguments are equal",
        "use a smooth function such as a sum or a mean",
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices sort topk "
        "median kthvalue cummax",
    ),
    (
        "is a pooling over places, which is not kept as one here",
        "use nn.Linear on the flattened input",
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d",
    ),
    ("looks up a table by integers", _INTEGER, "embedding embedding_bag one_hot bucketize searchsorted take"),
    (
        "is constant in pieces, so that its derivatives are 0 or undefined",
        "use a smooth function",
        "argmax argmin round floor ceil trunc fix sign sgn frac remainder fmod floor_divide heaviside",
    ),
    (
        "chooses by a comparison",
        "use a smooth function in place of the choice",
        "gt ge lt le eq ne logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not "
        "isnan nonzero item _local_scalar_dense",
    ),
    ("is a recurrent network", _ROWS, "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    (
        "draws random numbers",
        "make the module deterministic",
        "rand randn rand_like randn_like bernoulli normal multinomial randint randperm",
    ),
    (
        "takes a norm that has kinks, or divides by one",
        "use the Euclidean norm along an axis of features, or return the values before it",
        "pdist cosine_similarity dist",
    ),
    (
        "solves with or factors a matrix that depends on the inputs",
        "return the matrix, and solve with its values and derivatives",
        "linalg_det linalg_inv linalg_solve linalg_eigh linalg_eigvalsh linalg_cholesky linalg_svd",
    ),
    (
        "computes with complex numbers",
        "write it with real and imaginary parts",
        "fft_fft fft_rfft fft_ifft fft_irfft complex polar real imag angle conj view_as_complex view_as_real",
    ),
    ("multiplies all features", "write it as products of two", "prod cumprod"),
    ("jumps where its argument is its bound", "use a smooth function such as x - tanh(x)", "hardshrink"),
)
REFUSED: dict[str, tuple[str, str]] = {
    name: (does, instead) for does, instead, names in _REASONS for name in names.split()
}
