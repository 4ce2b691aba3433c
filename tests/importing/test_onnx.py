"""Random ONNX graphs: values and both derivatives against automatic differentiation of the same function in torch."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph, NotImplemented

import hessquik
from hessquik.proof import backends
from tests.importing import onnx_networks
from tests.importing.comparison import TOLERANCE, error, worst_error
from tests.whole import choose

#: Operators that onnxruntime computes in float32, whatever their input is.
ROUNDED = {"Gelu", "GroupNormalization", "LayerNormalization", "RMSNormalization"}


def points(d, seed=0):
    """Return three points."""
    return torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_onnxruntime(model, x):
    """Return onnxruntime's outputs, or nothing where it lacks an operator in float64."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except (NotImplemented, InvalidGraph):
        return None
    return torch.as_tensor(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("start", range(0, choose(50, 1000), 50))
def test_random_graphs(start):
    for seed in range(start, start + 50):
        model, d, f = onnx_networks.model(seed)
        network = hessquik.from_onnx(model)
        assert next(network.parameters()).dtype is torch.float64
        assert worst_error(network, f, points(d)) <= TOLERANCE, seed
        values = by_onnxruntime(model, points(d))
        bound = 1e-6 if {node.op_type for node in model.graph.node} & ROUNDED else TOLERANCE
        assert values is None or error(network(points(d))[0].detach(), values) <= bound, seed


@pytest.mark.parametrize("backend", backends())
def test_random_graphs_on_every_backend(backend):
    for seed in range(10):
        model, d, f = onnx_networks.model(seed)
        assert worst_error(hessquik.from_onnx(model), f, points(d), backend) <= TOLERANCE, seed


def test_random_graphs_with_kinks():
    for seed in range(choose(25, 200)):
        model, d, f = onnx_networks.model(seed, onnx_networks.KINKED)
        network = hessquik.from_onnx(model, allow_kinks=True)
        assert worst_error(network, f, points(d)) <= TOLERANCE, seed


def test_float32_graphs_have_the_values_of_onnxruntime():
    """It lacks Swish; products are differences of squares here, which have a digit less."""
    compared, graphs = 0, choose(25, 1000)
    for seed in range(graphs):
        model, d, _ = onnx_networks.model(seed, dtype=np.float32)
        network, x = hessquik.from_onnx(model), points(d).float()
        expected = by_onnxruntime(model, x)
        compared += expected is not None
        assert expected is None or error(network(x)[0].detach(), expected) <= 1e-5, seed
    assert compared >= 0.9 * graphs


def test_onnxruntime_has_the_operators_of_enough_graphs_in_float64():
    x = {d: points(d) for d in range(1, 5)}
    models = [onnx_networks.model(seed) for seed in range(100)]
    assert sum(by_onnxruntime(model, x[d]) is not None for model, d, _ in models) >= 25
