"""The domain of a model: distances, refusals in every dialect, and the client's warning."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hessquik_client import AsyncClient, Client, OutsideDomain, OutsideDomainWarning
from hessquik_client.domain import Domain
from hessquik_client.for_casadi import RemoteFunction
from hessquik_client.for_jax import remote_function
from hessquik_client.for_pyomo import RemoteGreyBox
from hessquik_client.for_scipy import Objective, constraint, minimize_from
from hessquik_client.for_torch import RemoteNetwork
from tests.clients.conftest import KEY, Zoo
from tests.live import LiveServer

pytestmark = pytest.mark.xdist_group("clients")

#: Peaks is bounded by −3 and 3 in both inputs.
INSIDE, EDGE, OUTSIDE = [0.5, -1.0], [3.0, -3.0], [0.0, 4.5]
POINTS = np.array([INSIDE, EDGE, OUTSIDE, [-9.0, 3.6]])
DISTANCES = [0.0, 0.0, 0.25, 1.0]


@pytest.fixture
def client(zoo: Zoo) -> Iterator[Client]:
    with Client(zoo.url) as client:
        yield client


@pytest.mark.filterwarnings("ignore::hessquik_client.OutsideDomainWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_distance_is_the_largest_excess_over_a_range(client: Client, dtype: str) -> None:
    peaks = client.model("peaks")
    answer = peaks.evaluate(POINTS, ["domain_distance", "value"], dtype=dtype)
    np.testing.assert_allclose(answer.domain_distance, DISTANCES, rtol=1e-6)
    assert (answer.domain_distance[:2] == 0).all()
    assert answer.domain_distance.dtype == dtype
    assert peaks.domain_distance(OUTSIDE) == 0.25
    assert (answer.value == peaks.value(POINTS, dtype=dtype)).all()


def test_a_point_on_a_rounded_bound_is_inside() -> None:
    domain = Domain.of({"lower_bounds": [-0.1], "upper_bounds": [0.1]})
    assert domain is not None
    edge = np.array([[0.1], [-0.1]], np.float32)  # float32(0.1) > 0.1
    assert domain.first_outside(edge) is None
    assert (domain.distance(edge) == 0).all()
    assert domain.first_outside(edge * np.float32(1 + 1e-6)) == (0, 0)


def test_a_point_that_was_computed_to_lie_on_a_bound_is_inside() -> None:
    domain = Domain.of({"lower_bounds": [0.05], "upper_bounds": [0.15]})
    assert domain is not None
    edge = np.array([[0.05 + (0.15 - 0.05) * 100 / 100]])
    assert edge > 0.15
    assert domain.first_outside(edge) is None
    assert domain.distance(edge) == 0
    assert domain.first_outside(edge * (1 + 1e-14)) == (0, 0)
    assert domain.distance(edge * (1 + 1e-14)) > 0


def test_bounds_without_width_are_no_division_by_zero() -> None:
    domain = Domain.of({"lower_bounds": [1.0, 0.0], "upper_bounds": [1.0, 2.0]})
    assert domain is not None
    assert domain.distance(np.array([[1.0, 1.0], [1.5, 1.0]])).tolist() == [0.0, 0.5]


def test_a_model_without_bounds_has_no_outside(client: Client) -> None:
    vector = client.model("vector")
    assert (vector.domain_distance(1e6 * np.ones((3, 3)), outside="refuse") == 0).all()


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"})


def native(url: str, outside: str | None, x: Any) -> httpx.Response:
    return post(f"{url}/v1/models/peaks/value", {"inputs": x} | ({"outside": outside} if outside else {}))


def inference(url: str, outside: str | None, x: Any) -> httpx.Response:
    tensor = {"name": "inputs", "shape": [1, 2], "datatype": "FP64", "data": x}
    parameters = {"outside": outside} if outside else {}
    return post(f"{url}/v2/models/peaks/infer", {"inputs": [tensor], "parameters": parameters})


def umbridge(url: str, outside: str | None, x: Any) -> httpx.Response:
    config = {"outside": outside} if outside else {}
    return post(f"{url}/Evaluate", {"name": "peaks", "input": [x], "config": config})


DIALECTS = {native: 422, inference: 400, umbridge: 400}


@pytest.mark.parametrize(("ask", "status"), DIALECTS.items(), ids=[ask.__name__ for ask in DIALECTS])
def test_points_outside_are_refused_where_that_is_asked_for(zoo: Zoo, ask: Any, status: int) -> None:
    assert ask(zoo.url, None, OUTSIDE).status_code == 200
    assert ask(zoo.url, "allow", OUTSIDE).status_code == 200
    assert ask(zoo.url, "refuse", EDGE).status_code == 200
    refused = ask(zoo.url, "refuse", OUTSIDE)
    assert refused.status_code == status
    assert "expected y from -3 to 3, got a number outside" in refused.text
    wrong = ask(zoo.url, "forbid", INSIDE)
    assert wrong.status_code == status
    assert "outside: expected allow or refuse" in wrong.text


def test_a_refusal_names_row_input_and_range(client: Client) -> None:
    peaks = client.model("peaks")
    with pytest.raises(OutsideDomain) as caught:
        peaks.hessian(POINTS, outside="refuse")
    assert caught.value.status == 422
    expected = {"field": "inputs", "row": 2, "input": 1, "name": "y", "lower": -3.0, "upper": 3.0}
    assert caught.value.extra == expected
    with pytest.raises(ValueError, match="outside: expected allow or refuse, got 'forbid'"):
        peaks.value(INSIDE, outside="forbid")  # type: ignore[arg-type]


def test_the_client_warns_once_for_a_model(client: Client) -> None:
    peaks = client.model("peaks")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peaks.value(INSIDE)
        peaks.value(EDGE)
        with pytest.raises(OutsideDomain):
            peaks.value(OUTSIDE, outside="refuse")
    with pytest.warns(OutsideDomainWarning, match=r"peaks: point 2 is outside .* y is 4\.5, .* from -3 to 3") as seen:
        peaks.hessian(POINTS)
    assert [Path(one.filename).name for one in seen] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peaks.hessian(POINTS)
        peaks.with_options(dtype="float32").value(OUTSIDE)  # the same model
    with pytest.warns(OutsideDomainWarning):
        client.model("peaks").value(OUTSIDE)  # one point, and the first request


def test_the_asynchronous_client_warns_too(zoo: Zoo) -> None:
    async def ask() -> None:
        async with AsyncClient(zoo.url) as client:
            await client.model("peaks").value(OUTSIDE)

    with pytest.warns(OutsideDomainWarning):
        asyncio.run(ask())


def test_options_of_a_model_are_those_of_its_calls(client: Client) -> None:
    careful = client.model("peaks").with_options(outside="refuse", dtype="float32")
    assert careful.value(INSIDE).dtype == np.float32
    with pytest.raises(OutsideDomain):
        careful.value(OUTSIDE)
    with pytest.warns(OutsideDomainWarning):
        assert careful.value(OUTSIDE, outside="allow").shape == (1,)
    with pytest.raises(TypeError, match="expected the options"):
        careful.with_options(inside=True)  # type: ignore[call-arg]


def test_adapters_take_it(client: Client) -> None:
    import casadi
    import jax
    import torch

    peaks = client.model("peaks")
    x = np.array(OUTSIDE)
    with pytest.raises(OutsideDomain):
        Objective(peaks, outside="refuse")(x)
    with pytest.raises(OutsideDomain):
        constraint(peaks, 0, 1, outside="refuse").fun(x)
    with pytest.raises(OutsideDomain):
        minimize_from(POINTS, peaks, outside="refuse")
    with pytest.raises(OutsideDomain):
        RemoteNetwork(peaks, outside="refuse")(torch.tensor(x))
    with pytest.raises(jax.errors.JaxRuntimeError, match="outside"), jax.enable_x64(True):
        remote_function(peaks, outside="refuse")(x).block_until_ready()
    with pytest.raises(RuntimeError):
        RemoteFunction("peaks", peaks, outside="refuse")(casadi.DM(x))
    box = RemoteGreyBox(peaks, outside="refuse")
    box.set_input_values(x)
    with pytest.raises(OutsideDomain):
        box.evaluate_outputs()


def test_a_service_may_refuse_by_default(guarded: LiveServer) -> None:
    for ask, status in DIALECTS.items():
        assert ask(guarded.url, None, OUTSIDE).status_code == status
        assert ask(guarded.url, "allow", OUTSIDE).status_code == 200
        assert ask(guarded.url, None, INSIDE).status_code == 200
