"""The whole way: a saved network, a worker process, a socket, and every number compared with autodiff."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

import hessquik
from hessquik import storage
from hessquik.networks import NN
from tests import oracle
from tests.live import LiveServer
from tests.whole import choose

QUANTITIES = ("value", "gradient", "hessian", "laplacian")
# float64 leaves 1e-16 per operation, a network has some hundred in a row; float32 1e-7.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def derivatives(network: NN, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the four quantities by autodiff in float64."""
    value, gradient, hessian = oracle.derivatives(network.double(), x.double())
    laplacian = hessian.diagonal(dim1=1, dim2=2).sum(-1)
    return {"value": value, "gradient": gradient, "hessian": hessian, "laplacian": laplacian}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error, measured by the largest entry."""
    return float((got - expected).abs().max() / expected.abs().max())


def points(path: Path, n: int, seed: int) -> torch.Tensor:
    """Return points within the model's own bounds."""
    metadata = storage.parse(path.read_bytes()).metadata
    lower, upper = (torch.tensor(metadata[key], dtype=torch.float64) for key in ("lower_bounds", "upper_bounds"))
    uniform = torch.rand(n, len(lower), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lower + uniform * (upper - lower)


@functools.cache
def usual_size(path: Path) -> dict[str, torch.Tensor]:
    """Return all quantities at 200 points of the domain, whose sizes errors are compared with."""
    return derivatives(hessquik.load(path), points(path, 200, seed=0))


@pytest.mark.parametrize("n", choose([1, 200], [1, 2, 7, 1000]))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_shipped_model_agrees_with_autodiff(
    server: LiveServer, shipped_models: Path, n: int, dtype: str
) -> None:
    for path in sorted(shipped_models.glob("*.safetensors")):
        x = points(path, n, seed=n)
        x = x.to(getattr(torch, dtype)).double()  # what the service will compute at
        expected = derivatives(hessquik.load(path), x)
        # A single value may be near zero by cancellation, so errors are measured by the quantity's usual size.
        usual = usual_size(path)
        for quantity in QUANTITIES:
            url = f"{server.url}/v1/models/{path.stem}/{quantity}"
            reply = httpx.post(url, json={"inputs": x.tolist(), "dtype": dtype}, timeout=60)
            assert reply.status_code == 200, reply.text
            document = reply.json()
            assert (document["model"], document["version"]) == (path.stem, "1")
            got = torch.tensor(document[quantity], dtype=torch.float64)
            assert got.shape == expected[quantity].shape
            error = float((got - expected[quantity]).abs().max() / usual[quantity].abs().max())
            assert error <= TOLERANCE[dtype], (path.stem, quantity)


def test_concurrent_clients_get_their_own_answers(server: LiveServer, shipped_models: Path) -> None:
    clients, requests = 16, 125
    network = hessquik.load(shipped_models / "peaks.safetensors")
    wrong: list[str] = []
    right = []

    asked = [points(shipped_models / "peaks.safetensors", requests, seed=1000 + number) for number in range(clients)]
    wanted = [derivatives(network, x)["gradient"] for x in asked]

    def client(number: int) -> None:
        x, expected = asked[number], wanted[number]
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for row in range(requests):
                reply = http.post("/v1/models/peaks/gradient", json={"inputs": x[row].tolist()})
                if reply.status_code != 200:
                    wrong.append(reply.text)
                    continue
                got = torch.tensor(reply.json()["gradient"], dtype=torch.float64)
                if relative_error(got, expected[row]) > TOLERANCE["float64"]:
                    wrong.append(f"client {number}, row {row}")
                else:
                    right.append(row)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(right) == clients * requests


def test_evaluate_answers_all_quantities_with_weights_and_directions(
    server: LiveServer, shipped_models: Path
) -> None:
    path = shipped_models / "peaks.safetensors"
    x = points(path, 3, seed=5)
    directions = torch.tensor([[1.0, 0.5], [0.0, -2.0], [3.0, 1.0]], dtype=torch.float64)
    body = {
        "inputs": x.tolist(),
        "quantities": [*QUANTITIES, "hessian_diagonal", "jvp", "hvp", "curvature"],
        "weights": [2.0],
        "directions": directions.tolist(),
    }
    document = httpx.post(f"{server.url}/v1/models/peaks/evaluate", json=body).json()
    expected = {name: 2 * tensor for name, tensor in derivatives(hessquik.load(path), x).items()}
    hessian = expected["hessian"][..., 0]
    expected["hessian_diagonal"] = hessian.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    expected["jvp"] = directions @ expected["gradient"]
    expected["hvp"] = (directions @ hessian).unsqueeze(-1)
    expected["curvature"] = ((directions @ hessian) * directions).sum(-1, keepdim=True)
    assert set(document) == {"model", "version", *expected}
    for name, tensor in expected.items():
        assert relative_error(torch.tensor(document[name], dtype=torch.float64), tensor) <= TOLERANCE["float64"], name


def test_a_flat_point_is_answered_without_the_batch_axis(server: LiveServer) -> None:
    document = httpx.post(f"{server.url}/v1/models/peaks/hessian", json={"inputs": [0.5, -1]}).json()
    assert np.array(document["hessian"]).shape == (2, 2, 1)


@pytest.mark.parametrize("binary_reply", [False, True], ids=["json", "safetensors"])
def test_binary_bodies_carry_the_same_bits(server: LiveServer, shipped_models: Path, binary_reply: bool) -> None:
    import safetensors.numpy

    x = points(shipped_models / "borehole.safetensors", 9, seed=3).numpy()
    plain = httpx.post(f"{server.url}/v1/models/borehole/gradient", json={"inputs": x.tolist()}).json()["gradient"]
    accept = "application/x-safetensors" if binary_reply else "application/json"
    reply = httpx.post(
        f"{server.url}/v1/models/borehole/gradient",
        content=safetensors.numpy.save({"inputs": x}),
        headers={"Content-Type": "application/x-safetensors", "Accept": accept},
    )
    got = safetensors.numpy.load(reply.content)["gradient"] if binary_reply else np.array(reply.json()["gradient"])
    assert got.tobytes() == np.array(plain).tobytes()


def test_a_row_has_the_same_bits_in_any_company(server: LiveServer, shipped_models: Path) -> None:
    x = points(shipped_models / "borehole.safetensors", 300, seed=8).tolist()
    url = f"{server.url}/v1/models/borehole/hessian"
    together = np.array(httpx.post(url, json={"inputs": x}).json()["hessian"])
    for row in (0, 7, 8, 255, 256, 299):
        alone = np.array(httpx.post(url, json={"inputs": x[row]}).json()["hessian"])
        assert alone.tobytes() == together[row].tobytes()
