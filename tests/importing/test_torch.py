"""Random torch modules: values and both derivatives against automatic differentiation of the module."""

import pytest
import torch

import hessquik
from hessquik.proof import backends
from tests.importing import torch_networks
from tests.importing.comparison import TOLERANCE, worst_error
from tests.whole import choose


def points(d, seed=0):
    """Return three points."""
    return torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("start", range(0, choose(50, 1000), 50))
@pytest.mark.slow
def test_random_modules(start):
    for seed in range(start, start + 50):
        module, d = torch_networks.module(seed)
        network = hessquik.from_torch(module, points(d))
        assert next(network.parameters()).dtype is torch.float64
        assert worst_error(network, module, points(d)) <= TOLERANCE, seed


@pytest.mark.slow
def test_random_modules_of_physical_inputs():
    for seed in range(choose(20, 200)):
        module, d = torch_networks.module(seed)
        mean, scale = torch.full((d,), 1e5, dtype=torch.float64), torch.full((d,), 100.0, dtype=torch.float64)
        scaling = {"input_mean": mean.tolist(), "input_scale": scale.tolist()}
        network = hessquik.from_torch(module, points(d), **scaling)
        x = mean + scale * points(d)

        def f(x, module=module, mean=mean, scale=scale):
            return module((x - mean) / scale)

        assert worst_error(network, f, x) <= TOLERANCE, seed


@pytest.mark.parametrize("backend", backends())
def test_random_modules_on_every_backend(backend):
    for seed in range(10):
        module, d = torch_networks.module(seed)
        network = hessquik.from_torch(module, points(d))
        assert worst_error(network, module, points(d), backend) <= TOLERANCE, seed


@pytest.mark.slow
def test_random_modules_with_kinks():
    for seed in range(choose(20, 200)):
        module, d = torch_networks.module(seed, torch_networks.KINKED)
        network = hessquik.from_torch(module, points(d), allow_kinks=True)
        assert worst_error(network, module, points(d)) <= TOLERANCE, seed


def test_many_layers_that_keep_all_features():
    torch.manual_seed(0)
    parts = []
    for layer in range(60):
        hidden = torch.nn.Sequential(torch.nn.Linear(2 + 16 * layer, 16), torch.nn.Tanh())
        parts.append(torch_networks.Dense(hidden))
    module = torch.nn.Sequential(*parts, torch.nn.Linear(2 + 16 * 60, 1)).double()
    assert worst_error(hessquik.from_torch(module), module, points(2)) <= TOLERANCE


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Identity(),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout().eval()),
        torch_networks.Function(lambda x: 2 * x[:, :1]),
        torch_networks.Function(torch.nn.functional.glu),
        torch_networks.Function(lambda x: torch.einsum("nd,dh->nh", x, torch.ones(4, 3, dtype=x.dtype).cumsum(1))),
        torch_networks.Function(lambda x: torch.nn.functional.pad(x, (1, 2), value=0.5) ** 2),
        torch_networks.Function(lambda x: 1.5**x + torch.pow(2, -x)),
        torch_networks.Residual(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()), 0.3).double(),
    ],
    ids=["identity", "flatten", "linear", "glu", "einsum", "pad", "powers", "residual"],
)
def test_small_modules(module):
    assert worst_error(hessquik.from_torch(module, points(4)), module, points(4)) <= TOLERANCE
