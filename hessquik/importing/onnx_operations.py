"""Tables of ONNX's operators by the kind of their interpretation, with the names of the standard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hessquik.importing.graph import Node, Product, affine
from hessquik.importing.torch_operations import FAR
from hessquik.importing.torch_operations import POINTWISE as TORCH

__all__ = ["ADDITIVE", "POINTWISE", "RANDOM", "REFUSED", "UNCHANGED"]

#: Slopes that the standard gives where a model does not, in float32 as it has them.
_SELU = (1.67326319217681884765625, 1.05070102214813232421875)


def _as_torch(name: str, *attributes: tuple[str, Any]) -> Callable[..., Node]:
    """Return a builder of the node of a torch function, from an operator's attributes or their defaults."""

    def make(place: str, z: Node, given: dict[str, Any]) -> Node:
        return TORCH[name](place, z, *(given.get(key, default) for key, default in attributes))

    return make


def _hard_sigmoid(place: str, z: Node, given: dict[str, Any]) -> Node:
    """Return min(max(αz + β, 0), 1)."""
    shift = torch.full((z.width,), float(given.get("beta", 0.5)), dtype=torch.float64)
    return TORCH["clamp"](place, affine(place, [(z, float(given.get("alpha", 0.2)))], shift), 0.0, 1.0)


#: Functions of one variable: the node from its place, the value and the operator's attributes.
POINTWISE: dict[str, Callable[[str, Node, dict[str, Any]], Node]] = {
    "Tanh": _as_torch("tanh"),
    "Sigmoid": _as_torch("sigmoid"),
    "Softplus": lambda place, z, given: TORCH["softplus"](place, z, 1.0, FAR),
    "Softsign": _as_torch("softsign"),
    "Mish": _as_torch("mish"),
    "Gelu": _as_torch("gelu", ("approximate", "none")),
    "Swish": _as_torch("swish", ("alpha", 1.0)),
    "Elu": _as_torch("elu", ("alpha", 1.0)),
    "Celu": _as_torch("celu", ("alpha", 1.0)),
    "Selu": _as_torch("elu", ("alpha", _SELU[0]), ("gamma", _SELU[1])),
    "Relu": _as_torch("relu"),
    "LeakyRelu": _as_torch("leaky_relu", ("alpha", 0.01)),
    "Abs": _as_torch("abs"),
    "Exp": _as_torch("exp"),
    "Log": _as_torch("log"),
    "Sin": _as_torch("sin"),
    "Cos": _as_torch("cos"),
    "Sinh": _as_torch("sinh"),
    "Cosh": _as_torch("cosh"),
    "Atan": _as_torch("atan"),
    "Erf": _as_torch("erf"),
    "Sqrt": _as_torch("sqrt"),
    "Reciprocal": _as_torch("reciprocal"),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda place, z, given: Product(place, z.width, z, _hard_sigmoid(place, z, {"alpha": 1 / 6})),
    "com.microsoft.Gelu": _as_torch("gelu"),
    "com.microsoft.QuickGelu": _as_torch("swish", ("alpha", 1.702)),
}

#: Operators that leave each value as it is.
UNCHANGED = ("Identity", "Dropout", "Cast", "CastLike")

_SHAPES = """
    Reshape Flatten Squeeze Unsqueeze Transpose Slice Gather GatherElements GatherND Split Expand Tile Trilu Compress
    ArrayFeatureExtractor
    ReduceSum ReduceMean CumSum DepthToSpace SpaceToDepth
"""
#: Linear operators, with the positions of inputs that are added; ``None`` stands for all of them.
ADDITIVE: dict[str, tuple[int, ...] | None] = {
    "Add": (0, 1),
    "Sub": (0, 1),
    "Sum": None,
    "Mean": None,
    "Neg": (),
    "Gemm": (2,),
    "Concat": None,
    "Pad": (2,),
    **dict.fromkeys(_SHAPES.split(), ()),
}

_ROWS = "use fully-connected layers, whose every output depends on one row"
_DENSE = "use MatMul on the flattened input"
_SMOOTH = "use a smooth function"
_FLOW = "export the model with a fixed sequence of operators"

#: Operators that give other numbers each time, even of constants.
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")

_REASONS = (
    ("is a convolution, which is not kept as one here", _DENSE, "Conv ConvTranspose ConvInteger QLinearConv"),
    (
        "divides features by their norm, which has a kink where they are 0",
        "use LayerNormalization or BatchNormalization, or scale the data",
        "LpNormalization LRN Normalizer",
    ),
    (
        "sums exponentials of the features, which overflow unless the largest feature is subtracted before, and this "
        "has kinks",
        "return the values before it, and apply it to those",
        "Softmax LogSoftmax ReduceLogSumExp",
    ),
    (
        "is attention, whose softmax overflows unless the largest value is subtracted before, which has kinks",
        _ROWS,
        "Attention MultiHeadAttention",
    ),
    (
        "takes a maximum over features, which has kinks",
        _SMOOTH,
        "MaxPool GlobalMaxPool LpPool TopK Hardmax",
    ),
    ("is a pooling over places, which is not kept as one here", _DENSE, "AveragePool GlobalAveragePool GlobalLpPool"),
    (
        "is constant in pieces, so that its derivatives are 0 or undefined",
        _SMOOTH,
        "ArgMax ArgMin Round Floor Ceil Sign Mod BitShift Binarizer QuantizeLinear DequantizeLinear "
        "DynamicQuantizeLinear QLinearMatMul MatMulInteger",
    ),
    (
        "chooses by a comparison",
        "use a smooth function in place of the choice",
        "Where Greater GreaterOrEqual Less LessOrEqual Equal And Or Not Xor IsNaN IsInf NonZero",
    ),
    (
        "looks up a table by integers",
        "import the part of the network behind the table, which takes real numbers",
        "OneHot LabelEncoder OneHotEncoder CategoryMapper",
    ),
    ("is a recurrent network", _ROWS, "LSTM GRU RNN"),
    ("is an old form of ScatterElements", "convert the model to version 11 of the operators or later", "Scatter"),
    ("decides or repeats while it runs", _FLOW, "If Loop Scan SequenceMap"),
    (
        "draws random numbers",
        "make the model deterministic",
        " ".join(RANDOM),
    ),
    (
        "is constant in pieces, as a tree is",
        "train a smooth model, such as a network",
        "TreeEnsemble TreeEnsembleRegressor TreeEnsembleClassifier",
    ),
    (
        "is a classifier, which has labels",
        "export its decision function or its probabilities alone",
        "LinearClassifier SVMClassifier ZipMap",
    ),
)
#: Operators that are refused with a specific message: what they do and what to do instead.
REFUSED: dict[str, tuple[str, str]] = {
    name: (does, instead) for does, instead, names in _REASONS for name in names.split()
}
