"""Ray Data: what an actor does with a batch; test_ray_serve.py evaluates a dataset on two nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hessquik_client import InvalidInput, OutsideDomain
from service.ray_data import _Actor


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
