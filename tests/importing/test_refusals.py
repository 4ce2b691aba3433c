"""Networks that cannot be exact are refused; the refusal names the node, its effect and a remedy."""

import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import hessquik
from hessquik.errors import UnsupportedError
from hessquik.importing import onnx_operations, support, torch_operations

WIDTH = 4


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Branches(nn.Module):
    """Control flow that depends on the data."""

    def forward(self, x):
        return torch.tanh(x) if x.sum() > 0 else torch.sin(x)


class Attention(nn.Module):
    def forward(self, x):
        u = x.reshape(x.shape[0], 2, 2)
        return nn.functional.scaled_dot_product_attention(u, u, u).flatten(1)


TORCH = {
    "Conv1d": (nn.Sequential(nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 2, 3)), r"'1' \(aten\.conv1d.*convolution"),
    "LayerNorm": (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), r"'1' \(aten\.layer_norm.*standard"),
    "Softmax": (nn.Sequential(nn.Linear(WIDTH, 3), nn.Softmax(1)), r"'1' \(aten\.softmax.*sum over all"),
    "MaxPool1d": (nn.Sequential(nn.Unflatten(1, (1, WIDTH)), nn.MaxPool1d(2)), r"'1' \(aten\.max_pool1d.*maximum"),
    "Hardswish": (nn.Hardswish(), r"aten\.hardswish.*kinks; use its smooth"),
    "Dropout in training": (nn.Sequential(nn.Dropout(0.5)), r"'0' \(aten\.dropout.*eval\(\)"),
    "BatchNorm in training": (
        nn.BatchNorm1d(WIDTH),
        r"aten\.add_\..*changes its own buffers, as batch norm.*eval\(\)",
    ),
    "attention": (Attention(), r"scaled_dot_product_attention.*attention"),
    "matrix product": (Function(lambda x: x @ x.transpose(0, 1)), "keep one row per point"),
    "rows mixed": (Function(lambda x: x - x.mean(0)), r"aten\.mean.*keep one row per point"),
    "rows reversed": (Function(lambda x: x.flip(0)), "rows depend on each other"),
    "floor": (Function(torch.floor), "aten.floor.*constant in pieces"),
    "where": (Function(lambda x: torch.where(x > 0, x, 2 * x)), "chooses by a comparison"),
    "random": (Function(lambda x: x + torch.rand_like(x)), "draws random numbers|is not among"),
    "argmax": (Function(lambda x: x.argmax(1, keepdim=True)), "aten.argmax.*constant in pieces"),
    "control flow": (Branches(), r"forward, line \d+.*decides by values"),
    "two outputs": (Function(lambda x: (x, 2 * x)), "returns 2 values"),
    "constant": (Function(lambda x: torch.ones(3, 1)), "does not depend on the input"),
    "ReLU": (nn.Sequential(nn.Linear(WIDTH, 2), nn.ReLU()), r"'1' \(aten\.relu.*linear in pieces.*allow_kinks"),
    "LeakyReLU": (nn.Sequential(nn.Linear(WIDTH, 2), nn.LeakyReLU()), r"'1' \(aten\.leaky_relu.*linear in pieces"),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_modules(name):
    module, message = TORCH[name]
    with pytest.raises(UnsupportedError, match=message):
        hessquik.from_torch(module, torch.zeros(WIDTH))


def test_inputs_of_integers_are_refused():
    with pytest.raises(UnsupportedError, match="real numbers"):
        hessquik.from_torch(nn.Embedding(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="pass example_input"):
        hessquik.from_torch(nn.Tanh())


def onnx_model(node, kind=onnx.TensorProto.DOUBLE, opsets=(("", 20), ("ai.onnx.ml", 3), ("mine", 1))):
    """A model of one node behind a tanh."""
    inputs = [helper.make_tensor_value_info("x", kind, ["n", WIDTH])]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    graph = helper.make_graph([helper.make_node("Tanh", ["x"], ["t"], "first"), node], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*each) for each in opsets], ir_version=9)


@pytest.mark.parametrize("operator", sorted(onnx_operations.REFUSED))
def test_onnx_operators_with_a_reason(operator):
    """Every operator of the table, whatever its other inputs."""
    does, instead = onnx_operations.REFUSED[operator]
    model = onnx_model(helper.make_node(operator, ["t"], ["y"], "second"))
    with pytest.raises(UnsupportedError) as caught:
        hessquik.from_onnx(model)
    assert str(caught.value) == f"node second ({operator}) {does}; {instead}"


@pytest.mark.parametrize("operator", ["Det", "Einsum", "Tan", "Resize", "STFT", "Trilu", "EyeLike", "CumProd"])
def test_onnx_operators_that_nobody_knows(operator):
    with pytest.raises(UnsupportedError, match=rf"second \({operator}\) is not among the operators"):
        hessquik.from_onnx(onnx_model(helper.make_node(operator, ["t"], ["y"], "second")))


def test_onnx_models_of_other_kinds():
    with pytest.raises(UnsupportedError, match=r"second \(mine\.Tanh\) is an operator of your own"):
        hessquik.from_onnx(onnx_model(helper.make_node("Tanh", ["t"], ["y"], "second", domain="mine")))
    with pytest.raises(UnsupportedError, match=r"x must hold real numbers.*INT64"):
        hessquik.from_onnx(onnx_model(helper.make_node("Tanh", ["t"], ["y"]), onnx.TensorProto.INT64))
    with pytest.raises(UnsupportedError, match=r"second \(MatMul\) multiplies values that both depend"):
        hessquik.from_onnx(_gram())


def _gram():
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, [3, 3])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, [3, 3])]
    node = helper.make_node("MatMul", ["x", "x"], ["y"], "second")
    graph = helper.make_graph([node], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_every_reason_says_what_to_do_instead():
    for table in (torch_operations.REFUSED, onnx_operations.REFUSED):
        assert all(does and instead for does, instead in table.values())
    assert len(torch_operations.REFUSED) + len(onnx_operations.REFUSED) >= 150


def test_no_operation_is_both_supported_and_refused():
    assert not {*torch_operations.POINTWISE, *torch_operations.ADDITIVE} & torch_operations.REFUSED.keys()
    assert not {*onnx_operations.POINTWISE, *onnx_operations.ADDITIVE} & onnx_operations.REFUSED.keys()
    assert all(f"`{name}`" in support.table() for name in ("tanh", "Gemm", "MLPRegressor"))
