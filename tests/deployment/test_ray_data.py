"""Ray Data: a saved network at the rows of a dataset, on a local cluster, against autodiff."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.data
import torch

import hessquik
from hessquik_client import InvalidInput, OutsideDomain
from service.ray_data import _Actor, evaluate_dataset
from tests.live import ROOT
from tests.oracle import derivatives

pytestmark = [pytest.mark.xdist_group("ray_data"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or Ray writes a token into the user's home
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            configure_logging=False,
            runtime_env=environment,
            object_store_memory=100 << 20,
            logging_level=logging.ERROR,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


@pytest.mark.whole
@pytest.mark.timeout(240)
def test_rows_get_quantities_in_columns(cluster: None, shipped_models: Path, tmp_path: Path) -> None:
    path = shipped_models / "peaks.safetensors"
    x = np.random.default_rng(0).uniform(-3, 3, (5000, 2))
    points = ray.data.from_numpy(x).rename_columns({"data": "x"})
    found = evaluate_dataset(points, path, ["value", "gradient"]).take_all()
    by_point = {row["x"].tobytes(): row for row in found}
    value, gradient, _ = derivatives(hessquik.load(path), torch.from_numpy(x))
    assert len(by_point) == len(x)
    np.testing.assert_allclose([by_point[row.tobytes()]["value"] for row in x], value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([by_point[row.tobytes()]["gradient"] for row in x], gradient, rtol=1e-12, atol=1e-12)


def test_an_actor_takes_columns_of_inputs_and_the_options_of_a_request(shipped_models: Path) -> None:
    data = (shipped_models / "peaks.safetensors").read_bytes()
    batch = {"a": np.array([0.5, 0.0]), "b": np.array([-1.0, 9.0]), "id": np.array([7, 8])}
    found = _Actor(data, ["domain_distance", "hvp"], ["a", "b"], {"directions": np.eye(2)}, "cpu")(batch)
    assert found["id"] is batch["id"]
    assert found["domain_distance"].tolist() == [0.0, 1.0]
    assert found["hvp"].shape == (2, 2, 2, 1)
    with pytest.raises(OutsideDomain, match="row 1: expected y from -3 to 3"):
        _Actor(data, ["value"], ["a", "b"], {"outside": "refuse"}, "cpu")(batch)
    with pytest.raises(InvalidInput, match="points of 2 numbers"):
        _Actor(data, ["value"], ["a"], {}, "cpu")({"a": np.ones((4, 3))})
