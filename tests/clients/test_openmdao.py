"""OpenMDAO: a component with exact partial derivatives, vectorised, and an optimisation through it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openmdao.api as om
import pytest

from hessquik_client import Client, OutsideDomain
from hessquik_client.for_openmdao import RemoteComponent
from tests.clients.conftest import Zoo
from tests.clients.test_client import Counting

pytestmark = [pytest.mark.xdist_group("clients"), pytest.mark.filterwarnings("ignore::openmdao.api.OpenMDAOWarning")]

TOLERANCE = 1e-12
X = np.random.default_rng(5).normal(size=(7, 3))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a temporary folder, since OpenMDAO writes reports into the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENMDAO_REPORTS", "0")


@pytest.fixture
def counting(zoo: Zoo) -> Iterator[tuple[Client, Counting]]:
    with Client(zoo.url, transport=(transport := Counting())) as client:
        yield client, transport


@pytest.mark.parametrize("points", [None, 7])
def test_values_and_partial_derivatives(zoo: Zoo, counting: tuple[Client, Counting], points: int | None) -> None:
    problem = om.Problem(reports=None)
    problem.model.add_subsystem(
        "f", RemoteComponent(model=counting[0].model("vector"), points=points), promotes=["*"]
    )
    problem.setup()
    rows = 0 if points is None else slice(None)
    problem["x"] = X[rows]
    problem.run_model()
    total = problem.compute_totals(of=["y"], wrt=["x"])["y", "x"]
    truth = zoo.derivatives("vector", X)
    np.testing.assert_allclose(problem["y"], truth["value"][rows], rtol=TOLERANCE, atol=TOLERANCE)
    expected = np.zeros((7, 4, 7, 3))
    expected[np.arange(7), :, np.arange(7)] = truth["gradient"].swapaxes(1, 2)
    dense = expected[0, :, 0] if points is None else expected.reshape(28, 21)
    np.testing.assert_allclose(total, dense, rtol=TOLERANCE, atol=TOLERANCE)
    assert counting[1].methods == {"GET": 1, "POST": 1}


def test_an_optimisation_finds_a_hollow_of_peaks(zoo: Zoo, counting: tuple[Client, Counting]) -> None:
    problem = om.Problem(reports=None)
    problem.model.add_subsystem("f", RemoteComponent(model=counting[0].model("peaks")), promotes=["*"])
    problem.driver = om.ScipyOptimizeDriver(optimizer="SLSQP", disp=False, tol=1e-10)
    problem.model.add_design_var("x", lower=-3, upper=3)
    problem.model.add_objective("y")
    problem.setup()
    problem["x"] = [0.0, -1.2]
    problem.run_driver()
    truth = zoo.derivatives("peaks", problem["x"][None])
    assert float(problem["y"][0]) == pytest.approx(-6.5511, abs=5e-3)
    assert np.abs(truth["gradient"]).max() < 1e-3
    assert (np.linalg.eigvalsh(truth["hessian"][0, ..., 0]) > 0).all()


def test_points_outside_are_refused(counting: tuple[Client, Counting]) -> None:
    problem = om.Problem(reports=None)
    component = RemoteComponent(model=counting[0].model("peaks"), outside="refuse")
    problem.model.add_subsystem("f", component, promotes=["*"])
    problem.setup()
    problem["x"] = [0.0, 9.0]
    with pytest.raises(OutsideDomain):
        problem.run_model()
