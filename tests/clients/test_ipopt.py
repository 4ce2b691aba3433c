"""Ipopt on remote models: cyipopt's problems, and a whole horizon of CasADi's in one request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import casadi
import cyipopt
import numpy as np
import pytest
import torch

from hessquik import Evaluator
from hessquik_client import Client, Model, OutsideDomain
from hessquik_client.for_casadi import RemoteFunction
from hessquik_client.for_ipopt import RemoteProblem, minimize
from tests.clients.conftest import Zoo
from tests.clients.test_client import Counting

pytestmark = pytest.mark.xdist_group("clients")

TOLERANCE = 1e-12
X = np.array([0.3, -0.2, 0.5])
WEIGHTS = np.array([1.0, -2.0, 0.5, 3.0])


@pytest.fixture
def counting(zoo: Zoo) -> Iterator[tuple[Client, Counting]]:
    with Client(zoo.url, transport=(transport := Counting())) as client:
        yield client, transport


def test_a_problem_has_the_derivatives_of_the_engine(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    problem = RemoteProblem(counting[0].model("vector"), WEIGHTS, constraints=[2, 0])
    expected = zoo.derivatives("vector", X[None])
    value, gradient, hessian = (expected[name][0] for name in ("value", "gradient", "hessian"))
    multipliers, factor = np.array([0.7, -1.5]), 0.25
    lagrangian = factor * WEIGHTS + np.array([multipliers[1], 0, multipliers[0], 0])
    np.testing.assert_allclose(problem.objective(X), value @ WEIGHTS, rtol=TOLERANCE)
    np.testing.assert_allclose(problem.gradient(X), gradient @ WEIGHTS, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(problem.constraints(X), value[[2, 0]], rtol=TOLERANCE)
    np.testing.assert_allclose(problem.jacobian(X).reshape(2, 3), gradient.T[[2, 0]], rtol=TOLERANCE, atol=TOLERANCE)
    rows, columns = problem.hessianstructure()
    packed = problem.hessian(X, multipliers, factor)
    np.testing.assert_allclose(packed, (hessian @ lagrangian)[rows, columns], rtol=TOLERANCE, atol=TOLERANCE)
    assert (rows >= columns).all()
    assert counting[1].methods == {"GET": 1, "POST": 1}


def test_ipopt_finds_the_minimum_with_one_request_for_each_point(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    evaluate = Evaluator(zoo.networks["peaks"], dtype=torch.float64)
    points: list[bytes] = []

    class InProcess:
        def at(self, x: np.ndarray, name: str) -> np.ndarray:
            points.append(x.tobytes())
            return np.asarray(getattr(evaluate(torch.tensor(x)[None], (name,)), name)[0].numpy())

        def objective(self, x: np.ndarray) -> float:
            return float(self.at(x, "value")[0])

        def gradient(self, x: np.ndarray) -> np.ndarray:
            return self.at(x, "gradient")[:, 0]

        def hessianstructure(self) -> tuple[np.ndarray, np.ndarray]:
            return np.tril_indices(2)

        def hessian(self, x: np.ndarray, multipliers: np.ndarray, factor: float) -> np.ndarray:
            return factor * self.at(x, "hessian_packed")[:, 0]

        def constraints(self, x: np.ndarray) -> np.ndarray:
            return np.empty(0)

        def jacobian(self, x: np.ndarray) -> np.ndarray:
            return np.empty(0)

    here = cyipopt.Problem(n=2, m=0, problem_obj=InProcess(), lb=[-3, -3], ub=[3, 3])
    here.add_option("print_level", 0)
    here.add_option("sb", "yes")
    expected, _ = here.solve(np.array([0.3, -1.0]))
    x, info = minimize(counting[0].model("peaks"), [0.3, -1.0])
    assert info["status"] == 0
    np.testing.assert_allclose(x, expected, atol=1e-10)
    changes = 1 + sum(one != other for one, other in pairwise(points))
    assert counting[1].methods["POST"] == changes


def test_outputs_are_constraints(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    model = counting[0].model("vector")
    box = [[-1, 1]] * 3
    free = zoo.derivatives("vector", X[None])["value"][0]
    x, info = minimize(model, X, [1, 0, 0, 0], {1: (free[1], free[1]), 3: (-10, free[3])}, box)
    assert info["status"] == 0
    value = zoo.derivatives("vector", x[None])["value"][0]
    assert abs(value[1] - free[1]) < 1e-7
    assert value[3] <= free[3] + 1e-7
    assert value[0] < free[0]


def test_what_does_not_fit_is_refused(counting: tuple[Client, Counting]) -> None:
    model = counting[0].model("vector")
    with pytest.raises(ValueError, match="objective: expected 4 weights"):
        RemoteProblem(model, [1.0])
    with pytest.raises(ValueError, match="constraints: expected outputs from 0 to 3"):
        RemoteProblem(model, constraints=[4])
    with pytest.raises(OutsideDomain):
        RemoteProblem(counting[0].model("peaks"), outside="refuse").objective(np.array([0.0, 4.5]))


# A horizon of CasADi's.

N, HEIGHT = 100, 0.02


def test_a_horizon_has_the_derivatives_of_its_points(zoo: Zoo, vector: Model) -> None:
    n = 4
    points = np.random.default_rng(0).uniform(-1, 1, (n, 3))
    remote = RemoteFunction("horizon", vector, points=n)
    x, multipliers = casadi.MX.sym("x", 3, n), casadi.MX.sym("l", 4, n)
    lagrangian = casadi.dot(multipliers, remote(x))
    hessian, gradient = casadi.hessian(lagrangian, x)
    jacobian = casadi.jacobian(remote(x), x)
    function = casadi.Function("all", [x, multipliers], [remote(x), jacobian, gradient, hessian])
    weights = np.random.default_rng(1).normal(size=(n, 4))
    value, whole, slope, curvature = (one.full() for one in function(points.T, weights.T))
    expected = zoo.derivatives("vector", points)
    np.testing.assert_allclose(value.T, expected["value"], rtol=TOLERANCE)
    np.testing.assert_allclose(
        slope.T.reshape(n, 3), np.einsum("naj,nj->na", expected["gradient"], weights), atol=TOLERANCE
    )
    for i in range(n):
        block = whole[4 * i : 4 * i + 4, 3 * i : 3 * i + 3]
        np.testing.assert_allclose(block, expected["gradient"][i].T, rtol=TOLERANCE, atol=TOLERANCE)
        block = curvature[3 * i : 3 * i + 3, 3 * i : 3 * i + 3]
        np.testing.assert_allclose(block, expected["hessian"][i] @ weights[i], rtol=TOLERANCE, atol=TOLERANCE)
    assert function.sparsity_out(1).nnz() == 12 * n
    assert function.sparsity_out(3).nnz() == 9 * n


@pytest.fixture(scope="module")
def vector(zoo: Zoo) -> Iterator[Model]:
    with Client(zoo.url) as client:
        yield client.model("vector")


def control(heights: casadi.MX, p: casadi.MX, u: casadi.MX) -> dict[str, casadi.MX]:
    """Return the optimal control of a car, p' = p + u, from (−2, −2) to (2, 2) in 100 steps at low heights."""
    ends = [p[:, 0] - casadi.DM([-2, -2]), p[:, -1] + u[:, -1] - casadi.DM([2, 2])]
    steps = p[:, 1:] - p[:, :-1] - u[:, :-1]
    cost = casadi.sumsqr(u) + HEIGHT * casadi.sum2(heights)
    return {"x": casadi.veccat(p, u), "f": cost, "g": casadi.veccat(*ends, steps)}


def test_optimal_control_over_a_horizon_asks_once_a_round(counting: tuple[Client, Counting]) -> None:
    client, transport = counting
    remote = RemoteFunction("landscape", client.model("peaks"), points=N)
    p, u = casadi.MX.sym("p", 2, N), casadi.MX.sym("u", 2, N)
    quiet = {"print_time": False, "ipopt": {"print_level": 0, "sb": "yes", "tol": 1e-7}}
    solver = casadi.nlpsol("solver", "ipopt", control(remote(p), p, u), quiet)
    line = np.linspace([-2, -2], [2, 2], N).T
    start = np.concatenate([line.T.ravel(), np.full(2 * N, 4 / N)])
    solution = solver(x0=start, lbx=-3, ubx=3, lbg=0, ubg=0)
    stats = solver.stats()
    assert stats["success"]
    assert float(solution["f"]) < float(solver.get_function("nlp_f")(start, [])) if stats["iter_count"] else True
    # A round is one point for value and gradient, and a Hessian there: two requests at most, whatever the horizon.
    rounds = max(stats[f"n_call_nlp_{name}"] for name in ("f", "grad_f", "g", "jac_g"))
    assert transport.methods["POST"] <= rounds + stats["n_call_nlp_hess_l"] + 1
    assert transport.methods["GET"] == 1


def test_a_horizon_is_ten_times_as_fast_as_a_request_for_each_node(counting: tuple[Client, Counting]) -> None:
    model = counting[0].model("peaks")
    together, alone = RemoteFunction("together", model, points=N), RemoteFunction("alone", model)
    line = np.linspace([-2, -2], [2, 2], N).T

    def seconds(function: RemoteFunction, calls: list[np.ndarray]) -> float:
        began = time.perf_counter()
        for points in calls:
            function(casadi.DM(points))
        return time.perf_counter() - began

    # Calls so short that another process may hold each of a few up; of many, one has the processor for itself.
    shifts = 0.001 * np.arange(1, 41)
    seconds(together, [line]), seconds(alone, [line[:, :1]])
    whole = min(seconds(together, [line + shift]) for shift in shifts)
    nodes = min(seconds(alone, [line[:, [i]] + shift for i in range(N)]) for shift in shifts[:3])
    assert nodes > 10 * whole
