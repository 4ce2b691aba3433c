"""Random networks of every kind: all methods to compute derivatives agree with each other and with torch.func."""

import random

import pytest
import torch

from tests import oracle
from tests.engine import random_networks as draws
from tests.whole import choose

NETWORKS, PARTS = choose(256, 2048), 8
#: Rounding alone; relative to the largest entry, see oracle.difference.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
MODES = {"automatic": {}, "forward": {"forward_mode": True}, "backward": {"forward_mode": False}}
SAMPLES = (0, 1, 2, 7)
#: Weights are made smaller until nothing exceeds this, since a few exponentials in a row overflow.
LARGEST = 1e4


def case(seed):
    """Return a random network, points and the oracle's value, gradient and Hessian."""
    draw = random.Random(seed)
    d, m = draws.shapes()[seed % 16]
    n = SAMPLES[seed // 16 % 4]
    dtype = torch.float32 if seed // 64 % 4 == 3 else torch.float64
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=dtype, generator=generator).double()
    network = draws.convex_network(draw, d) if seed % 5 == 0 else draws.network(draw, d, m)
    network.requires_grad_(False)
    for scale in (0.6, 0.3, 0.1):
        draws.tame(network, seed, scale).to(dtype).double()
        expected = oracle.derivatives(network, x, network.dim_output())
        if all(bool((part.abs() < LARGEST).all()) for part in expected):
            return network.to(dtype), x.to(dtype), expected
    raise AssertionError(f"network {seed} is too wild to be a test")


@pytest.mark.parametrize("part", range(PARTS))
def test_every_way_gives_the_derivatives_of_torch_func(part):
    for seed in range(part, NETWORKS, PARTS):
        network, x, (value, gradient, hessian) = case(seed)
        laplacian = torch.einsum("naam->nm", hessian).unsqueeze(1)
        for mode, arguments in MODES.items():
            f, g, h = network(x, do_gradient=True, do_Hessian=True, **arguments)
            for got, expected in ((f, value), (g, gradient), (h, hessian)):
                assert oracle.difference(got, expected) <= TOLERANCE[x.dtype], (seed, mode)
            assert oracle.difference(h, h.transpose(1, 2)) <= TOLERANCE[x.dtype], (seed, mode)
            if mode != "backward":  # the Laplacian has no backward mode
                _, none, trace = network(x, do_Laplacian=True, **arguments)
                assert none is None
                assert oracle.difference(trace, laplacian) <= TOLERANCE[x.dtype], (seed, mode)
        if seed % 5 == 0 and x.dtype is torch.float64 and x.shape[0]:
            eigenvalues = torch.linalg.eigvalsh(h.permute(0, 3, 1, 2))
            assert float(eigenvalues.min()) >= -1e-9, seed


def test_the_cases_are_of_every_kind():
    names, nested, regrouped = set(), 0, 0
    for seed in range(200):
        draw = random.Random(seed)
        network = draws.network(draw, *draws.shapes()[seed % 16])
        names |= {type(module).__name__ for module in network.modules()}
        nested += any("." in place for place, _ in network.named_layers())
        widths = [layer.input_widths() for layer in network.layers()]
        regrouped += sum(len(parts) == 2 and i == 0 for i, parts in enumerate(widths))
    assert {"singleLayer", "resnetLayer", "ICNNLayer", "quadraticLayer", "quadraticICNNLayer"} <= names
    assert set(draws.ALL) <= names
    assert nested > 20
    assert regrouped > 5
