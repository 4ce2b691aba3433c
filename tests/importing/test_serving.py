"""Imported networks over HTTP: their derivatives, equal bits from import to reply, and kinks in the metadata."""

import functools
import warnings

import httpx
import pytest
import torch
from torch import nn

import hessquik
from hessquik import Evaluator
from hessquik.activations import KINKS
from tests.importing import onnx_networks, sklearn_networks, torch_networks
from tests.importing.comparison import TOLERANCE, derivatives, error
from tests.live import LiveServer
from tests.whole import choose

QUANTITIES = ("value", "gradient", "hessian")
#: Of each source.
COUNT = choose(5, 25)


@functools.cache
def sample():
    """Return by name an imported network, its number of inputs, and the source's function in torch."""
    found = {}
    for seed in range(COUNT):
        module, d = torch_networks.module(seed)
        x = torch.zeros(d, dtype=torch.float64)
        found[f"torch{seed}"] = hessquik.from_torch(module, x), d, module
        model, d, f = onnx_networks.model(seed)
        found[f"onnx{seed}"] = hessquik.from_onnx(model), d, f
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one step of training does not converge
            estimator, d, f = sklearn_networks.estimator(seed)
        found[f"sklearn{seed}"] = hessquik.from_sklearn(estimator), d, f
    return found


NAMES = [f"{source}{seed}" for seed in range(COUNT) for source in ("torch", "onnx", "sklearn")]
MODULE = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ELU(), nn.Linear(3, 1)).double()


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    """Yield a server of all imported networks, and of one with kinks."""
    folder = tmp_path_factory.mktemp("imported")
    for name, (network, *_) in sample().items():
        hessquik.save(network, folder / f"{name}.safetensors")
    hessquik.save(
        hessquik.from_torch(MODULE, allow_kinks=True), folder / "kinked.safetensors", input_names=["p", "T"]
    )
    with LiveServer(folder) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        client.folder = folder
        yield client


def evaluated(http, name, x):
    """Return the server's answer; JSON keeps every bit."""
    question = {"inputs": x.tolist(), "quantities": QUANTITIES, "dtype": "float64"}
    reply = http.post(f"/v1/models/{name}/evaluate", json=question)
    assert reply.status_code == 200, reply.text
    return [torch.tensor(reply.json()[quantity], dtype=torch.float64) for quantity in QUANTITIES]


@pytest.mark.parametrize("name", NAMES)
def test_over_http(http, name):
    """Exact against the source, and equal to the last bit: as imported, as loaded from the file, and as served."""
    network, d, f = sample()[name]
    x = 1 + torch.randn(5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    served = evaluated(http, name, x)
    for found, expected in zip(served, derivatives(f, x), strict=True):
        assert error(found, expected) <= TOLERANCE
    for one in (network, hessquik.load(http.folder / f"{name}.safetensors")):
        in_process = Evaluator(one)(x, QUANTITIES)
        for found, quantity in zip(served, QUANTITIES, strict=True):
            assert torch.equal(found, getattr(in_process, quantity)), quantity


def test_kinks_are_in_the_metadata_of_the_model(http):
    described = http.get("/v1/models/kinked").json()
    assert described["metadata"] == {
        "input_names": ["p", "T"],
        "kinks": {"eluActivation": KINKS[1], "reluActivation": KINKS[0]},
    }
    assert "kinks" not in (http.get("/v1/models/sklearn0").json()["metadata"] or {})
    x = torch.tensor([[0.5, -0.25], [1.5, 2.0]], dtype=torch.float64)
    for found, expected in zip(evaluated(http, "kinked", x), derivatives(MODULE, x), strict=True):
        assert error(found, expected) <= TOLERANCE


def network_by_hand(module):
    """Return the same network written with the engine's own layers."""
    from hessquik.activations import siluActivation, tanhActivation
    from hessquik.layers import resnetLayer, singleLayer
    from hessquik.networks import NN

    first, inner, last = (part for part in module.modules() if isinstance(part, nn.Linear))
    network = NN(
        singleLayer(3, 16, tanhActivation()), resnetLayer(16, 0.5, siluActivation()), singleLayer(16, 2)
    ).double()
    with torch.no_grad():
        for layer, linear in zip((network[0], network[1].layer, network[2]), (first, inner, last), strict=True):
            layer.K.copy_(linear.weight.T)
            layer.b.copy_(linear.bias)
    return network


@pytest.mark.parametrize("asked", [("value",), ("gradient",), QUANTITIES, ("laplacian",), ("hessian_diagonal",)])
def test_plans_are_those_of_the_same_network_written_with_our_layers(asked):
    """So it is as fast; benchmarks/imported.py measures it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(16, 16), nn.SiLU())
    module = nn.Sequential(
        nn.Linear(3, 16), nn.Tanh(), torch_networks.Residual(body, 0.5), nn.Dropout(), nn.Linear(16, 2)
    )
    module = module.double().eval()
    imported, by_hand = hessquik.from_torch(module), network_by_hand(module)
    assert str(imported) == str(by_hand)
    assert str(Evaluator(imported).plan(asked)) == str(Evaluator(by_hand).plan(asked))
    x = torch.randn(4, 3, dtype=torch.float64)
    for quantity in asked:
        found, expected = (getattr(Evaluator(each)(x, asked), quantity) for each in (imported, by_hand))
        assert torch.equal(found, expected)


def test_network_without_operations_is_served(tmp_path):
    """Products of a constant network are with zeros, so that its plans count no operations."""
    with torch.no_grad():
        module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        for layer in (module[0], module[2]):
            layer.weight.zero_()
    hessquik.save(hessquik.from_torch(module), tmp_path / "constant.safetensors")
    with LiveServer(tmp_path) as live, httpx.Client(base_url=live.wait_until_ready().url) as client:
        value, *derivatives = evaluated(client, "constant", torch.zeros(2, 2))
        assert torch.equal(value, module(torch.zeros(2, 2, dtype=torch.float64)).detach())
        assert not any(part.any() for part in derivatives)
