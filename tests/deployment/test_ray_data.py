"""Ray Data: what an actor does with a batch; test_ray_serve.py evaluates a dataset on two nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hessquik_client import InvalidInput, OutsideDomain
from service.ray_data import _Actor


def test_an_actor_takes_columns_of_inputs_or_of_points_and_the_options_of_a_request(shipped_models: Path) -> None:
    data = (shipped_models / "peaks.safetensors").read_bytes()
    batch = {"a": np.array([0.5, 0.0]), "b": np.array([-1.0, 9.0]), "id": np.array([7, 8])}
    found = _Actor(data, ["domain_distance", "hvp"], ["a", "b"], {"directions": np.eye(2)}, "cpu")(batch)
    assert found["id"] is batch["id"]
    assert found["domain_distance"].tolist() == [0.0, 1.0]
    assert found["hvp"].shape == (2, 2, 2, 1)
    lists = np.array([None, None])
    lists[:] = [np.array([0.5, -1.0]), np.array([0.0, 9.0])]
    same = _Actor(data, ["hvp"], ["x"], {"directions": np.eye(2)}, "cpu")({"x": lists})
    assert same["hvp"].tobytes() == found["hvp"].tobytes()
    with pytest.raises(OutsideDomain, match="row 1: expected y from -3 to 3"):
        _Actor(data, ["value"], ["a", "b"], {"outside": "refuse"}, "cpu")(batch)
    lists[1] = np.zeros(3)
    with pytest.raises(InvalidInput, match="x: expected points of equal lengths"):
        _Actor(data, ["value"], ["x"], {}, "cpu")({"x": lists})
    with pytest.raises(InvalidInput, match="points of 2 numbers"):
        _Actor(data, ["value"], ["a"], {}, "cpu")({"a": np.ones((4, 3))})
