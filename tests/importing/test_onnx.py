"""Random ONNX graphs: values and both derivatives against automatic differentiation of the same function in torch."""

import numpy as np
import onnxruntime
import pytest
import torch

import hessquik
from hessquik.proof import backends
from tests.importing import onnx_networks
from tests.importing.comparison import TOLERANCE, error, worst_error
from tests.whole import choose


def points(d, seed=0):
    """Three points."""
    return torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("start", range(0, choose(150, 1000), 50))
def test_random_graphs(start):
    for seed in range(start, start + 50):
        model, d, f = onnx_networks.model(seed)
        network = hessquik.from_onnx(model)
        assert next(network.parameters()).dtype is torch.float64
        assert worst_error(network, f, points(d)) <= TOLERANCE, seed


@pytest.mark.parametrize("backend", backends())
def test_random_graphs_on_every_backend(backend):
    for seed in range(10):
        model, d, f = onnx_networks.model(seed)
        assert worst_error(hessquik.from_onnx(model), f, points(d), backend) <= TOLERANCE, seed


def test_random_graphs_with_kinks():
    for seed in range(choose(50, 200)):
        model, d, f = onnx_networks.model(seed, onnx_networks.KINKED)
        network = hessquik.from_onnx(model, allow_kinks=True)
        assert worst_error(network, f, points(d)) <= TOLERANCE, seed


def test_float32_graphs_have_the_values_of_onnxruntime():
    for seed in range(choose(50, 300)):
        model, d, _ = onnx_networks.model(seed, dtype=np.float32)
        network = hessquik.from_onnx(model)
        x = points(d).float()
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        expected = torch.as_tensor(session.run(None, {"x": x.numpy()})[0])
        assert error(network(x)[0].detach(), expected) <= 1e-5, seed
