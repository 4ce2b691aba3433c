"""Tables of torch's operations by the kind of their interpretation.

Names are those of the ATen operators in programs of ``torch.export``, without their overloads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hessquik import activations as act
from hessquik.activations import hessQuikActivationFunction
from hessquik.expressions import Formula
from hessquik.importing.graph import Node, Pointwise, affine

__all__ = ["ADDITIVE", "CONSTANT", "POINTWISE", "REFUSED", "UNCHANGED"]

Function = hessQuikActivationFunction | Formula

#: Softplus is the identity to the last bit from here on.
FAR = 40.0
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
    return _scaled(place, z, act.eluActivation(float(alpha)), input_scale, scale)


def _softplus(place: str, z: Node, beta: float = 1.0, threshold: float = 20.0) -> Node:
    return Pointwise(place, z.width, z, act.softplusActivation(float(beta), float(threshold)))


def _power(place: str, z: Node, exponent: Any) -> Node:
    exponent = float(exponent)
    if exponent == 1:
        return z
    if exponent == 2:
        return _scaled(place, z, act.quadraticActivation(), outer=2.0)
    return Pointwise(place, z.width, z, ["power", "z", int(exponent) if exponent == int(exponent) else exponent])


def _clamp(place: str, z: Node, low: float | None = None, high: float | None = None) -> Node:
    """Return min(max(z, low), high), as low + ReLU(z − low) − ReLU(z − high)."""
    import torch

    def relu(shift: float) -> Node:
        offset = torch.full((z.width,), -float(shift), dtype=torch.float64)
        return Pointwise(place, z.width, affine(place, [(z, 1.0)], offset), act.reluActivation())

    if low is None and high is None:
        return z
    if low is None:
        assert high is not None
        return affine(place, [(z, 1.0), (relu(high), -1.0)])
    floor = torch.full((z.width,), float(low), dtype=torch.float64)
    return affine(place, [(relu(low), 1.0), *([] if high is None else [(relu(high), -1.0)])], floor)


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
    "celu": lambda place, z, alpha=1.0: _elu(place, z, 1.0, alpha, 1 / alpha),
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
    "sinh": lambda place, z: _sum(place, z, (act.expActivation(), 1.0, 0.5), (act.expActivation(), -1.0, -0.5)),
    "cosh": lambda place, z: _sum(place, z, (act.expActivation(), 1.0, 0.5), (act.expActivation(), -1.0, 0.5)),
    "atan": _apply(act.arctanActivation()),
    "erf": _apply(["erf", "z"]),
    "special_ndtr": _apply(["ndtr", "z"]),
    "sqrt": _apply(["sqrt", "z"]),
    "rsqrt": _apply(["power", "z", -0.5]),
    "reciprocal": _apply(["power", "z", -1]),
    "square": lambda place, z: _power(place, z, 2),
    "pow": _power,
}

#: Operations that leave each value as it is.
UNCHANGED = {
    "alias",
    "clone",
    "contiguous",
    "detach",
    "detach_",
    "lift_fresh",
    "lift_fresh_copy",
    "to",
    "_to_copy",
    "type_as",
}

#: Linear operations that add nothing: those on shapes, and sums.
_SHAPES = """
    view _unsafe_view reshape flatten unflatten squeeze unsqueeze permute transpose t slice select index_select narrow
    split split_with_sizes chunk unbind expand repeat flip roll sum mean cumsum diff movedim tile numpy_T
    pixel_shuffle pixel_unshuffle einsum
"""
#: Linear operations, with the positions of arguments that are added: these become the offset.
ADDITIVE: dict[str, tuple[int, ...]] = {
    "add": (0, 1),
    "sub": (0, 1),
    "rsub": (0, 1),
    "neg": (),
    "mul": (),
    "div": (),
    "linear": (2,),
    "addmm": (0,),
    "mm": (),
    "matmul": (),
    "mv": (),
    "bmm": (),
    "baddbmm": (0,),
    "batch_norm": (2, 3),
    "cat": (0,),
    "stack": (0,),
    "constant_pad_nd": (2,),
    "pad": (3,),
    **dict.fromkeys(_SHAPES.split(), ()),
}

_CONSTANT = """
    _weight_norm amax amin arange cos diag diag_embed diagonal eye full full_like ger linalg_vector_norm linspace
    maximum minimum new_full new_ones new_zeros norm ones ones_like outer prod scalar_tensor tan tril triu zeros
    zeros_like
"""
#: Further operators that may be applied to constants.
CONSTANT = frozenset(_CONSTANT.split())

_ROWS = "use fully-connected layers, whose every output depends on one row"
_NORM = "use nn.BatchNorm1d, whose evaluation mode is an affine map, or scale the data"
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
        "divides features by their own standard deviation",
        _NORM,
        "layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm",
    ),
    ("normalises with the statistics of the batch", _EVAL, "native_batch_norm _native_batch_norm_legit"),
    ("changes its own buffers, as batch normalisation in training does", _EVAL, "add_ copy_ mul_ sub_ fill_ zero_"),
    (
        "drops features or draws slopes at random",
        _EVAL,
        "dropout feature_dropout alpha_dropout feature_alpha_dropout rrelu",
    ),
    (
        "divides by a sum over all features",
        "return the values before it, and apply it to those",
        "softmax _softmax log_softmax _log_softmax logsumexp",
    ),
    (
        "is attention, which multiplies values that both depend on the inputs",
        _ROWS,
        "scaled_dot_product_attention _native_multi_head_attention _transformer_encoder_layer_fwd",
    ),
    (
        "takes a maximum, which has kinks where its arguments are equal",
        "use a smooth function such as a sum or a mean",
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices max min "
        "amax amin fmax fmin sort topk median kthvalue cummax",
    ),
    (
        "is a pooling over places, which is not kept as one here",
        "use nn.Linear on the flattened input",
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d",
    ),
    ("looks up a table by integers", _INTEGER, "embedding embedding_bag one_hot bucketize searchsorted gather take"),
    (
        "is constant in pieces, so that its derivatives are 0 or undefined",
        "use a smooth function",
        "argmax argmin round floor ceil trunc fix sign sgn frac remainder fmod floor_divide heaviside",
    ),
    (
        "chooses by a comparison",
        "use a smooth function in place of the choice",
        "gt ge lt le eq ne where masked_fill logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not "
        "isnan nonzero item _local_scalar_dense",
    ),
    ("is a recurrent network", _ROWS, "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    (
        "draws random numbers",
        "make the module deterministic",
        "rand randn rand_like randn_like bernoulli normal multinomial randint randperm",
    ),
    (
        "takes a norm or a deviation of features, which has kinks or is divided by",
        "return the values before it, and apply it to those",
        "linalg_vector_norm norm cdist pairwise_distance cosine_similarity var std",
    ),
    (
        "solves with or factors a matrix that depends on the inputs",
        "return the matrix, and solve with its values and derivatives",
        "linalg_det linalg_inv linalg_solve linalg_eigh linalg_eigvalsh linalg_cholesky linalg_svd",
    ),
    ("makes complex numbers", "write it with real and imaginary parts", "fft_fft fft_rfft complex view_as_complex"),
    ("multiplies all features", "write it as products of two", "prod cumprod"),
    (
        "is a function with kinks",
        "use its smooth counterpart: sigmoid, SiLU or x - tanh(x)",
        "hardsigmoid hardswish hardshrink softshrink threshold",
    ),
)
REFUSED: dict[str, tuple[str, str]] = {
    name: (does, instead) for does, instead, names in _REASONS for name in names.split()
}
