"""Remote functions in PyTensor's graphs and in PyMC's NUTS sampler, compared with local evaluation."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator

import numpy as np
import pytest

from hessquik_client import Client, Model, OutsideDomain
from tests.clients.conftest import Zoo
from tests.clients.test_client import Counting

# Once a day arviz announces another version of itself and notes it in a file; processes that test at once would race.
with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    patch.setenv("XDG_CACHE_HOME", cache)
    warnings.simplefilter("ignore")
    import pymc
    import pytensor
    import pytensor.tensor as pt
    from pytensor.gradient import NullTypeGradError, hessian_vector_product

    from hessquik_client.for_pymc import remote_function

pytestmark = [pytest.mark.xdist_group("clients"), pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-12
X = np.random.default_rng(2).normal(size=(6, 3))
V = np.random.default_rng(3).normal(size=(6, 3))
W = np.random.default_rng(4).normal(size=(6, 4))


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Interpret graphs in place of compiling them, which takes seconds."""
    with pytensor.config.change_flags(mode="FAST_COMPILE", compute_test_value="off"):
        yield


@pytest.fixture
def counting(zoo: Zoo) -> Iterator[tuple[Client, Counting]]:
    with Client(zoo.url, transport=(transport := Counting())) as client:
        yield client, transport


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("is_single", [True, False])
def test_values_gradients_and_hessian_products(zoo: Zoo, counting: tuple[Client, Counting], is_single: bool) -> None:
    rows = 0 if is_single else slice(None)
    x0, v0, w0 = X[rows], V[rows], W[rows]
    x = pt.vector("x") if is_single else pt.matrix("x")
    v = pt.vector("v") if is_single else pt.matrix("v")
    y = remote_function(counting[0].model("vector"))(x)
    weighted = (y * w0).sum()
    gradient = pytensor.grad(weighted, x)
    product = hessian_vector_product(weighted, [x], [v])[0]
    f = pytensor.function([x, v], [y, gradient, product])
    value, slope, hv = f(x0, v0)
    truth = zoo.derivatives("vector", X)
    close(value, truth["value"][rows])
    close(slope, np.einsum("naj,nj->na", truth["gradient"], W)[rows])
    close(hv, np.einsum("nabj,nj,nb->na", truth["hessian"], W, V)[rows])
    assert counting[1].methods == {"GET": 1, "POST": 2}  # value and gradient together, then the product
    assert y.type.shape == ((4,) if is_single else (None, 4))


def test_shapes_and_points_outside_are_refused(counting: tuple[Client, Counting]) -> None:
    peaks = counting[0].model("peaks")
    with pytest.raises(ValueError, match=r"expected shape \(2\) or \(n, 2\)"):
        remote_function(peaks)(pt.tensor3("x"))
    with pytest.raises(ValueError, match=r"expected shape \(2\) or \(n, 2\)"):
        remote_function(peaks)(np.zeros(3))
    x = pt.vector("x")
    f = pytensor.function([x], remote_function(peaks, outside="refuse")(x))
    with pytest.raises(OutsideDomain):
        f(np.array([0.0, 9.0]))
    product = hessian_vector_product(remote_function(peaks)(x).sum(), [x], [x])[0]
    with pytest.raises(NullTypeGradError, match="two derivatives"):
        pytensor.grad(product.sum(), x)


def test_nuts_samples_a_posterior_through_the_service(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    """The posterior has one parameter, so that quadrature gives its mean and standard deviation."""
    model: Model = counting[0].model("peaks")
    with pymc.Model():
        t = pymc.Normal("t", 0.0, 0.5)
        height = remote_function(model)(pt.stack([t, 0.3 + 0 * t]))[0]
        pymc.Normal("observed", mu=height, sigma=1.0, observed=2.0)
        trace = pymc.sample(
            150, tune=150, chains=1, cores=1, random_seed=1, progressbar=False, compute_convergence_checks=False
        )
    grid = np.linspace(-2.5, 2.5, 2001)
    points = np.stack([grid, np.full_like(grid, 0.3)], axis=1)
    import torch

    from hessquik import Evaluator

    value = Evaluator(zoo.networks["peaks"])(torch.from_numpy(points)).value[:, 0].numpy()
    density = np.exp(-((grid / 0.5) ** 2) / 2 - (value - 2.0) ** 2 / 2)
    density /= density.sum()
    mean = (density * grid).sum()
    spread = np.sqrt((density * (grid - mean) ** 2).sum())
    found = trace.posterior["t"].to_numpy().ravel()
    assert found.mean() == pytest.approx(mean, abs=spread / 2)
    assert 0.5 * spread < found.std() < 1.5 * spread
    assert counting[1].methods["POST"] > 300
