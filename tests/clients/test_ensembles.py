"""Ensembles over HTTP: means and standard deviations against torch.func in float64, in every dialect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import umbridge
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from hessquik import storage
from hessquik.networks import Ensemble
from hessquik_client import Client, InvalidInput
from hessquik_client.evaluators import Evaluators
from service.bulk import Job, evaluate_file
from tests.clients.conftest import Zoo
from tests.oracle import derivatives

pytestmark = pytest.mark.xdist_group("clients")

X = np.random.default_rng(3).normal(size=(20, 3))
NAMES = ("value", "gradient", "hessian")
STD = tuple(f"{name}_std" for name in NAMES)
TOLERANCE = 1e-12


@pytest.fixture
def client(zoo: Zoo) -> Iterator[Client]:
    with Client(zoo.url) as client:
        yield client


@pytest.fixture(scope="module")
def truth(zoo: Zoo) -> dict[str, np.ndarray]:
    """Mean and standard deviation of the members' results by torch.func and numpy."""
    trio = zoo.networks["trio"]
    assert isinstance(trio, Ensemble)
    members = zip(*(derivatives(member, torch.from_numpy(X)) for member in trio.members), strict=True)
    parts = {name: np.stack([part.numpy() for part in found]) for name, found in zip(NAMES, members, strict=True)}
    means = {name: part.mean(0) for name, part in parts.items()}
    return {**means, **{f"{name}_std": part.std(0, ddof=1) for name, part in parts.items()}}


def test_binary_and_json_have_the_members_moments(zoo: Zoo, client: Client, truth: dict[str, np.ndarray]) -> None:
    answer = client.model("trio").evaluate(X, list(truth))
    document = httpx.post(
        f"{zoo.url}/v1/models/trio/evaluate", json={"inputs": X.tolist(), "quantities": list(truth)}
    ).json()
    for name, true in truth.items():
        assert answer[name].shape == true.shape
        np.testing.assert_allclose(answer[name], true, rtol=0, atol=TOLERANCE)
        assert (np.array(document[name]) == answer[name]).all()
        single = httpx.post(f"{zoo.url}/v1/models/trio/{name}", json={"inputs": X[0].tolist()}).json()
        np.testing.assert_allclose(single[name], true[0], rtol=0, atol=TOLERANCE)


def test_a_description_says_how_many_members_there_are(zoo: Zoo, client: Client) -> None:
    trio, vector = (client.model(name).describe() for name in ("trio", "vector"))
    assert (trio["members"], vector["members"]) == (3, 1)
    assert set(STD) <= set(trio["quantities"])
    assert not set(STD) & set(vector["quantities"])
    assert trio["architecture"]["type"] == "ensemble"
    listed = {model["name"]: model["members"] for model in client.models()}
    assert listed == {name: 3 if name == "trio" else 1 for name in listed}


@pytest.mark.parametrize("name", STD)
def test_one_network_has_no_standard_deviation(zoo: Zoo, client: Client, name: str) -> None:
    x = X[0].tolist()
    replies = [
        httpx.post(f"{zoo.url}/v1/models/vector/{name}", json={"inputs": x}),
        httpx.post(f"{zoo.url}/v1/models/vector/evaluate", json={"inputs": x, "quantities": ["value", name]}),
    ]
    for reply in replies:
        problem = reply.json()
        assert (reply.status_code, problem["code"], problem["field"]) == (422, "invalid_input", "quantities")
        assert "of ensembles only, got a model of one network" in problem["detail"]
    for model in (client.model("vector"), client.model("vector").local()):
        with pytest.raises(InvalidInput, match="of ensembles only"):
            model.evaluate(X, [name])


def test_open_inference_has_the_outputs_of_ensembles(zoo: Zoo, truth: dict[str, np.ndarray]) -> None:
    triton = InferenceServerClient(zoo.url.removeprefix("http://"))
    outputs = {
        name: {one["name"] for one in triton.get_model_metadata(name)["outputs"]} for name in ("trio", "vector")
    }
    assert outputs["trio"] - outputs["vector"] == set(STD)
    given = InferInput("inputs", list(X.shape), "FP64")
    given.set_data_from_numpy(X)
    result = triton.infer("trio", [given], outputs=[InferRequestedOutput("value_std", binary_data=True)])
    np.testing.assert_allclose(result.as_numpy("value_std"), truth["value_std"], rtol=0, atol=TOLERANCE)
    triton.close()


def test_umbridge_has_the_means(zoo: Zoo, truth: dict[str, np.ndarray]) -> None:
    model = umbridge.HTTPModel(zoo.url, "trio")
    np.testing.assert_allclose(model([X[0].tolist()])[0], truth["value"][0], rtol=0, atol=TOLERANCE)
    sens, vec = [1.0, -2.0, 0.5, 0.0], [0.1, 0.2, -0.3]
    expected = np.einsum("abm,m,b->a", truth["hessian"][0], sens, vec)
    found = model.apply_hessian(0, 0, 0, [X[0].tolist()], sens, vec)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_files_of_points_take_an_ensemble(zoo: Zoo, tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    saved = storage.parse((zoo.server.models / "trio.safetensors").read_bytes())
    np.save(tmp_path / "x.npy", X)
    evaluators = Evaluators(saved, torch.device("cpu"), 1)
    evaluate_file(evaluators, tmp_path / "x.npy", tmp_path / "out", Job(("value", "hessian_std")), lambda *_: None)
    for name in ("value", "hessian_std"):
        np.testing.assert_allclose(np.load(tmp_path / "out" / f"{name}.npy"), truth[name], rtol=0, atol=TOLERANCE)
