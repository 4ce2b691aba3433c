"""ONNX graphs written by hand: odd but valid ones as exporters write them, at the versions where they differ."""

import io
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import SelectKBest, f_regression
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.svm import SVR
from torch import nn
from torch.nn import functional

import hessquik
from hessquik.errors import UnsupportedError
from hessquik.importing.onnx_reader import ROWS
from tests.importing.comparison import TOLERANCE, error, worst_error

_RNG = np.random.default_rng(0)
W, V, B = _RNG.normal(size=(3, 4)), _RNG.normal(size=(4, 2)), _RNG.normal(size=4)
TW, TV, TB = map(torch.as_tensor, (W, V, B))
X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MICROSOFT = "com.microsoft"


def node(operator, inputs, outputs="y", **attributes):
    """Return a node; names are separated by spaces."""
    return helper.make_node(operator, inputs.split(), outputs.split(), f"the_{operator}", **attributes)


def made(nodes, opset=20, shape=("n", 3), kind=TensorProto.DOUBLE, domains=(), functions=(), **constants):
    """Return a model from x to y."""
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def branch(name, operator):
    result = helper.make_tensor_value_info(name, TensorProto.DOUBLE, None)
    return helper.make_graph([node(operator, "x", name)], name, [], [result])


SPARSE = helper.make_sparse_tensor(
    numpy_helper.from_array(np.array([0.5]), "c"), numpy_helper.from_array(np.array([1]), "places"), [3]
)


def with_sparse(model):
    """Return a model with a sparse weight c."""
    model.graph.sparse_initializer.append(SPARSE)
    return model


ROWS_SHAPE = [node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Unsqueeze", "n first", "n1")]
SWISH = helper.make_function(
    "mine", "Act", ["a"], ["o"], [node("Sigmoid", "a", "s"), node("Mul", "a s", "o")], [helper.make_opsetid("", 20)]
)
MASK = np.array([True, False, True])

#: A model and the same in torch.
GRAPHS = {
    "Gemm alpha beta transB": (
        made([node("Gemm", "x W b", transB=1, alpha=0.5, beta=2.0)], W=W.T.copy(), b=B),
        lambda x: 0.5 * x @ TW + 2 * TB,
    ),
    "Gemm adds the input": (made([node("Gemm", "x W x")], W=W[:, :3].copy()), lambda x: x @ TW[:, :3] + x),
    "a vector on the left": (
        made(
            [node("Unsqueeze", "x last", "u"), node("MatMul", "W u", "m"), node("Squeeze", "m last")],
            last=np.array([2]),
            W=W.T.copy(),
        ),
        lambda x: x @ TW,
    ),
    "rows along the second axis": (
        made(
            [node("Transpose", "x", "t"), node("Tanh", "t", "u"), node("MatMul", "W u", "v"), node("Transpose", "v")],
            W=W.T.copy(),
        ),
        lambda x: x.tanh() @ TW,
    ),
    "rows along the second axis, as many as features": (
        made(
            [node("Transpose", "x", "t"), node("Gather", "t places", "u", axis=0), node("Transpose", "u")],
            shape=(3, 3),
            places=np.array([2, 0]),
        ),
        lambda x: x[:, [2, 0]],
    ),
    "an ensemble along the first axis": (
        made(
            [
                node("MatMul", "x Ws", "h"),
                node("Sin", "h", "s"),
                node("Shape", "s", "n"),
                node("Gather", "n two", "w"),
                node("ReduceMean", "s zero", "m", keepdims=0),
                node("Cast", "w", "c", to=TensorProto.DOUBLE),
                node("Mul", "m c"),
            ],
            Ws=np.stack([W, -2 * W, W + 1]),
            two=np.array(2),
            zero=np.array([0]),
        ),
        lambda x: 4 * torch.stack([x @ TW, -2 * x @ TW, x @ (TW + 1)]).sin().mean(0),
    ),
    "products of values with the rows along the second axis": (
        made(
            [
                node("Unsqueeze", "x zero", "u"),
                node("ReduceProd", "u last", "p", keepdims=0),
                node("Squeeze", "p zero"),
            ],
            last=np.array([2]),
            zero=np.array([0]),
        ),
        lambda x: x.prod(1),
    ),
    "GELU of weights": (
        made([node("Gelu", "c", "g", approximate="tanh"), node("Gelu", "c", "e"), node("Sum", "x g e")], c=B[:3]),
        lambda x: x + functional.gelu(TB[:3], approximate="tanh") + functional.gelu(TB[:3]),
    ),
    "powers of several numbers": (
        made([node("Pow", "b x")], b=np.array([0.5, 2.0, 3.0])),
        lambda x: torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) ** x,
    ),
    "operands aligned by the last axis": (
        made([node("Add", "x c", broadcast=1, axis=-1)], opset=6, c=B[:3]),
        lambda x: x + TB[:3],
    ),
    "nodes that nothing needs": (
        made([node("Tanh", "x"), node("Floor", "x", "f"), node("ReduceMax", "f", "g")]),
        torch.tanh,
    ),
    "outputs of a node that nothing needs": (
        made([node("Split", "x", "a b c", axis=1, num_outputs=3), node("Floor", "c", "d"), node("Mul", "a b")]),
        lambda x: x[:, :1] * x[:, 1:2],
    ),
    "a mask": (
        made([node("Sin", "x", "s"), node("Where", "m s x")], m=MASK),
        lambda x: torch.where(torch.as_tensor(MASK), x.sin(), x),
    ),
    "a mask with numbers": (
        made([node("Where", "m x c")], m=MASK, c=np.array(2.5)),
        lambda x: torch.where(torch.as_tensor(MASK), x, 2.5),
    ),
    "a mask from a comparison of constants": (
        made([node("Greater", "c d", "m"), node("Where", "m x c")], c=np.array([1.0, 2.0, 3.0]), d=np.array(1.5)),
        lambda x: torch.where(torch.tensor([False, True, True]), x, torch.tensor([1.0, 2.0, 3.0]).double()),
    ),
    "quantised weights": (
        made(
            [
                node("DequantizeLinear", "q s z", "f"),
                node("Cast", "f", "W", to=TensorProto.DOUBLE),
                node("MatMul", "x W"),
            ],
            q=(W * 50).astype(np.int8),
            s=np.float32(0.02),
            z=np.int8(3),
        ),
        lambda x: x @ (torch.as_tensor((W * 50).astype(np.int8) - 3.0) * float(np.float32(0.02))),
    ),
    "weights in bfloat16": (
        made(
            [
                node("Cast", "W", "h", to=TensorProto.BFLOAT16),
                node("Cast", "h", "V", to=TensorProto.DOUBLE),
                node("MatMul", "x V"),
            ],
            W=W,
        ),
        lambda x: x @ TW.bfloat16().double(),
    ),
    "weights in float16": (
        made([node("Cast", "h", "W", to=TensorProto.DOUBLE), node("MatMul", "x W")], h=W.astype(np.float16)),
        lambda x: x @ torch.as_tensor(W.astype(np.float16).astype(float)),
    ),
    "a function of the model's own": (
        made([node("Act", "x", domain="mine")], domains=("mine",), functions=[SWISH]),
        lambda x: x * x.sigmoid(),
    ),
    "If with a constant condition": (
        made([node("If", "c", then_branch=branch("t", "Tanh"), else_branch=branch("e", "Floor"))], c=np.array(True)),
        torch.tanh,
    ),
    "Constant as a tensor": (
        made([node("Constant", "", "c", value=numpy_helper.from_array(B[:3])), node("Add", "x c")]),
        lambda x: x + TB[:3],
    ),
    "Constant as a float": (
        made([node("Constant", "", "c", value_float=0.5), node("CastLike", "c x", "d"), node("Mul", "x d")]),
        lambda x: 0.5 * x,
    ),
    "Constant as floats": (
        made(
            [
                node("Constant", "", "c", value_floats=[0.5, 1.0, 2.0]),
                node("CastLike", "c x", "d"),
                node("Mul", "d x"),
            ]
        ),
        lambda x: x * torch.tensor([0.5, 1.0, 2.0]),
    ),
    "Constant as integers": (
        made([node("Constant", "", "c", value_ints=[0, 3, 1]), node("Reshape", "x c", "u"), node("Flatten", "u")]),
        lambda x: x,
    ),
    "Constant as an integer": (
        made([node("Constant", "", "c", value_int=1), node("CumSum", "x c")]),
        lambda x: x.cumsum(1),
    ),
    "ConstantOfShape of the input": (
        made(
            [
                node("Shape", "x", "s"),
                node("ConstantOfShape", "s", "o", value=numpy_helper.from_array(np.array([2.0]))),
                node("Add", "x o"),
            ]
        ),
        lambda x: x + 2,
    ),
    "Reshape by arithmetic on the shape": (
        made(
            [*ROWS_SHAPE, node("Concat", "n1 rest", "to", axis=0), node("Reshape", "x to", "u"), node("Tanh", "u")],
            zero=np.array(0),
            first=np.array([0]),
            rest=np.array([-1]),
        ),
        torch.tanh,
    ),
    "Expand to the shape of the input": (
        made(
            [*ROWS_SHAPE, node("Concat", "n1 rest", "to", axis=0), node("Expand", "c to", "k"), node("Add", "x k")],
            zero=np.array(0),
            first=np.array([0]),
            rest=np.array([3]),
            c=B[None, :3].copy(),
        ),
        lambda x: x + TB[:3],
    ),
    "a chain of identities": (
        made([node("Identity", f"v{i}" if i else "x", f"v{i + 1}") for i in range(2000)] + [node("Tanh", "v2000")]),
        torch.tanh,
    ),
    "Tile": (
        made([node("Tile", "x r", "u"), node("Sin", "u")], r=np.array([1, 2])),
        lambda x: x.repeat(1, 2).sin(),
    ),
    "Range as indices": (
        made(
            [node("Range", "a b s", "i"), node("Gather", "x i", axis=1)],
            a=np.array(2),
            b=np.array(-1),
            s=np.array(-1),
        ),
        lambda x: x.flip(1),
    ),
    "Slice backwards": (
        made(
            [node("Slice", "x a b c d", "y")],
            a=np.array([-1]),
            b=np.array([np.iinfo(np.int64).min]),
            c=np.array([1]),
            d=np.array([-1]),
        ),
        lambda x: x.flip(1),
    ),
    "Slice by attributes": (
        made([node("Slice", "x", axes=[1], starts=[1], ends=[9])], opset=9),
        lambda x: x[:, 1:],
    ),
    "GatherElements": (
        made([node("GatherElements", "x i", axis=1)], shape=(7, 3), i=np.tile([[2, 0]], (7, 1))),
        lambda x: x[:, [2, 0]],
    ),
    "Compress": (made([node("Compress", "x m", axis=1)], m=MASK), lambda x: x[:, [0, 2]]),
    "ScatterElements": (
        made(
            [node("Sin", "x", "s"), node("ScatterElements", "x i s", axis=1)],
            shape=(7, 3),
            i=np.tile([[1, 2, 0]], (7, 1)),
        ),
        lambda x: x.sin()[:, [2, 0, 1]],
    ),
    "ScatterND": (
        made(
            [node("Sin", "x", "s"), node("ScatterND", "x i s")],
            shape=(7, 3),
            i=np.stack(np.meshgrid(np.arange(7), [1, 2, 0], indexing="ij"), -1),
        ),
        lambda x: x.sin()[:, [2, 0, 1]],
    ),
    "Size": (
        made(
            [node("Size", "x", "n"), node("Size", "x", "m"), node("Sub", "n m", "d"), node("Gather", "x d", axis=1)]
        ),
        lambda x: x[:, 0],
    ),
    "Trilu": (
        made(
            [node("Unsqueeze", "x a", "u"), node("Mul", "u W", "m"), node("Trilu", "m", upper=0)],
            a=np.array([2]),
            W=W,
        ),
        lambda x: (x[:, :, None] * TW).tril(),
    ),
    "Pad by attributes": (
        made([node("Pad", "x", pads=[0, 1, 0, 0], value=2.0)], opset=9),
        lambda x: functional.pad(x, (1, 0), value=2.0),
    ),
    "Sum of one": (made([node("Sum", "x", "s"), node("Tanh", "s")]), torch.tanh),
    "Mean with a constant": (made([node("Mean", "x c")], c=B[:3].copy()), lambda x: (x + TB[:3]) / 2),
    "Pow 1.5": (
        made([node("Exp", "x", "e"), node("Pow", "e p")], p=np.array(1.5)),
        lambda x: (1.5 * x).exp(),
    ),
    "Pow of another type": (made([node("Pow", "x p")], p=np.array(3)), lambda x: x**3),
    "ReduceSumSquare": (made([node("ReduceSumSquare", "x a")], a=np.array([1])), lambda x: (x * x).sum(1)),
    "ReduceSumSquare by attributes": (
        made([node("ReduceSumSquare", "x", axes=[-1], keepdims=0)], opset=11),
        lambda x: (x * x).sum(1),
    ),
    "ReduceL2": (made([node("ReduceL2", "x a")], a=np.array([1])), lambda x: (x * x).sum(1).sqrt()),
    "ReduceL2 squared": (
        made([node("ReduceL2", "x a", "r"), node("Pow", "r p")], a=np.array([1]), p=np.array(2.0)),
        lambda x: (x * x).sum(1),
    ),
    "ReduceLogSum": (
        made([node("Exp", "x", "e"), node("ReduceLogSum", "e a")], a=np.array([1])),
        lambda x: x.logsumexp(1),
    ),
    "ReduceProd": (
        made([node("ReduceProd", "x a", keepdims=0)], a=np.array([-1])),
        lambda x: x.prod(1),
    ),
    "no axes to reduce": (made([node("ReduceSum", "x", noop_with_empty_axes=1)]), lambda x: x),
    "Einsum with a matrix": (made([node("Einsum", "x W", equation="ni,ij->nj")], W=W), lambda x: x @ TW),
    "Einsum of two values": (
        made([node("Tanh", "x", "t"), node("Einsum", "x t", equation="bi,bi->b")]),
        lambda x: (x * x.tanh()).sum(1),
    ),
    "Einsum of a quadratic form": (
        made([node("Einsum", "x W x", equation="bi,ij,bj->b")], W=W[:, :3].copy()),
        lambda x: torch.einsum("bi,ij,bj->b", x, TW[:, :3], x),
    ),
    "outer products": (
        made(
            [node("Unsqueeze", "x a", "u"), node("Unsqueeze", "x b", "v"), node("MatMul", "u v")],
            a=np.array([2]),
            b=np.array([1]),
        ),
        lambda x: x[:, :, None] @ x[:, None],
    ),
    "LayerNormalization": (
        made([node("LayerNormalization", "x s o", epsilon=0.5)], s=B[:3].copy(), o=B[1:].copy()),
        lambda x: functional.layer_norm(x, (3,), TB[:3], TB[1:], 0.5),
    ),
    "LayerNormalization without an offset": (
        made([node("Gemm", "x W", "g"), node("LayerNormalization", "g s", epsilon=0.5, axis=1)], s=B, W=W),
        lambda x: functional.layer_norm(x @ TW, (4,), TB, None, 0.5),
    ),
    "MeanVarianceNormalization": (
        made([node("MeanVarianceNormalization", "x", axes=[1])], kind=TensorProto.FLOAT),
        lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0).sqrt() + 1e-9),
    ),
    "GroupNormalization by groups": (
        made(
            [node("Gemm", "x W", "g"), node("GroupNormalization", "g s o", num_groups=2, epsilon=0.5)],
            W=W,
            s=B[:2].copy(),
            o=B[2:].copy(),
        ),
        lambda x: functional.group_norm(x @ TW, 2, TB[:2].repeat_interleave(2), TB[2:].repeat_interleave(2), 0.5),
    ),
    "BatchNormalization with a number per place": (
        made([node("BatchNormalization", "x s o m v", spatial=0)], opset=7, **{name: B[:3] ** 2 for name in "somv"}),
        lambda x: (x - TB[:3] ** 2) / (TB[:3] ** 2 + float(np.float32(1e-5))).sqrt() * TB[:3] ** 2 + TB[:3] ** 2,
    ),
    "FusedMatMul": (
        made([node("FusedMatMul", "x W", domain=MICROSOFT, transB=1, alpha=0.5)], domains=(MICROSOFT,), W=W.T.copy()),
        lambda x: 0.5 * x @ TW,
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name):
    model, f = GRAPHS[name]
    assert worst_error(hessquik.from_onnx(model, dtype=torch.float64), f, X) <= TOLERANCE


KINKED = {
    "ReduceL1": (made([node("ReduceL1", "x a")], a=np.array([1])), lambda x: x.abs().sum(1)),
    "ReduceL2 of one feature": (
        made([node("Unsqueeze", "x a", "u"), node("ReduceL2", "u a", keepdims=0)], a=np.array([1])),
        torch.abs,
    ),
    "ReduceMax": (made([node("ReduceMax", "x a")], a=np.array([1])), lambda x: x.amax(1)),
    "ReduceMin": (made([node("ReduceMin", "x", axes=[-1])], opset=11), lambda x: x.amin(1)),
    "HardSwish": (made([node("HardSwish", "x")]), functional.hardswish),
    "HardSigmoid": (made([node("HardSigmoid", "x", alpha=0.25)]), lambda x: (0.25 * x + 0.5).clamp(0, 1)),
    "Shrink": (made([node("Shrink", "x", lambd=0.5, bias=0.5)]), lambda x: functional.softshrink(x, 0.5)),
    "ThresholdedRelu": (made([node("ThresholdedRelu", "x", alpha=0.0)]), torch.relu),
    "Clip to infinity": (
        made([node("Clip", "x a b")], a=np.array(0.0), b=np.array(np.inf)),
        torch.relu,
    ),
}


@pytest.mark.parametrize("name", KINKED)
def test_graphs_with_kinks(name):
    model, f = KINKED[name]
    with pytest.raises(UnsupportedError, match=r"the_\w+ \(\w+\) is linear in pieces"):
        hessquik.from_onnx(model)
    assert worst_error(hessquik.from_onnx(model, allow_kinks=True), f, X) <= TOLERANCE


NAN = W.copy()
NAN[1, 2] = np.nan
#: Models, and what the refusal says.
REFUSED = {
    "random numbers": (
        made([node("RandomNormal", "", "r", shape=[3], dtype=TensorProto.DOUBLE), node("Add", "x r")]),
        r"the_RandomNormal \(RandomNormal\) draws random numbers; make the model deterministic",
    ),
    "the number of rows": (
        made(
            [*ROWS_SHAPE, node("Cast", "n", "f", to=TensorProto.DOUBLE), node("Div", "x f")],
            zero=np.array(0),
            first=np.array([0]),
        ),
        "gives a point other values when it is evaluated with other points, .*; write the network such that each row",
    ),
    "float16": (
        made([node("Tanh", "x")], kind=TensorProto.FLOAT16),
        "x must hold float32 or float64, which have enough digits .*, got FLOAT16; export the model in float32",
    ),
    "a point without an axis of rows": (
        made([node("Tanh", "x")], shape=(3,)),
        r"x must have the shape \(n, d\), with one row per point, got \[3\]; export the model with an axis of rows",
    ),
    "an image of unknown size": (
        made([node("Tanh", "x")], shape=("n", 3, "w")),
        r"x must have the shape .* got \[0, 3, 0\]; export the model with a fixed number of inputs",
    ),
    "weights that are NaN": (
        made([node("MatMul", "x W")], W=NAN),
        r"the_MatMul \(MatMul\) takes the tensor 'W', which has NaN, infinity or numbers beyond .*; export",
    ),
    "weights that overflow": (
        made([node("Add", "x b")], b=np.array([1.0, 1e300, 2.0])),
        r"\(Add\) takes the tensor 'b', which has NaN, infinity or numbers beyond 1e\+150; export the model with",
    ),
    "a sparse constant": (
        made([node("Constant", "", "c", sparse_value=SPARSE), node("Add", "x c")]),
        r"\(Constant\) has a sparse tensor; export the model with dense weights",
    ),
    "a sparse weight": (
        with_sparse(made([node("Mul", "x c")])),
        r"\(Mul\) has a sparse tensor; export the model with dense weights",
    ),
    "CastLike to integers": (
        made([node("CastLike", "x i")], i=np.array(1)),
        r"the_CastLike \(CastLike\) makes other numbers of the values; keep the values as float32",
    ),
    "an operator of onnxruntime's optimiser": (
        made([node("NhwcMaxPool", "x", domain=MICROSOFT)], domains=(MICROSOFT,)),
        r"is an operator of onnxruntime's own, .*; import the model as it was before onnxruntime optimised it",
    ),
    "a shrinkage that jumps": (
        made([node("Shrink", "x")]),
        r"\(Shrink\) jumps where \|x\| is lambd; use it with bias",
    ),
    "a threshold that jumps": (made([node("ThresholdedRelu", "x")]), r"jumps where x is alpha; use it with alpha 0"),
    "a norm of rows": (made([node("LpNormalization", "x")]), "divides features by their norm, which has a kink"),
    "the softmax": (
        made([node("Softmax", "x")]),
        "sums exponentials .*, which overflow unless .*; return the values",
    ),
    "the mean over rows": (
        made([node("MeanVarianceNormalization", "x", axes=[0])]),
        "lets rows depend on each other",
    ),
    "batch normalisation in training": (
        made([node("BatchNormalization", "x s o m v", "y a b")], opset=13, **{name: B[:3] for name in "somv"}),
        "normalises with the statistics of the batch; export the model in evaluation mode",
    ),
    "dropout in training": (
        made([node("Dropout", "x r t")], r=np.float32(0.5), t=np.array(True)),
        "drops features at random; export the model in evaluation mode",
    ),
    "results without names": (
        made([helper.make_node("Split", ["x"], ["", "b", "c"], axis=1, num_outputs=3), node("Mul", "b c")]),
        r"node 0 \(Split\) leaves out some of its results; export the model with a name for each",
    ),
    "a result beside the first": (
        made([node("Dropout", "x", "d mask"), node("Where", "mask d x")]),
        r"the_Dropout \(Dropout\) gives 'mask' beside its result; use its first output alone",
    ),
    "rows that are left out": (
        made([node("Slice", "x start end")], start=np.array([0]), end=np.array([9])),
        r"the_Slice \(Slice\) makes an array \(9, 3\) of 61 rows; keep one row per point",
    ),
    "rows that become features": (
        made([node("Reshape", "x sizes")], shape=("n", ROWS), sizes=np.array([ROWS, -1])),
        r"onnxruntime cannot compute the model for 11 points \(it gives 61 rows\); export it with a number of points",
    ),
    "more inputs than a matrix can have": (
        made([node("Tanh", "x")], shape=("n", 1 << 40)),
        r"input x must have at most 16384 numbers per point and .*, got \(61, 1099511627776\); export the model with",
    ),
    "more points than fit into the memory": (
        made([node("Tanh", "x")], shape=(1 << 40, 3)),
        r"and 4194304 in all, got \(1099511627776, 3\); export the model with a free number of points",
    ),
    "more features than a matrix can have": (
        made([node("Tile", "x n", "t"), node("Tanh", "t")], n=np.array([1, 10_000])),
        "at most 16384 features, got 30000; make the network narrower",
    ),
    "a result with the rows along the second axis": (
        made([node("Transpose", "x")]),
        "node y has the rows along axis 1; transpose it, to one row per point",
    ),
    "groups of channels with the rows among them": (
        made(
            [
                node("Transpose", "x", "t"),
                node("GroupNormalization", "t s s", "g", num_groups=1),
                node("Transpose", "g"),
            ],
            s=np.ones(ROWS),
        ),
        r"the_GroupNormalization \(GroupNormalization\) has the rows along axis 1; transpose its input before",
    ),
    "powers of a whole number, which are rounded": (
        made([node("Pow", "b x")], b=np.array(2)),
        "raises to a power that is not one number",
    ),
    "operands aligned by another axis than the last": (
        made([node("Mul", "x c", broadcast=1, axis=1)], opset=6, shape=("n", 3, 3), c=B[:3]),
        r"the_Mul \(Mul\) aligns its second operand by other axes than the last; convert the model to version 7",
    ),
    "slopes of an old version": (
        made([node("Selu", "x")], opset=5),
        r"the_Selu \(Selu\) has other slopes by default than in the present version; convert the model to version 7",
    ),
    "slopes that depend on the inputs": (
        made([node("PRelu", "c x")], c=np.ones((1, 3))),
        r"the_PRelu \(PRelu\) has numbers that depend on the inputs; use constants",
    ),
    "a variance below 0": (
        made([node("BatchNormalization", "x s s s v")], s=np.ones(3), v=-np.ones(3)),
        r"\(BatchNormalization\) computes with NaN, or multiplies by infinity; use finite numbers",
    ),
    "a choice without branches": (
        made([node("If", "c")], c=np.array(True)),
        r"the_If \(If\) has arguments that cannot be read \(KeyError: 'then_branch'\); export the model anew",
    ),
    "no outputs": (made([node("MatMul", "x W")], W=np.ones((3, 0))), "node y holds no numbers"),
    "too many products": (
        made([node("Einsum", "x x", equation="bi,bj->bij")], shape=("n", 200)),
        "multiplies 200 by 200 values that both depend on the inputs; multiply values of at most",
    ),
    "products of entries of other rows": (
        made([node("ScatterElements", "x i x", axis=1, reduction="mul")], shape=(7, 3), i=np.zeros((7, 3), np.int64)),
        "multiplies or compares entries; use Mul, or a smooth function",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_graphs_that_are_refused(name):
    model, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        hessquik.from_onnx(model)


@pytest.mark.parametrize("opset", [9, 11, 13, 14, 17])
def test_batch_normalisation_as_torch_exports_it(opset):
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 1)).eval()
    for part in (module[0], module[3]):
        part.running_mean.normal_()
        part.running_var.uniform_(0.5, 2.0)
        part.eps = float(np.float32(part.eps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        torch.onnx.export(
            module, (torch.zeros(2, 3),), file := io.BytesIO(), dynamo=False, opset_version=opset, **names
        )
    model = onnx.load_from_string(file.getvalue())
    assert "BatchNormalization" in {each.op_type for each in model.graph.node}
    assert worst_error(hessquik.from_onnx(model, dtype=torch.float64), module.double(), X) <= TOLERANCE


def microsoft(operator, inputs, **attributes):
    """Return a model of an operator of onnxruntime in float32."""
    given = {"W": np.float32(W), "b": np.float32(B), "c": np.float32(B[:3])}
    constants = {name: given[name] for name in inputs.split() if name != "x"}
    nodes = [node(operator, inputs, domain=MICROSOFT, **attributes)]
    return made(nodes, kind=TensorProto.FLOAT, domains=(MICROSOFT,), **constants)


_W, _B, _C = (torch.as_tensor(np.float32(array)).double() for array in (W, B, B[:3]))
#: Operators of onnxruntime, which computes them in float32 alone.
MICROSOFTS = {
    "BiasGelu": (microsoft("BiasGelu", "x c"), lambda x: functional.gelu(x + _C)),
    "FastGelu": (microsoft("FastGelu", "x c"), lambda x: functional.gelu(x + _C, approximate="tanh")),
    "FastGelu alone": (microsoft("FastGelu", "x"), lambda x: functional.gelu(x, approximate="tanh")),
    "Gelu": (microsoft("Gelu", "x"), functional.gelu),
    "QuickGelu": (microsoft("QuickGelu", "x", alpha=1.5), lambda x: x * torch.sigmoid(1.5 * x)),
    "FusedGemm": (
        microsoft("FusedGemm", "x W b", alpha=0.5, beta=2.0, activation="Tanh"),
        lambda x: torch.tanh(0.5 * x @ _W + 2 * _B),
    ),
    "FusedGemm without an offset": (
        microsoft("FusedGemm", "x W", activation="Sigmoid"),
        lambda x: (x @ _W).sigmoid(),
    ),
}


@pytest.mark.parametrize("name", MICROSOFTS)
def test_operators_of_onnxruntime(name):
    model, f = MICROSOFTS[name]
    assert worst_error(hessquik.from_onnx(model, dtype=torch.float64), f, X) <= TOLERANCE


def test_activations_of_onnxruntime_have_their_numbers():
    numbers = {"activation": "HardSigmoid", "activation_alpha": 0.25, "activation_beta": 0.125}
    network = hessquik.from_onnx(microsoft("FusedGemm", "x W", **numbers), allow_kinks=True, dtype=torch.float64)
    assert worst_error(network, lambda x: (0.25 * x @ _W + 0.125).clamp(0, 1), X) <= TOLERANCE


@pytest.mark.parametrize("opset", [11, 17])
def test_normalisation_of_rows_as_torch_exports_it(opset):
    """Before version 17 it is written with Sub, Pow, Sqrt and Div."""
    torch.manual_seed(0)
    norms = (nn.LayerNorm(6, eps=0.5), nn.GroupNorm(2, 6, eps=0.5))
    module = nn.Sequential(nn.Linear(3, 6), norms[0], nn.SiLU(), norms[1], nn.Linear(6, 2)).double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        torch.onnx.export(module, (X,), file := io.BytesIO(), dynamo=False, opset_version=opset, **names)
    model = onnx.load_from_string(file.getvalue())
    assert worst_error(hessquik.from_onnx(model), module, X) <= TOLERANCE


@pytest.mark.parametrize(
    "estimator",
    [
        *(SVR(kernel=name) for name in ("linear", "poly", "rbf", "sigmoid")),
        make_pipeline(PolynomialFeatures(2), Ridge()),
        make_pipeline(SelectKBest(f_regression, k=2), Ridge()),
        make_pipeline(ColumnTransformer([("a", StandardScaler(), [0, 2]), ("b", "passthrough", [1])]), Ridge()),
    ],
    ids=lambda estimator: f"{type(estimator).__name__} {getattr(estimator, 'kernel', '')}",
)
def test_estimators_as_skl2onnx_exports_them(estimator):
    """Weights are in float32 there."""
    x = _RNG.normal(size=(30, 3))
    estimator.fit(x, np.sin(x.sum(1)))
    network = hessquik.from_onnx(to_onnx(estimator, x[:1].astype(np.float32)), dtype=torch.float64)
    own = hessquik.from_sklearn(estimator)
    for found, expected in zip(network(X, True, True), own(X, True, True), strict=True):
        assert error(found.detach(), expected.detach()) <= 1e-5


@pytest.mark.parametrize(("operator", "name"), [("Sigmoid", "swish"), ("Tanh", "tanh"), ("Gelu", "gelu")])
def test_files_that_onnxruntime_optimised(operator, name, tmp_path):
    """It writes FusedGemm, QuickGelu and Gelu of its own."""
    gate = (
        [node(operator, "a", "s"), node("Mul", "a s", "g")] if operator == "Sigmoid" else [node(operator, "a", "g")]
    )
    nodes = [helper.make_node("Gemm", ["x", "W", "b"], ["a"]), *gate, helper.make_node("Gemm", ["g", "V"], ["y"])]
    weights = {"W": np.float32(W), "b": np.float32(B), "V": np.float32(V)}
    model = made(nodes, kind=TensorProto.FLOAT, **weights)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    network = hessquik.from_onnx(tmp_path / "optimised.onnx", dtype=torch.float64)
    tW, tb, tV = (torch.as_tensor(array).double() for array in weights.values())
    f = {"swish": functional.silu, "tanh": torch.tanh, "gelu": functional.gelu}[name]
    assert worst_error(network, lambda x: f(x @ tW + tb) @ tV, X) <= TOLERANCE
    if operator != "Gelu":
        assert MICROSOFT in {each.domain for each in onnx.load(tmp_path / "optimised.onnx").graph.node}


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_the_standard_has_two_names(domain):
    model = made([node("MatMul", "x W", "h"), node("PRelu", "h s")], W=W, s=np.array([0.1, 0.5, 2.0, 3.0]))
    model.opset_import[0].domain = domain
    network = hessquik.from_onnx(model, allow_kinks=True)
    assert model.opset_import[0].domain == domain, "the model is not changed"
    slopes = torch.tensor([0.1, 0.5, 2.0, 3.0], dtype=torch.float64)
    assert worst_error(network, lambda x: torch.where(x @ TW > 0, x @ TW, slopes * (x @ TW)), X) <= TOLERANCE


@pytest.mark.parametrize(("low", "high"), [(5.0, 2.0), (-3.4028234663852886e38, 1.0), (0.0, 3.4028234663852886e38)])
def test_clips_with_any_bounds(low, high):
    model = made([node("Clip", "x low high")], low=np.array(low), high=np.array(high))
    network = hessquik.from_onnx(model, allow_kinks=True, bounds=([20.0] * 3, [40.0] * 3))
    x = torch.cat([X - 30, X, X + 30])
    assert worst_error(network, lambda x: torch.clamp(x, low, high), x) <= TOLERANCE


def test_number_of_rows_that_the_model_does_not_take_is_named():
    model = made([node("Reshape", "x sizes")], sizes=np.array([ROWS, -1]))
    with pytest.raises(
        UnsupportedError, match=r"onnxruntime cannot compute .* for 11 points .* either free or fixed"
    ):
        hessquik.from_onnx(model)
