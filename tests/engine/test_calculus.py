"""All quantities of random networks against the oracle's gradient and Hessian."""

import random
from itertools import combinations

import pytest
import torch

from hessquik import calculus
from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import tanhActivation
from hessquik.calculus import QUANTITIES
from hessquik.errors import ShapeError
from tests import oracle
from tests.engine import random_networks as draws

TOLERANCE = 1e-10  # rounding in float64
WEIGHTS = ("none", "shared", "per sample")
DIRECTIONS = ("shared", "per sample")


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(seed, n=3):
    draw = random.Random(seed)
    f = draws.tame(draws.network(draw, *draws.shapes()[seed % 16]), seed, scale=0.3).requires_grad_(False)
    x = randn(n, f.dim_input(), seed=seed)
    return f, x, oracle.derivatives(f, x, f.dim_output())


def lower_triangle(hessian):
    d = hessian.shape[1]
    rows = [hessian[:, a, b] for a in range(d) for b in range(a + 1)]
    return torch.stack(rows, dim=1)


def expected_quantities(value, gradient, hessian, weights, v):
    """Return every quantity by its definition; v (n, k, d)."""
    if weights is not None:
        value = (value * weights).sum(-1, keepdim=True)
        gradient = (gradient * weights[:, None]).sum(-1, keepdim=True)
        hessian = (hessian * weights[:, None, None]).sum(-1, keepdim=True)
    return {
        "value": value,
        "gradient": gradient,
        "hessian": hessian,
        "laplacian": torch.einsum("naam->nm", hessian),
        "hessian_diagonal": torch.einsum("naam->nam", hessian),
        "jvp": torch.einsum("nka,nam->nkm", v, gradient),
        "hvp": torch.einsum("nabm,nkb->nkam", hessian, v),
        "curvature": torch.einsum("nka,nabm,nkb->nkm", v, hessian, v),
        "hessian_packed": lower_triangle(hessian),
    }


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_all_quantities_are_what_their_names_say(weights, directions, n):
    for seed in range(32):
        f, x, parts = case(seed, n)
        m, d = f.dim_output(), f.dim_input()
        given = None if weights == "none" else randn(1 if weights == "shared" else n, m, seed=seed + 1)
        v = randn(1 if directions == "shared" else n, 2, d, seed=seed + 2)
        found = calculus.evaluate(f.forms(), x, QUANTITIES, given, v)
        everywhere = None if given is None else given.expand(n, -1)
        for name, expected in expected_quantities(*parts, everywhere, v.expand(n, -1, -1)).items():
            assert oracle.difference(getattr(found, name), expected) <= TOLERANCE, (seed, name)


@pytest.mark.parametrize("asked", [*combinations(QUANTITIES, 1), *combinations(QUANTITIES, 2)], ids="+".join)
def test_any_set_of_quantities_gives_what_all_of_them_give(asked):
    f = draws.tame(
        net.NN(
            lay.singleLayer(4, 5, tanhActivation()), net.ICNN(5, [None, 3]), lay.singleLayer(8, 2, tanhActivation())
        ),
        0,
    )
    x, v = randn(3, 4, seed=0), randn(1, 2, 4, seed=1)
    everything = calculus.evaluate(f.forms(), x, QUANTITIES, None, v)
    needs_directions = any(QUANTITIES[name].is_directional for name in asked)
    found = calculus.evaluate(f.forms(), x, asked, None, v if needs_directions else None)
    for name in QUANTITIES:
        if name in asked:
            assert oracle.difference(getattr(found, name), getattr(everything, name)) <= TOLERANCE
        else:
            assert getattr(found, name) is None


@pytest.mark.parametrize("quantity", [name for name, quantity in QUANTITIES.items() if quantity.is_directional])
def test_directions_are_expected_where_they_are_needed(quantity):
    f = net.fullyConnectedNN([3, 4, 2], tanhActivation())
    with pytest.raises(ShapeError, match="expect directions"):
        calculus.evaluate(f.forms(), torch.zeros(2, 3), {quantity})


def test_permuting_samples_permutes_the_answer_and_a_batch_is_the_stack_of_singles():
    f, x, _ = case(5, n=7)
    v = randn(1, 2, f.dim_input(), seed=1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    whole = calculus.evaluate(f.forms(), x, QUANTITIES, None, v)
    permuted = calculus.evaluate(f.forms(), x[order], QUANTITIES, None, v)
    singles = [calculus.evaluate(f.forms(), row[None], QUANTITIES, None, v) for row in x]
    for name in QUANTITIES:
        expected = getattr(whole, name)
        assert oracle.difference(getattr(permuted, name), expected[order]) <= TOLERANCE
        assert oracle.difference(torch.cat([getattr(single, name) for single in singles]), expected) <= TOLERANCE


def test_the_forms_of_a_network_are_its_weights_as_they_are_now():
    f = net.fullyConnectedNN([2, 3, 1], tanhActivation())
    x = torch.ones(1, 2)
    before = calculus.evaluate(f.forms(), x, {"value"}).value
    with torch.no_grad():
        f[1].b.add_(1.0)
    assert not torch.equal(calculus.evaluate(f.forms(), x, {"value"}).value, before)
