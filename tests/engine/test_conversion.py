"""Conversion of the original's checkpoints: its results are reproduced, and other files are refused."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hessquik import load
from hessquik import networks as net
from hessquik.activations import geluActivation, softplusActivation
from hessquik.architecture import describe
from hessquik.conversion import convert, read_checkpoint
from hessquik.errors import ArchitectureError, CompositionError, FormatError
from hessquik.layers import ICNNLayer, quadraticICNNLayer, quadraticLayer, resnetLayer, singleLayer

FOLDER = Path(__file__).parent.parent / "fixtures" / "original"
FIGURES = load_file(FOLDER / "figures.safetensors")
NAMES = ("connected", "convex", "nested", "resnet", "shared")
MODES = {"automatic": {}, "forward": {"forward_mode": True}, "backward": {"forward_mode": False}}
#: Tolerances for the same sums in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def figures(name):
    return {key.partition("/")[2]: tensor for key, tensor in FIGURES.items() if key.startswith(name + "/")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_converted_network_gives_the_figures_of_the_original(name, mode, tmp_path):
    convert(FOLDER / f"{name}.pt", tmp_path / "network.safetensors", description="converted")
    network, known = load(tmp_path / "network.safetensors"), figures(name)
    x = known["x"]
    value, gradient, hessian = network(x, do_gradient=True, do_Hessian=True, **MODES[mode])
    for got, what in ((value, "value"), (gradient, "gradient"), (hessian, "hessian")):
        torch.testing.assert_close(got, known[what], **CLOSE)
    trace = torch.einsum("naam->nm", known["hessian"]).unsqueeze(1)
    laplacian = network(x, do_Laplacian=True, **MODES[mode])[2]
    torch.testing.assert_close(laplacian, known.get("laplacian", trace), **CLOSE)


@pytest.mark.parametrize("name", ["connected", "resnet", "shared"])
def test_directions_and_weights_give_the_figures_of_the_original(name):
    network, known = read_checkpoint(FOLDER / f"{name}.pt"), figures(name)
    x, v, w = known["x"], known["directions"], known["weights"]
    _, along, curved = network(x, do_gradient=True, do_Hessian=True, v=v, forward_mode=True)
    torch.testing.assert_close(along, known["along"], **CLOSE)
    torch.testing.assert_close(curved, known["curved"], **CLOSE)
    _, gradient, hessian = network(x, do_gradient=True, do_Hessian=True, v=w, forward_mode=False)
    torch.testing.assert_close(gradient, known["weighted gradient"], **CLOSE)
    torch.testing.assert_close(hessian, known["weighted hessian"], **CLOSE)


def test_constructor_arguments_survive():
    resnet = describe(read_checkpoint(FOLDER / "resnet.pt"))
    single, inner, last = resnet["layers"]
    assert single["act"] == {"type": "antiTanhActivation"}
    assert inner == {"type": "resnetNN", "width": 5, "depth": 2, "h": 0.5, "act": {"type": "tanhActivation"}}
    assert last["bias"] is False
    convex = describe(read_checkpoint(FOLDER / "convex.pt"))["layers"][0]
    assert convex["act"] == {"type": "softplusActivation", "beta": 2.0, "threshold": 15.0}
    assert convex["widths"] == [None, 5, 4]
    nested = describe(read_checkpoint(FOLDER / "nested.pt"))
    assert nested["layers"][0]["layers"][1]["type"] == "resnetNN"
    assert nested["layers"][0]["layers"][1]["h"] == 0.25


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_with_its_architecture_is_the_same_network(name):
    whole = read_checkpoint(FOLDER / f"{name}.pt")
    again = read_checkpoint(FOLDER / f"{name}.state_dict.pt", describe(whole))
    for (key, got), (other, expected) in zip(again.state_dict().items(), whole.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(got, expected)


def test_convert_reads_the_architecture_from_a_file(tmp_path):
    out = tmp_path / "network.safetensors"
    network = convert(FOLDER / "connected.state_dict.pt", out, FOLDER / "connected.json")
    assert network.widths == [2, 4, 3]
    torch.testing.assert_close(load(out)(figures("connected")["x"])[0], figures("connected")["value"], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_without_its_architecture_a_state_dict_shows_what_it_tells(name):
    """The skeleton in the message, with every '?' filled in from the whole network, is its architecture."""
    whole = read_checkpoint(FOLDER / f"{name}.pt")
    with pytest.raises(ArchitectureError, match="a state dict needs an architecture beside it") as refusal:
        read_checkpoint(FOLDER / f"{name}.state_dict.pt")
    skeleton = json.loads(str(refusal.value).partition("'?':\n")[2])
    layers = iter(whole.layers())

    def filled(node):
        if node["type"] == "NN":
            return {**node, "layers": [filled(layer) for layer in node["layers"]]}
        known = describe(next(layers))
        return {key: known[key] if key in {"act", "h"} else value for key, value in node.items()}

    again = read_checkpoint(FOLDER / f"{name}.state_dict.pt", filled(skeleton))
    assert [describe(layer) for layer in again.layers()] == [describe(layer) for layer in whole.layers()]


def test_a_checkpoint_with_more_than_the_network_is_read(tmp_path):
    network = net.resnetNN(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    torch.save({"epoch": 7, "model": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    again = read_checkpoint(tmp_path / "run.pt", describe(network))
    assert torch.equal(again[1].layer.K, network[1].layer.K)


def test_whole_networks_of_this_package_are_read_too(tmp_path):
    shared = geluActivation()
    network = net.NN(
        singleLayer(3, 4, shared),
        resnetLayer(4, 0.1, shared),
        net.NN(ICNNLayer(4, None, 3, softplusActivation(3.0)), quadraticICNNLayer(4, 3, 2)),
        quadraticLayer(1, 1),
    )
    torch.save(network, tmp_path / "network.pt")
    again = read_checkpoint(tmp_path / "network.pt")
    assert describe(again) == describe(network)
    assert torch.equal(again(torch.ones(1, 3))[0], network(torch.ones(1, 3))[0])


def test_a_family_whose_layers_were_changed_is_read_layer_by_layer(tmp_path):
    network = net.resnetNN(3, 2, h=0.5)
    network[1].h = 0.25
    torch.save(network, tmp_path / "network.pt")
    assert [layer.h for layer in read_checkpoint(tmp_path / "network.pt")] == [0.5, 0.25]


class Harmful:
    """An object that runs a command when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/harmed",)


class Unknown(torch.nn.Module):
    pass


def saved(folder, content):
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Harmful, r"must hold layers, networks and tensors only, got 'posix\.system'"),
        (lambda folder: {"model": Harmful(folder)}, r"got 'posix\.system'"),
        (lambda folder: Unknown(), r"got '.*test_conversion\.Unknown'"),
        (lambda folder: torch.nn.Linear(2, 2), r"got 'torch\.nn\.modules\.linear\.Linear'"),
        (lambda folder: net.NN(singleLayer(2, 2, torch.nn.Tanh())), r"got 'torch\.nn\.modules\.activation\.Tanh'"),
        (lambda folder: [1, 2], "must hold a network or a state dict, got list"),
        (lambda folder: {}, "one value must be a network or state dict, got 0"),
        (lambda folder: {"a": singleLayer(1, 1), "b": singleLayer(1, 1)}, "got 2 under the keys a, b"),
        (lambda folder: softplusActivation(), "must hold a network or a state dict, got softplusActivation"),
        (lambda folder: singleLayer(2, 2).half(), "weights must be all float32 or all float64, got float16"),
    ],
    ids=["command", "command inside", "class", "layer", "activation", "list", "empty", "two", "σ alone", "half"],
)
def test_anything_else_is_refused_and_never_run(content, message, tmp_path):
    path = saved(tmp_path, content(tmp_path))
    with pytest.raises(FormatError, match=message) as refusal:
        read_checkpoint(path)
    assert str(refusal.value).startswith("checkpoint.pt: ")
    assert not (tmp_path / "harmed").exists()


def broken_zip(folder):
    data = bytearray((FOLDER / "resnet.pt").read_bytes())
    (folder / "checkpoint.pt").write_bytes(data[: len(data) // 2])


def no_pickle(folder):
    (folder / "checkpoint.pt").write_bytes(b"not a checkpoint at all")


def empty(folder):
    (folder / "checkpoint.pt").write_bytes(b"")


@pytest.mark.parametrize("make", [broken_zip, no_pickle, empty])
def test_a_broken_file_is_refused(make, tmp_path):
    make(tmp_path)
    with pytest.raises(
        FormatError,
        match=r"^checkpoint\.pt: a checkpoint must be a file that torch\.save wrote; this one is not or is damaged$",
    ):
        read_checkpoint(tmp_path / "checkpoint.pt")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


def test_attributes_that_are_no_arguments_are_refused(tmp_path):
    network = net.NN(singleLayer(2, 2))
    network[0].in_features = "two"
    with pytest.raises(ArchitectureError, match=r"in_features must be an integer .* got \"two\""):
        read_checkpoint(saved(tmp_path, network))


def test_a_network_inside_itself_is_refused(tmp_path):
    network = net.NN(singleLayer(2, 2))
    network._modules["1"] = network
    with pytest.raises(FormatError, match="must be nested at most 8 deep"):
        read_checkpoint(saved(tmp_path, network))


def test_a_layer_inside_itself_is_refused(tmp_path):
    network = net.NN(singleLayer(2, 2))
    network[0]._modules["inner"] = network[0]
    with pytest.raises(FormatError, match="must be nested at most 8 deep"):
        read_checkpoint(saved(tmp_path, network))


@pytest.mark.parametrize(
    ("architecture", "error", "message"),
    [
        ({"type": "fullyConnectedNN", "widths": [2, 5, 3]}, FormatError, r"tensor 0\.K must have the shape \(2, 5\)"),
        ({"type": "fullyConnectedNN", "widths": [2, 4]}, FormatError, r"there must be no tensor \"1\.K\""),
        ({"type": "perceptron"}, ArchitectureError, "type must be one of NN"),
        (
            {"type": "NN", "layers": [{"type": "quadraticLayer", "in_features": 2, "rank": 1}] * 2},
            CompositionError,
            "incompatible composition",
        ),
    ],
    ids=["widths", "layers", "type", "composition"],
)
def test_an_architecture_that_does_not_fit_is_refused(architecture, error, message):
    with pytest.raises(error, match=message):
        read_checkpoint(FOLDER / "connected.state_dict.pt", architecture)


def test_an_architecture_beside_a_whole_network_is_refused():
    with pytest.raises(ArchitectureError, match="beside a whole network"):
        read_checkpoint(FOLDER / "connected.pt", {"type": "NN"})


@pytest.mark.parametrize(
    "state",
    [
        {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)},
        {"K": torch.zeros(2)},
        {"layer": torch.zeros(2, 2)},
        {"0": torch.zeros(1), "0.K": torch.zeros(1, 1)},
        {"A": torch.zeros(2), "mu": torch.zeros(1), "v": torch.zeros(1)},
    ],
    ids=["torch", "vector", "no layer", "both", "no matrix"],
)
def test_a_state_dict_of_something_else_is_refused(state, tmp_path):
    with pytest.raises(FormatError, match=r"must (be a tensor or a layer|hold the tensors of a layer)"):
        read_checkpoint(saved(tmp_path, OrderedDict(state)))


def test_fixtures_are_read_without_the_original(tmp_path):
    """The fixtures are read in a process that cannot import the original."""
    program = (
        "import sys; sys.modules['hessQuik'] = None\n"
        "from hessquik.conversion import convert\n"
        f"convert({str(FOLDER / 'nested.pt')!r}, {str(tmp_path / 'out.safetensors')!r})\n"
        "assert not any(name.startswith('hessQuik.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert (tmp_path / "out.safetensors").stat().st_size > 0
