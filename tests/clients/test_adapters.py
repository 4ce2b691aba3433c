"""Adapters drive the live service with the real libraries; answers are the engine's in process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import casadi
import jax
import numpy as np
import pyomo.environ
import pytest
import torch
from pyomo.contrib.pynumero.interfaces.external_grey_box import ExternalGreyBoxBlock
from scipy import optimize

from hessquik import Evaluator
from hessquik_client import Client, ClientError, Model
from hessquik_client.for_casadi import RemoteFunction
from hessquik_client.for_jax import remote_function
from hessquik_client.for_pyomo import RemoteGreyBox
from hessquik_client.for_scipy import Objective, bounds, constraint, minimize_from
from hessquik_client.for_torch import RemoteNetwork
from tests.clients.conftest import Zoo
from tests.clients.test_client import Counting

pytestmark = pytest.mark.xdist_group("clients")

# float64 leaves 1e-16 per operation, and sums are taken in another order.
TOLERANCE = 1e-12
X = np.random.default_rng(0).uniform(-1, 1, (5, 3))
WEIGHTS = np.array([1.0, -2.0, 0.5, 3.0])


@pytest.fixture
def counting(zoo: Zoo) -> Iterator[tuple[Client, Counting]]:
    with Client(zoo.url, transport=(transport := Counting())) as client:
        yield client, transport


@pytest.fixture(scope="module")
def vector(zoo: Zoo) -> Iterator[Model]:
    with Client(zoo.url) as client:
        yield client.model("vector")


class InProcess:
    """A scalar network and its derivatives by the engine, as an objective."""

    def __init__(self, zoo: Zoo, name: str) -> None:
        self._evaluate = Evaluator(zoo.networks[name], device="cpu", dtype=torch.float64)
        self.points: set[bytes] = set()

    def _at(self, x: np.ndarray, quantity: str) -> np.ndarray:
        self.points.add(x.tobytes())
        out = self._evaluate(torch.tensor(x)[None], quantities=(quantity,))
        return np.asarray(getattr(out, quantity)[0].numpy().copy())

    def __call__(self, x: np.ndarray) -> float:
        return float(self._at(x, "value")[0])

    def jac(self, x: np.ndarray) -> np.ndarray:
        return self._at(x, "gradient")[:, 0]

    def hess(self, x: np.ndarray) -> np.ndarray:
        return self._at(x, "hessian")[..., 0]


@pytest.mark.filterwarnings("ignore::hessquik_client.OutsideDomainWarning")  # some methods look outside
@pytest.mark.parametrize("start", [(0.3, -1.0), (-0.5, 0.8), (2.0, 2.0)])
def test_trust_exact_takes_the_same_iterates_with_one_request_per_point(
    zoo: Zoo, counting: tuple[Client, Counting], start: tuple[float, float]
) -> None:
    client, transport = counting
    paths: list[list[np.ndarray]] = []
    here, there = InProcess(zoo, "peaks"), Objective(client.model("peaks"))
    for objective in (here, there):
        path: list[np.ndarray] = []
        optimize.minimize(
            objective, start, jac=objective.jac, hess=objective.hess, method="trust-exact", callback=path.append
        )
        paths.append(path)
    assert len(paths[0]) == len(paths[1]) > 3
    np.testing.assert_allclose(paths[1], paths[0], rtol=0, atol=1e-12)
    assert transport.methods == {"GET": 1, "POST": len(here.points)}


def test_products_agree_with_the_hessian(vector: Model) -> None:
    whole = Objective(vector, WEIGHTS)
    products = Objective(vector, WEIGHTS, has_hessian=False)
    p = np.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(products.hessp(X[0], p), whole.hess(X[0]) @ p, rtol=TOLERANCE)
    np.testing.assert_allclose(whole.hessp(X[0], p), whole.hess(X[0]) @ p, rtol=TOLERANCE)
    with pytest.raises(ValueError, match="has_hessian"):
        products.hess(X[0])
    with pytest.raises(ValueError, match="4 of them"):
        Objective(vector)(X[0])


def test_constraint_has_the_weighted_hessian(zoo: Zoo, vector: Model) -> None:
    limits = constraint(vector, -np.inf, 1.0)
    expected = zoo.derivatives("vector", X[:1])
    np.testing.assert_allclose(limits.fun(X[0]), expected["value"][0], rtol=TOLERANCE)
    np.testing.assert_allclose(limits.jac(X[0]), expected["gradient"][0].T, rtol=TOLERANCE)
    weighted = expected["hessian"][0] @ WEIGHTS
    np.testing.assert_allclose(limits.hess(X[0], WEIGHTS), weighted, rtol=TOLERANCE, atol=TOLERANCE)


def test_trust_constr_solves_on_a_constraint(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    peaks = counting[0].model("peaks")
    objective = Objective(peaks)
    free = optimize.minimize(objective, [0.2, -1.5], jac=objective.jac, hess=objective.hess, method="trust-exact")
    level = free.fun + 2.0
    result = optimize.minimize(
        lambda x: x[1],
        free.x - [0.1, 0.4],
        jac=lambda x: np.array([0.0, 1.0]),
        hess=lambda x: np.zeros((2, 2)),
        method="trust-constr",
        constraints=[constraint(peaks, level, level)],
        options={"gtol": 1e-9},
    )
    here = InProcess(zoo, "peaks")
    assert abs(here(result.x) - level) < 1e-6
    # At the solution the gradients of objective and constraint are parallel: the constraint's has no first entry.
    gradient = here.jac(result.x)
    assert abs(gradient[0]) < 1e-4 * abs(gradient[1])


def test_bounds_are_those_of_the_file(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    within = bounds(counting[0].model("peaks"))
    assert (list(within.lb), list(within.ub)) == ([-3, -3], [3, 3])
    with pytest.raises(ValueError, match="has none"):
        bounds(counting[0].model("vector"))


def test_multistart_finds_the_lowest_minimum(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    client, transport = counting
    peaks = client.model("peaks")
    starts = np.random.default_rng(0).uniform(-3, 3, (200, 2))
    results = minimize_from(starts, peaks, best=5, method="trust-exact")
    assert len(results) == 5
    assert [result.fun for result in results] == sorted(result.fun for result in results)
    grid = np.stack(np.meshgrid(*[np.linspace(-3, 3, 61)] * 2), -1).reshape(-1, 2)
    here = InProcess(zoo, "peaks")
    assert results[0].fun <= min(here(x) for x in grid)
    assert np.linalg.norm(here.jac(results[0].x)) < 1e-4
    assert transport.methods["GET"] == 1


@pytest.mark.filterwarnings("ignore::hessquik_client.OutsideDomainWarning")  # some methods look outside
@pytest.mark.parametrize(
    "method",
    [None, "BFGS", "L-BFGS-B", "CG", "SLSQP", "TNC", "Nelder-Mead", "Powell", "COBYLA", "Newton-CG", "trust-ncg"],
)
def test_multistart_gives_each_method_the_derivatives_that_it_uses(
    counting: tuple[Client, Counting], method: str | None
) -> None:
    """SciPy warns of derivatives that are not used, and warnings are errors here."""
    peaks = counting[0].model("peaks")
    starts = np.array([[0.2, -1.5], [0.3, -1.6]])
    results = minimize_from(starts, peaks, best=2, threads=1, **({} if method is None else {"method": method}))
    assert all(abs(result.fun + 6.551) < 1e-2 for result in results)
    given: list[set[str]] = []

    def own(f: object, x0: np.ndarray, args: object = (), **options: object) -> optimize.OptimizeResult:
        given.append({name for name in ("jac", "hess") if options[name] is not None})
        return optimize.OptimizeResult(x=x0, fun=0.0)

    minimize_from(starts[:1], peaks, best=1, method=own)
    assert given == [{"jac", "hess"}]


def test_torch_module_is_differentiable_twice(zoo: Zoo, vector: Model) -> None:
    surrogate, network = RemoteNetwork(vector), zoo.networks["vector"]
    x = torch.tensor(X, requires_grad=True)
    assert torch.autograd.gradcheck(surrogate, x)
    assert torch.autograd.gradgradcheck(surrogate, x)
    weights = torch.tensor(WEIGHTS)
    for function in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        got = function(lambda point: surrogate(point) @ weights, x[0].detach())
        expected = function(lambda point: network(point[None])[0][0] @ weights, x[0].detach())
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_torch_module_keeps_leading_axes_dtype_and_errors(vector: Model) -> None:
    surrogate = RemoteNetwork(vector)
    x = torch.tensor(X, dtype=torch.float32)
    assert surrogate(x.reshape(5, 1, 3)).shape == (5, 1, 4)
    assert surrogate(x).dtype == torch.float32
    assert not surrogate(x).requires_grad
    with torch.no_grad():
        assert not surrogate(x.requires_grad_()).requires_grad
    with pytest.raises(ClientError, match="finite"):
        surrogate(torch.full((3,), torch.nan))
    x = torch.tensor(X, requires_grad=True)
    (gradient,) = torch.autograd.grad(surrogate(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third"):
        torch.autograd.grad(second.sum(), x)


F = torch.func
TRANSFORMS = {
    "jacrev": F.jacrev,
    "jacfwd": F.jacfwd,
    "hessian": F.hessian,
    "jacrev of jacrev": lambda f: F.jacrev(F.jacrev(f)),
    "jacfwd of jacfwd": lambda f: F.jacfwd(F.jacfwd(f)),
    "jacrev of jacfwd": lambda f: F.jacrev(F.jacfwd(f)),
    "jvp": lambda f: lambda x: F.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vjp": lambda f: lambda x: F.vjp(f, x)[1](torch.ones(4, dtype=x.dtype))[0],
    "grad": lambda f: F.grad(lambda x: f(x).square().sum()),
    "Hessian times vector": lambda f: (
        lambda x: F.jvp(F.grad(lambda x: f(x).square().sum()), (x,), (torch.ones_like(x),))[1]
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func_takes_the_module(
    zoo: Zoo, counting: tuple[Client, Counting], transform: Callable[[object], Callable[[torch.Tensor], torch.Tensor]]
) -> None:
    client, transport = counting
    surrogate, network = RemoteNetwork(client.model("vector")), zoo.networks["vector"]
    x = torch.tensor(X)
    # The oracle keeps to plain operations, which torch.func goes through.
    expected = transform(lambda point: network(point[None])[0][0])
    one = transform(surrogate)(x[0])
    torch.testing.assert_close(one, expected(x[0]), rtol=TOLERANCE, atol=TOLERANCE)
    before = transport.methods["POST"]
    batch = torch.vmap(transform(surrogate))(x)
    torch.testing.assert_close(batch, torch.vmap(expected)(x), rtol=TOLERANCE, atol=TOLERANCE)
    # One request for value and gradient, one for each Hessian product: none per point.
    assert transport.methods["POST"] - before <= 3


def test_torch_vmap_outside_and_inside(zoo: Zoo, vector: Model) -> None:
    surrogate, network = RemoteNetwork(vector), zoo.networks["vector"]
    x = torch.tensor(X)
    torch.testing.assert_close(torch.vmap(surrogate)(x), network(x)[0], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(torch.vmap(surrogate, in_dims=1, out_dims=1)(x.T), network(x)[0].T)
    _, tangent = F.jvp(torch.vmap(surrogate), (x,), (torch.ones_like(x),))
    expected = F.jvp(lambda x: network(x)[0], (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, expected, rtol=TOLERANCE, atol=TOLERANCE)
    twice = torch.vmap(torch.vmap(F.jacrev(surrogate)))(x.reshape(5, 1, 3))
    torch.testing.assert_close(twice[:, 0], torch.vmap(F.jacrev(surrogate))(x))
    for third in (F.jacrev, F.jacfwd):
        with pytest.raises(NotImplementedError, match="third"):
            third(F.hessian(surrogate))(x[0])


def test_torch_forward_mode_agrees_with_differences(vector: Model) -> None:
    surrogate = RemoteNetwork(vector)
    x = torch.tensor(X[:2], requires_grad=True)
    assert torch.autograd.gradcheck(surrogate, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(surrogate, x, check_fwd_over_rev=True)


def test_torch_module_asks_for_no_gradient_that_nobody_needs(counting: tuple[Client, Counting]) -> None:
    client, _ = counting
    asked: list[object] = []
    model = client.model("vector")
    evaluate = model.evaluate
    model.evaluate = lambda x, quantities, **options: asked.append(quantities) or evaluate(x, quantities, **options)  # type: ignore[assignment,func-returns-value]
    surrogate, x = RemoteNetwork(model), torch.tensor(X)
    surrogate(x)
    torch.vmap(surrogate)(x)
    with torch.no_grad():
        surrogate(x.clone().requires_grad_())
    assert asked == [["value"]] * 3
    surrogate(x.clone().requires_grad_())
    assert asked[3:] == [["value", "gradient"]]


def test_jax_function_refuses_other_shapes_and_types_when_it_is_traced(counting: tuple[Client, Counting]) -> None:
    client, transport = counting
    f = remote_function(client.model("vector"))
    for function in (f, jax.jit(f), jax.jacrev(f), jax.jit(jax.vmap(f))):
        for shape in ((5, 2), (2,), (4,), (5, 3, 3)):
            with pytest.raises(ValueError, match=r"expected one point, shape \(3,\), got .*jax.vmap"):
                function(jax.numpy.zeros(shape))
    with pytest.raises(ValueError, match=r"got \(5, 3\)"):
        f(jax.numpy.zeros((5, 3)))
    for dtype in ("float16", "bfloat16", "complex64"):
        with pytest.raises(TypeError, match="float32 or float64"):
            jax.jit(f)(jax.numpy.zeros(3, dtype))
    assert transport.methods["POST"] == 0


def test_jax_function_has_jacobian_hessian_and_batches(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    client, transport = counting
    expected = zoo.derivatives("vector", X)
    with jax.enable_x64(True):
        f = remote_function(client.model("vector"))
        before = transport.methods["POST"]
        np.testing.assert_allclose(jax.jit(jax.vmap(f))(X), expected["value"], rtol=TOLERANCE)
        assert transport.methods["POST"] - before == 1
        jacobian = jax.vmap(jax.jacrev(f))(X)
        np.testing.assert_allclose(jacobian, expected["gradient"].transpose(0, 2, 1), rtol=TOLERANCE, atol=TOLERANCE)
        hessian = expected["hessian"].transpose(0, 3, 1, 2)
        for one in (jax.hessian(f), jax.jacfwd(jax.jacfwd(f))):
            np.testing.assert_allclose(jax.jit(jax.vmap(one))(X), hessian, rtol=TOLERANCE, atol=TOLERANCE)
            np.testing.assert_allclose(one(X[2]), hessian[2], rtol=TOLERANCE, atol=TOLERANCE)
        weighted = jax.grad(lambda x: f(x) @ WEIGHTS)(X[0])
        np.testing.assert_allclose(weighted, expected["gradient"][0] @ WEIGHTS, rtol=TOLERANCE)
    assert f(jax.numpy.asarray(X[0], dtype="float32")).dtype == np.float32
    np.testing.assert_allclose(f(jax.numpy.array([1, 2, 3])), f(jax.numpy.array([1.0, 2.0, 3.0])))


def test_casadi_function_has_exact_derivatives(zoo: Zoo, vector: Model) -> None:
    remote = RemoteFunction("remote", vector)
    x, multipliers = casadi.MX.sym("x", 3), casadi.MX.sym("l", 4)
    lagrangian = casadi.dot(multipliers, remote(x))
    hessian, gradient = casadi.hessian(lagrangian, x)
    function = casadi.Function("all", [x, multipliers], [remote(x), casadi.jacobian(remote(x), x), gradient, hessian])
    value, jacobian, gradient, hessian = (part.full() for part in function(X[0], WEIGHTS))
    expected = {name: part[0] for name, part in zoo.derivatives("vector", X[:1]).items()}
    np.testing.assert_allclose(value[:, 0], expected["value"], rtol=TOLERANCE)
    np.testing.assert_allclose(jacobian, expected["gradient"].T, rtol=TOLERANCE)
    np.testing.assert_allclose(gradient[:, 0], expected["gradient"] @ WEIGHTS, rtol=TOLERANCE)
    np.testing.assert_allclose(hessian, expected["hessian"] @ WEIGHTS, rtol=TOLERANCE, atol=TOLERANCE)


def test_ipopt_solves_a_constrained_problem_with_exact_hessians(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    """Maximise the borehole's flow within a budget of head and radius."""
    model = counting[0].model("borehole")
    within = bounds(model)
    remote = RemoteFunction("borehole", model)
    x = casadi.MX.sym("x", 8)
    scale = within.ub - within.lb
    point = casadi.DM(within.lb) + casadi.DM(scale) * x
    problem = {"x": x, "f": -remote(point), "g": casadi.sum1(x)}
    options = {"print_time": False, "ipopt": {"print_level": 0, "sb": "yes", "tol": 1e-9}}
    solver = casadi.nlpsol("solver", "ipopt", problem, options)
    solution = solver(x0=0.4, lbx=0, ubx=1, lbg=-np.inf, ubg=3.5)
    assert solver.stats()["success"]
    assert solver.stats()["n_call_nlp_hess_l"] > 0
    found = solution["x"].full()[:, 0]
    assert found.sum() <= 3.5 + 1e-6
    here = InProcess(zoo, "borehole")
    # The same by SciPy, in process.
    same = optimize.minimize(
        lambda u: -here(within.lb + scale * u),
        np.full(8, 0.4),
        jac=lambda u: -here.jac(within.lb + scale * u) * scale,
        bounds=[(0, 1)] * 8,
        constraints=[optimize.LinearConstraint(np.ones(8), -np.inf, 3.5)],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert abs(float(solution["f"]) - same.fun) < 1e-5 * abs(same.fun)


@pytest.mark.parametrize("name", ["vector", "borehole"])
def test_pyomo_grey_box_has_exact_derivatives(zoo: Zoo, counting: tuple[Client, Counting], name: str) -> None:
    client, transport = counting
    box = RemoteGreyBox(client.model(name))
    block = pyomo.environ.ConcreteModel()
    block.surrogate = ExternalGreyBoxBlock()
    block.surrogate.set_external_model(box)
    assert len(block.surrogate.inputs) == box.n_inputs()
    assert len(block.surrogate.outputs) == box.n_outputs()
    x = X[0] if name == "vector" else centre(client.model(name))
    weights = WEIGHTS[: box.n_outputs()]
    box.set_input_values(x)
    box.set_output_constraint_multipliers(weights)
    expected = {name: part[0] for name, part in zoo.derivatives(name, x[None]).items()}
    before = transport.methods["POST"]
    np.testing.assert_allclose(box.evaluate_outputs(), expected["value"], rtol=TOLERANCE)
    np.testing.assert_allclose(
        box.evaluate_jacobian_outputs().toarray(), expected["gradient"].T, rtol=TOLERANCE, atol=TOLERANCE
    )
    assert transport.methods["POST"] - before == 1
    hessian = box.evaluate_hessian_outputs()
    assert (hessian.row >= hessian.col).all()
    scale = abs(expected["hessian"]).max()
    np.testing.assert_allclose(
        hessian.toarray(), np.tril(expected["hessian"] @ weights), rtol=TOLERANCE, atol=TOLERANCE * scale
    )
    # The structure stays as it is where weights, and so all entries, are zero.
    box.set_output_constraint_multipliers(0 * weights)
    assert box.evaluate_hessian_outputs().nnz == hessian.nnz == len(x) * (len(x) + 1) // 2


def centre(model: Model) -> np.ndarray:
    within = bounds(model)
    return (within.lb + within.ub) / 2
