"""Pyomo solves a problem with a model of the service inside: PyNumero, cyipopt, and exact derivatives."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyomo.contrib.pynumero
import pyomo.environ as pyo
import pytest
from pyomo.contrib.pynumero.asl import AmplInterface
from pyomo.contrib.pynumero.interfaces.external_grey_box import ExternalGreyBoxBlock
from scipy import optimize

from hessquik_client import Client
from hessquik_client.for_pyomo import RemoteGreyBox
from tests.clients.conftest import Zoo

HEADERS = Path("/usr/include/ampl-netlib-solvers")
pytestmark = [
    pytest.mark.xdist_group("clients"),
    pytest.mark.skipif(
        not HEADERS.exists() or shutil.which("g++") is None,
        reason="needs Debian's libamplsolver-dev and g++",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def interface(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Build PyNumero's interface to AMPL's library from the source that Pyomo ships, as docs/tools/pyomo.md says."""
    library = tmp_path_factory.mktemp("lib") / "libpynumero_ASL.so"
    source = Path(pyomo.contrib.pynumero.__path__[0]) / "src"
    includes = [f"-I{HEADERS}", f"-I{source}"]
    files = [source / "AmplInterface.cpp", "-o", library, "-lamplsolver"]
    subprocess.run(["g++", "-shared", "-fPIC", *includes, *files], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AmplInterface, "libname", str(library))
        yield


def block(client: Client, name: str, lower: list[float], upper: list[float]) -> pyo.ConcreteModel:
    """Return a Pyomo model that has a model of the service, with bounds on its inputs, as a block."""
    model = pyo.ConcreteModel()
    model.surrogate = ExternalGreyBoxBlock()
    model.surrogate.set_external_model(RemoteGreyBox(client.model(name)))
    for variable, *within in zip(model.surrogate.inputs.values(), lower, upper, strict=True):
        variable.setlb(within[0])
        variable.setub(within[1])
    return model


def solve(model: pyo.ConcreteModel) -> np.ndarray:
    """Solve with Ipopt and return the solution."""
    solver = pyo.SolverFactory("cyipopt")
    solver.config.options.update(tol=1e-9, sb="yes")
    assert solver.solve(model).solver.termination_condition == "optimal"
    return np.array([pyo.value(variable) for variable in model.surrogate.inputs.values()])


def test_the_lowest_point_of_peaks_is_found(zoo: Zoo) -> None:
    with Client(zoo.url) as client:
        model = block(client, "peaks", [-0.3, -2.3], [0.8, -1])
        (height,) = model.surrogate.outputs.values()
        model.lowest = pyo.Objective(expr=height)
        x = solve(model)
        np.testing.assert_allclose(x, [0.228, -1.626], atol=1e-3)
        assert pyo.value(height) == pytest.approx(float(client.model("peaks").value(x)[0]), rel=1e-9)
    here = zoo.derivatives("peaks", x[None])
    assert abs(here["gradient"]).max() < 1e-7


def test_several_outputs_in_constraints_and_objective(zoo: Zoo) -> None:
    """The weighted Hessian has terms of objective and constraints; SciPy finds the same solution in this process."""
    with Client(zoo.url) as client:
        model = block(client, "vector", [-3] * 3, [3] * 3)
        x, y = model.surrogate.inputs, list(model.surrogate.outputs.values())
        at_start = zoo.derivatives("vector", np.array([[0.3, -0.2, 0.4]]))["value"][0]
        model.objective = pyo.Objective(expr=sum(one**2 for one in x.values()) + y[2] ** 2)
        model.equal = pyo.Constraint(expr=y[0] == at_start[0])
        model.above = pyo.Constraint(expr=y[1] >= at_start[1])
        found = solve(model)

    def f(x: np.ndarray) -> np.ndarray:
        return zoo.derivatives("vector", x[None])["value"][0]

    same = optimize.minimize(
        lambda x: (x**2).sum() + f(x)[2] ** 2,
        [0.1, 0.2, -0.1],
        constraints=[
            {"type": "eq", "fun": lambda x: f(x)[0] - at_start[0]},
            {"type": "ineq", "fun": lambda x: f(x)[1] - at_start[1]},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 300},
    )
    np.testing.assert_allclose(found, same.x, atol=1e-5)
    np.testing.assert_allclose(f(found)[0], at_start[0], rtol=1e-7)
