"""Random torch modules: values and both derivatives against automatic differentiation of the module."""

import pytest
import torch

import hessquik
from hessquik.proof import backends
from tests.importing import torch_networks
from tests.importing.comparison import TOLERANCE, worst_error
from tests.whole import choose


def points(d, seed=0):
    """Three points."""
    return torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("start", range(0, choose(100, 1000), 50))
def test_random_modules(start):
    for seed in range(start, start + 50):
        module, d = torch_networks.module(seed)
        network = hessquik.from_torch(module, points(d))
        assert next(network.parameters()).dtype is torch.float64
        assert worst_error(network, module, points(d)) <= TOLERANCE, seed


@pytest.mark.parametrize("backend", backends())
def test_random_modules_on_every_backend(backend):
    for seed in range(10):
        module, d = torch_networks.module(seed)
        network = hessquik.from_torch(module, points(d))
        assert worst_error(network, module, points(d), backend) <= TOLERANCE, seed


def test_random_modules_with_kinks():
    for seed in range(choose(40, 200)):
        module, d = torch_networks.module(seed, torch_networks.KINKED)
        network = hessquik.from_torch(module, points(d), allow_kinks=True)
        assert worst_error(network, module, points(d)) <= TOLERANCE, seed
