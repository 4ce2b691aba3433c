"""Every activation against 50-digit arithmetic, also at the largest and smallest numbers of both dtypes."""

import copy
import pickle

import mpmath
import pytest
import torch

from hessquik.activations import ACTIVATIONS, hessQuikActivationFunction, softplusActivation, tanhActivation
from hessquik.errors import OrderError
from hessquik.layers import resnetLayer, singleLayer
from hessquik.networks import NN
from hessquik.proof import prove

FUNCTIONS = {
    "antiTanhActivation": lambda x: mpmath.log(2 * mpmath.cosh(x)),
    "arctanActivation": mpmath.atan,
    "eluActivation": lambda x: x if x > 0 else mpmath.expm1(x),
    "expActivation": mpmath.exp,
    "expressionActivation": lambda x: x / (1 + mpmath.exp(-x)),
    "gaussianActivation": lambda x: mpmath.exp(-(x**2)),
    "geluActivation": lambda x: x * mpmath.ncdf(x),
    "geluTanhActivation": lambda x: (
        x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3)))
    ),
    "identityActivation": lambda x: x,
    "mishActivation": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
    "quadraticActivation": lambda x: x**2 / 2,
    "reluActivation": lambda x: max(x, 0),
    "sigmoidActivation": lambda x: 1 / (1 + mpmath.exp(-x)),
    "siluActivation": lambda x: x / (1 + mpmath.exp(-x)),
    "sinActivation": mpmath.sin,
    "softplusActivation": lambda x: mpmath.log1p(mpmath.exp(x)),
    "softsignActivation": lambda x: x / (1 + abs(x)),
    "tanhActivation": mpmath.tanh,
}
INF = float("inf")
# σ, σ', σ'' at −1e30 and at 1e30.
FAR = {
    "antiTanhActivation": ((1e30, -1, 0), (1e30, 1, 0)),
    "arctanActivation": ((-mpmath.pi / 2, 0, 0), (mpmath.pi / 2, 0, 0)),
    "eluActivation": ((-1, 0, 0), (1e30, 1, 0)),
    "expActivation": ((0, 0, 0), (INF, INF, INF)),
    "expressionActivation": ((0, 0, 0), (1e30, 1, 0)),
    "gaussianActivation": ((0, 0, 0), (0, 0, 0)),
    "geluActivation": ((0, 0, 0), (1e30, 1, 0)),
    "geluTanhActivation": ((0, 0, 0), (1e30, 1, 0)),
    "identityActivation": ((-1e30, 1, 0), (1e30, 1, 0)),
    "quadraticActivation": ((5e59, -1e30, 1), (5e59, 1e30, 1)),
    "mishActivation": ((0, 0, 0), (1e30, 1, 0)),
    "reluActivation": ((0, 0, 0), (1e30, 1, 0)),
    "sigmoidActivation": ((0, 0, 0), (1, 0, 0)),
    "siluActivation": ((0, 0, 0), (1e30, 1, 0)),
    "softplusActivation": ((0, 0, 0), (1e30, 1, 0)),
    "softsignActivation": ((-1, 0, 0), (1, 0, 0)),
    "tanhActivation": ((-1, 0, 0), (1, 0, 0)),
}
# A few units in the last place, of the largest of 1 and the result.
TOLERANCE = {torch.float64: 4e-15, torch.float32: 2e-6}
DTYPES = (torch.float32, torch.float64)
NAMES = sorted(ACTIVATIONS)


def expected(name, x, order):
    with mpmath.workdps(50):
        return float(mpmath.diff(FUNCTIONS[name], mpmath.mpf(x), order))


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(FUNCTIONS) == set(FAR) | {"sinActivation"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_equal_those_of_50_digit_arithmetic(name, dtype):
    points = [0.0, 1e-30, -1e-8, *(k / 2 for k in range(-12, 13)), -19.5, -37.0, 13.3, 19.5]
    act = ACTIVATIONS[name]()
    x = torch.tensor([point for point in points if abs(point) > 0.1 or act.continuous_derivatives >= 2], dtype=dtype)
    for order, got in enumerate(act.jet(x, 2)):
        assert got.dtype is dtype
        want = torch.tensor([expected(name, p, order) for p in x.tolist()], dtype=torch.float64)
        error = (got.double() - want).abs() / want.abs().clamp(min=1.0)
        assert float(error.max()) <= TOLERANCE[dtype], (order, x[error.argmax()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FAR))
def test_far_out_every_activation_takes_its_limits(name, dtype):
    x = torch.tensor([-1e30, 1e30], dtype=dtype)
    want = torch.tensor(FAR[name], dtype=torch.float64).T.to(dtype)
    torch.testing.assert_close(torch.stack(ACTIVATIONS[name]().jet(x, 2)), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sine_far_out_is_the_sine_of_the_very_number(dtype):
    x = torch.tensor([-1e30, 1e30, 12345.678], dtype=dtype)
    with mpmath.workdps(80):
        want = [[float(g(mpmath.mpf(p))) for p in x.tolist()] for g in (mpmath.sin, mpmath.cos)]
    sigma, dsigma, d2sigma = ACTIVATIONS["sinActivation"]().jet(x, 2)
    torch.testing.assert_close(sigma, torch.tensor(want[0], dtype=dtype))
    torch.testing.assert_close(dsigma, torch.tensor(want[1], dtype=dtype))
    assert torch.equal(d2sigma, -sigma)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_nan_but_nan(name, dtype):
    powers = torch.tensor([10.0**k for k in range(-38, 39)], dtype=dtype)
    x = torch.cat([-powers, torch.zeros(1, dtype=dtype), powers])
    for got in ACTIVATIONS[name]().jet(x, 2):
        assert not got.isnan().any()
    sigma, dsigma, d2sigma = ACTIVATIONS[name]().jet(torch.tensor([torch.nan, 1.0], dtype=dtype), 2)
    assert sigma[0].isnan()
    constant = {"identityActivation": 2, "quadraticActivation": 1, "reluActivation": 1}.get(name, 0)
    assert dsigma[0].isnan() or constant >= 2
    assert d2sigma[0].isnan() or constant >= 1
    assert torch.isfinite(torch.stack([sigma, dsigma, d2sigma])[:, 1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_differentiable_everywhere(name):
    x = torch.tensor([-1e30, -50.0, -1.0, 0.0, 1.0, 50.0, 600.0], dtype=torch.float64, requires_grad=True)
    for order, got in enumerate(ACTIVATIONS[name]().jet(x, 2)):
        if not got.requires_grad:
            continue
        (slope,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
        assert not slope.isnan().any(), order


@pytest.mark.parametrize("name", NAMES)
def test_the_two_steps_give_what_the_one_does(name):
    act, x = ACTIVATIONS[name](), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    sigma, dsigma, d2sigma = act(x, do_gradient=True, do_Hessian=True)
    kept, *none = act(x, forward_mode=None)
    assert none == [None, None]
    assert torch.equal(kept, sigma)
    for got, want in zip(act.backward(do_Hessian=True), (dsigma, d2sigma), strict=True):
        assert torch.equal(got, want)
    assert act(x)[1:] == (None, None)
    assert act(x, do_Hessian=True)[1] is None
    act(x, forward_mode=None)
    assert act.backward()[1] is None


@pytest.mark.parametrize("name", NAMES)
def test_compute_derivatives_takes_what_evaluate_gave(name):
    act, x = ACTIVATIONS[name](), torch.tensor([0.3, -0.2], dtype=torch.float64)
    sigma, args = act.evaluate(x)
    assert torch.equal(sigma, act(x)[0])
    dsigma, d2sigma = act.compute_derivatives(*args, do_Hessian=True)
    assert dsigma.shape == d2sigma.shape == x.shape
    assert act.compute_derivatives(*args)[1] is None


def test_backward_without_its_forward_is_refused():
    act = tanhActivation()
    with pytest.raises(OrderError, match=r"tanhActivation\.backward"):
        act.backward()
    act(torch.zeros(2), forward_mode=None)
    first, second = act.backward(do_Hessian=True), act.backward(do_Hessian=True)
    assert all(map(torch.equal, first, second))  # the state stays
    for copied in (copy.deepcopy(act), pickle.loads(pickle.dumps(act))):
        with pytest.raises(OrderError):
            copied.backward()


class documentedCubic(hessQuikActivationFunction):
    """A custom activation in the style of the original hessQuik, with state in ``ctx``."""

    def forward(self, x, do_gradient=False, do_Hessian=False, forward_mode=True):
        dsigma, d2sigma = None, None
        if do_gradient or do_Hessian:
            if forward_mode is not None:
                dsigma, d2sigma = self.compute_derivatives(x, do_Hessian=do_Hessian)
            else:
                self.ctx = (x,)
        return x**3 / 3, dsigma, d2sigma

    def compute_derivatives(self, *args, do_Hessian=False):
        (x,) = args
        return x**2, 2 * x if do_Hessian else None


@pytest.mark.slow
def test_an_activation_written_for_the_original_works_everywhere():
    act, x = documentedCubic(), torch.tensor([0.5, -2.0], dtype=torch.float64)
    assert all(map(torch.equal, act.jet(x, 2), (x**3 / 3, x**2, 2 * x)))
    assert act.jet(x, 0)[1:] == (None, None)
    assert act.jet(x, 1)[2] is None
    act(x, do_gradient=True, do_Hessian=True, forward_mode=None)
    for _ in range(2):
        assert all(map(torch.equal, act.backward(do_Hessian=True), (x**2, 2 * x)))
    f = NN(singleLayer(2, 4, documentedCubic()), resnetLayer(4, 0.5, documentedCubic()), singleLayer(4, 2)).double()
    assert all(row.passed for row in prove(f))


def test_what_an_activation_lacks_is_named():
    class emptyActivation(hessQuikActivationFunction):
        pass

    with pytest.raises(NotImplementedError, match=r"emptyActivation must define evaluate\(x\) and"):
        emptyActivation()(torch.zeros(1))


@pytest.mark.parametrize(("beta", "threshold"), [(0.5, 20.0), (3.0, 20.0), (2.0, 5.0)])
def test_softplus_keeps_its_steepness_and_threshold(beta, threshold):
    act = softplusActivation(beta, threshold)
    edge = threshold / beta
    x = torch.tensor([-1.0, 0.2, 0.99 * edge, 1.01 * edge], dtype=torch.float64)
    sigma, dsigma, d2sigma = act.jet(x, 2)
    below = [mpmath.diff(lambda t: mpmath.log1p(mpmath.exp(beta * t)) / beta, p, 2) for p in x[:3].tolist()]
    torch.testing.assert_close(d2sigma[:3], torch.tensor(list(map(float, below)), dtype=torch.float64))
    assert (sigma[3], dsigma[3], d2sigma[3]) == (x[3], 1, 0)


def test_the_base_class_computes_nothing():
    base = hessQuikActivationFunction()
    with pytest.raises(NotImplementedError):
        base(torch.zeros(1))
    with pytest.raises(NotImplementedError):
        base.compute_derivatives(torch.zeros(1))
