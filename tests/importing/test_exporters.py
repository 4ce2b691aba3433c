"""ONNX files as exporters write them: by torch and skl2onnx here, by Keras and JAX as fixtures."""

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from skl2onnx import to_onnx
from sklearn.compose import TransformedTargetRegressor
from sklearn.neural_network import MLPRegressor
from torch import nn

import hessquik
from hessquik import activations as act
from hessquik.errors import UnsupportedError
from tests.importing import sklearn_networks, torch_networks
from tests.importing.comparison import TOLERANCE, error, worst_error
from tests.whole import choose

#: Written by tests/fixtures/make_exported.py.
EXPORTED = sorted((Path(__file__).parents[1] / "fixtures" / "exported").glob("*.onnx"))


def points(d, seed=0):
    """Return three points."""
    return torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.stem)
def test_keras_and_jax(path):
    own = safetensors.torch.load_file(path.with_suffix(".safetensors"))
    network = hessquik.from_onnx(path, own["x"])
    got = network(own["x"], do_gradient=True, do_Hessian=True)
    for found, name in zip(got, ("value", "gradient", "hessian"), strict=True):
        assert error(found.detach(), own[name]) <= TOLERANCE, name


def test_activations_that_keras_and_jax_spread_over_nodes_are_one_activation():
    assert len(EXPORTED) == 4
    found = set()
    for path in EXPORTED:
        x = safetensors.torch.load_file(path.with_suffix(".safetensors"))["x"]
        found |= {type(part) for part in hessquik.from_onnx(path, x).modules()}
    assert {act.mishActivation, act.siluActivation, act.geluTanhActivation, act.softplusActivation} <= found
    assert act.quadraticActivation not in found, "a product of two functions of one value is one function"


def exported(module, d, dynamo=True):
    """Return a module as torch.onnx exports it, without its log lines about optional packages."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.eps = float(np.float32(part.eps))  # ONNX has it in float32
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = (torch.zeros(3, d, dtype=torch.float64),)
            if not dynamo:
                import io

                torch.onnx.export(
                    module,
                    example,
                    buffer := io.BytesIO(),
                    dynamo=False,
                    dynamic_axes={"x": {0: "n"}},
                    input_names=["x"],
                )
                return onnx.load_from_string(buffer.getvalue())
            sizes = ({0: torch.export.Dim("n")},)
            return torch.onnx.export(module, example, dynamo=True, verbose=False, dynamic_shapes=sizes).model_proto
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.slow
def test_torch_with_every_activation(dynamo):
    """Its exporter writes softplus as a choice, and CELU in float32."""
    torch.manual_seed(0)
    smooth = [make() for make in torch_networks.SMOOTH if dynamo or not isinstance(make(), nn.CELU)]
    layers = [part for each in smooth for part in (nn.Linear(4, 4), each)]
    module = nn.Sequential(nn.BatchNorm1d(4), *layers, nn.Dropout(), nn.Linear(4, 2)).double().eval()
    model = exported(module, 4, dynamo)
    assert worst_error(hessquik.from_onnx(model), module, points(4)) <= TOLERANCE


@pytest.mark.slow
def test_random_modules_exported_by_torch():
    for seed in range(choose(1, 30)):
        module, d = torch_networks.module(seed, list(torch_networks.SMOOTH))
        assert worst_error(hessquik.from_onnx(exported(module, d)), module, points(d)) <= TOLERANCE, seed


def choice(bound="z", argument="z", factor=1.0):
    """Return where(2z > 20, z, softplus(2z) / 2), or a variant of it."""
    helper = onnx.helper
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["twice"], "twice"),
        helper.make_node("Greater", [{"z": "twice", "x": "x"}[bound], "twenty"], ["far"], "compare"),
        helper.make_node("Softplus", [{"z": "twice", "x": "x"}[argument]], ["p"], "softplus"),
        helper.make_node("Mul", ["p", "factor"], ["q"], "scale"),
        helper.make_node("Where", ["far", "x", "q"], ["y"], "choose"),
    ]
    numbers = {"two": 2.0, "twenty": 20.0, "factor": factor}
    constants = [onnx.numpy_helper.from_array(np.array(number), name) for name, number in numbers.items()]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, ["n", 3]) for name in "xy")
    graph = helper.make_graph(nodes, "choice", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_a_choice_is_softplus_or_is_refused():
    network = hessquik.from_onnx(choice(factor=0.5))
    (found,) = (part for part in network.modules() if isinstance(part, act.softplusActivation))
    assert (found.beta, found.threshold) == (2.0, 20.0)
    x = 6 * points(3)
    assert worst_error(network, nn.Softplus(2.0), x) <= TOLERANCE
    for model in (choice(factor=0.4), choice(bound="x", factor=0.5), choice(argument="x", factor=0.5)):
        with pytest.raises(
            UnsupportedError, match=r"choose \(Where\) chooses by a comparison; use a smooth function"
        ):
            hessquik.from_onnx(model)


@pytest.mark.slow
def test_pipelines_exported_by_skl2onnx():
    """skl2onnx cannot export transformed targets, and reshapes several outputs of a network to one column."""
    found = 0
    for seed in range(choose(60, 1000)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one step of training does not converge
            estimator, d, f = sklearn_networks.estimator(seed, kinds="network")
        if isinstance(estimator, TransformedTargetRegressor):
            continue
        model = to_onnx(estimator, np.zeros((1, d)))
        last = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
        if isinstance(last, MLPRegressor) and last.n_outputs_ > 1:
            with pytest.raises(UnsupportedError, match=r"Reshape.*keep one row per point"):
                hessquik.from_onnx(model)
            continue
        x, found = 3 + 2 * points(d), found + 1
        network = hessquik.from_onnx(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        values = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert error(network(x)[0].detach(), torch.as_tensor(values)) <= TOLERANCE, seed
        assert worst_error(network, f, x) <= TOLERANCE, seed
    assert found >= choose(15, 250)
