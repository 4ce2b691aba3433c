"""A row's bits do not depend on the other rows, on its place, or on how many there are."""

import itertools

import pytest
import torch

from hessquik import Evaluator
from hessquik.activations import softplusActivation, tanhActivation
from hessquik.calculus import QUANTITIES
from hessquik.layers import quadraticICNNLayer, resnetLayer, singleLayer
from hessquik.networks import ICNN, NN
from tests.engine.test_evaluator import BACKENDS, DTYPES
from tests.whole import choose

#: Widths and outputs of the quantities that are asked alone.
SHAPES = choose([(8, 9), (19, 1), (45, 9)], list(itertools.product((8, 19, 32, 45, 64), (1, 9))))
#: Numbers of the rows beside a good one.
HOSTILE = (0.0, 1e30, 1e-40, float("inf"), float("nan"))


def bits(out, row=slice(None)):
    """Return all quantities of some rows as integers, so that comparisons are bit for bit."""
    integer = {4: torch.int32, 8: torch.int64}
    found = [getattr(out, name)[row] for name in QUANTITIES]
    return [part.view(integer[part.element_size()]) for part in found]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def network(width, d=3, m=2, dtype=torch.float32):
    torch.manual_seed(width)
    act = tanhActivation() if width % 2 else softplusActivation()
    return NN(singleLayer(d, width, act), resnetLayer(width, 0.5, act), singleLayer(width, m)).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [range(first, first + 26) for first in range(1, 131, 26)], ids=str)
def test_a_row_alone_and_among_others_has_the_same_bits(widths, dtype, backend):
    # torch's kernels differ by the width's remainder alone
    for width in widths[:: 5 if backend == "torch" else choose(5, 1)]:
        evaluate = Evaluator(network(width, dtype=dtype), backend=backend)
        x = torch.randn(19, 3, dtype=dtype)
        v = torch.randn(2, 3, dtype=dtype)
        whole = evaluate(x, QUANTITIES, None, v)
        for row in (0, 18):
            assert same(bits(evaluate(x[row : row + 1], QUANTITIES, None, v)), bits(whole, slice(row, row + 1))), (
                width
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("quantity", ["jvp", "hvp", "curvature", "laplacian"])
def test_so_has_a_quantity_that_is_asked_alone(quantity, k, dtype, backend):
    """A quantity alone has its own plan; directions are shared by all rows or given for each."""
    for width, m in SHAPES:
        evaluate = Evaluator(network(width, 5, m, dtype), backend=backend)
        n = 2 * evaluate.tile_rows[-1] + 3
        x, each = torch.randn(n, 5, dtype=dtype), torch.randn(n, k, 5, dtype=dtype)
        for v in (each[0], each):
            whole = getattr(evaluate(x, (quantity,), None, v), quantity)
            for pick in (slice(0, 1), slice(n - 1, n), slice(2, 5), slice(n - 9, n)):
                some = getattr(evaluate(x[pick], (quantity,), None, v if v.ndim == 2 else v[pick]), quantity)
                assert torch.equal(some, whole[pick]), (width, m, pick)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 10, 33, 100])
def test_counts_and_places_do_not_matter(d, dtype, backend):
    evaluate = Evaluator(network(37, d, 3, dtype), backend=backend)
    tile = evaluate.tile_rows[-1]
    x = torch.randn(2 * tile + 3, d, dtype=dtype)
    v = torch.randn(2, d, dtype=dtype)
    whole = evaluate(x, QUANTITIES, None, v)
    for count in sorted({1, 2, 3, 5, 8, 9, *evaluate.tile_rows, tile + 1}):
        some = x[-count:]
        assert same(bits(evaluate(some, QUANTITIES, None, v)), bits(whole, slice(len(x) - count, None))), count
    turned = torch.randperm(len(x))
    again = evaluate(x[turned], QUANTITIES, None, v)
    assert same(bits(again), [part[turned] for part in bits(whole)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind",
    [
        lambda dtype: network(21, dtype=dtype),
        lambda dtype: network(16, 40, 1, dtype),
        lambda dtype: NN(ICNN(5, [None, 9, 6]), quadraticICNNLayer(5, 6, 3)).to(dtype),
    ],
    ids=["odd width", "many inputs", "convex"],
)
def test_hostile_companions_leave_a_row_as_it_is(kind, dtype, backend):
    net = kind(dtype)
    evaluate = Evaluator(net, backend=backend)
    d, rows = net.dim_input(), 2 * evaluate.tile_rows[-1]
    row, v = torch.randn(1, d, dtype=dtype), torch.randn(2, d, dtype=dtype)
    alone = bits(evaluate(row, QUANTITIES, None, v))
    for companion, place in itertools.product(HOSTILE, (0, 3, rows - 1)):
        x = torch.full((rows, d), companion, dtype=dtype)
        x[place] = row
        among = evaluate(x, QUANTITIES, None, v)
        assert same(bits(among, slice(place, place + 1)), alone), (companion, place)
        again = evaluate(row, QUANTITIES, None, v)
        assert same(bits(again), alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_or_infinity_shows(backend):
    evaluate = Evaluator(network(16), backend=backend)
    x = torch.zeros(3, 3)
    x[1, 2] = float("nan")
    out = evaluate(x, ("value", "gradient", "hessian"))
    assert out.value[1].isnan().all()
    assert out.hessian[1].isnan().all()
    assert out.hessian[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_directions_of_each_row_are_its_own(backend):
    evaluate = Evaluator(network(24), backend=backend)
    n = 70
    x, weights, v = torch.randn(n, 3), torch.randn(n, 2), torch.randn(n, 4, 3)
    whole = evaluate(x, QUANTITIES, weights, v)
    for i in (0, 33, 69):
        pick = slice(i, i + 1)
        assert same(bits(evaluate(x[pick], QUANTITIES, weights[pick], v[pick])), bits(whole, pick)), i
