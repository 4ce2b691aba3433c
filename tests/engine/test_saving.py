"""Saved files can be loaded again; a network that could not be loaded is refused before anything is written."""

import math
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import hessquik
from hessquik import layers as lay
from hessquik import networks as net
from hessquik import storage
from hessquik.activations import softplusActivation, tanhActivation
from hessquik.errors import ArchitectureError, FormatError

T = tanhActivation()


def network():
    torch.manual_seed(0)
    return net.fullyConnectedNN([2, 3, 1], T)


def with_weight(value):
    f = network()
    with torch.no_grad():
        f[0].K[0, 0] = value
    return f


def nested(levels):
    f = net.NN(lay.singleLayer(2, 2))
    for _ in range(levels):
        f = net.NN(f)
    return f


def deep(levels):
    return {"a": deep(levels - 1)} if levels else {}


UNREADABLE = {
    "half": (lambda: network().half(), {}, FormatError, "weights must be all float32 or all float64, got float16"),
    "bfloat16": (lambda: network().bfloat16(), {}, FormatError, "got bfloat16"),
    "complex": (lambda: network().to(torch.complex64), {}, FormatError, "got complex64"),
    "mixed": (
        lambda: net.NN(lay.singleLayer(2, 2), lay.singleLayer(2, 1).double()),
        {},
        FormatError,
        "got float32, float64",
    ),
    "no memory": (
        lambda: network().to("meta"),
        {},
        FormatError,
        'dense tensors with memory, got another kind in "0.K"',
    ),
    "NaN": (
        lambda: with_weight(math.nan),
        {},
        FormatError,
        r"weights must be finite, got NaN or infinity in \"0\.K\"",
    ),
    "infinity": (lambda: with_weight(-math.inf), {}, FormatError, "weights must be finite"),
    "1200 tensors": (
        lambda: net.NN(*(lay.resnetLayer(2, act=T) for _ in range(600))),
        {},
        FormatError,
        "there must be at most 1024 tensors, got 1200",
    ),
    "long metadata": (
        network,
        {"training": {"log": "x" * 300_000}},
        FormatError,
        "the header must have at most 262144",
    ),
    "deep metadata": (network, {"training": deep(50)}, FormatError, "at most 32 deep"),
    "nesting": (lambda: nested(8), {}, ArchitectureError, "must not be inside more than 7 other networks"),
    "β zero": (
        lambda: net.fullyConnectedNN([2, 1], softplusActivation(0.0)),
        {},
        ArchitectureError,
        r"act\.beta must be a finite number above 0, got 0\.0",
    ),
    "β negative": (lambda: net.fullyConnectedNN([2, 1], softplusActivation(-1)), {}, ArchitectureError, "beta"),
    "β infinite": (lambda: net.fullyConnectedNN([2, 1], softplusActivation(math.inf)), {}, ArchitectureError, "beta"),
    "threshold infinite": (
        lambda: net.fullyConnectedNN([2, 1], softplusActivation(1.0, math.inf)),
        {},
        ArchitectureError,
        "threshold must be a finite number, got Infinity",
    ),
    "h NaN": (lambda: net.resnetNN(2, 1, math.nan), {}, ArchitectureError, "h must be a finite number, got NaN"),
    "too wide": (
        lambda: net.NN(lay.singleLayer(70_000, 1)),
        {},
        ArchitectureError,
        r"network\.layers\[0\]\.in_features must be an integer from 1 to 65536, got 70000",
    ),
    "NaN in the training": (
        network,
        {"training": {"loss": math.nan}},
        FormatError,
        r"training\.loss must be a finite",
    ),
    "an int of 400 digits": (network, {"training": {"n": 10**400}}, FormatError, r"training\.n must be between"),
    "an int of 5000 digits": (network, {"training": {"n": 10**5000}}, FormatError, r"training\.n must be between"),
    "an object": (
        network,
        {"training": {"f": print}},
        FormatError,
        r"training\.f must be a JSON value, got an object",
    ),
    "a key that is no text": (network, {"training": {1: 2}}, FormatError, "training must have keys that are strings"),
    "a lone surrogate": (network, {"description": "\ud800"}, FormatError, "description must be Unicode text"),
    "lower > upper": (
        network,
        {"lower_bounds": [0, 2], "upper_bounds": [1, 1]},
        FormatError,
        r"lower_bounds\[1\] must be below upper_bounds\[1\], got 2 and 1",
    ),
    "lower alone": (network, {"lower_bounds": [0, 2]}, FormatError, "must be given together, got lower_bounds only"),
    "infinite bounds": (
        network,
        {"lower_bounds": np.array([0, -np.inf]), "upper_bounds": np.ones(2)},
        FormatError,
        r"lower_bounds\[1\] must be a finite number, got -Infinity",
    ),
}


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("fault", UNREADABLE)
def test_what_could_not_be_loaded_is_not_written(fault, tmp_path):
    make, metadata, error, message = UNREADABLE[fault]
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(error, match=message):
        hessquik.save(make(), path, **metadata)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("f.safetensors", b"before")]


BOUNDS = {
    "lists": ([0, -1.5], [1, 2.5]),
    "tuples": ((0, -1.5), (1, 2.5)),
    "NumPy": (np.array([0.0, -1.5]), np.array([1.0, 2.5])),
    "NumPy float32": (np.array([0.0, -1.5], np.float32), np.array([1.0, 2.5], np.float32)),
    "NumPy scalars": ([np.float32(0.0), np.float64(-1.5)], [np.int64(1), np.float32(2.5)]),
    "torch": (torch.tensor([0.0, -1.5]), torch.tensor([1.0, 2.5], dtype=torch.float64)),
    "torch with a gradient": (torch.tensor([0.0, -1.5], requires_grad=True), torch.tensor([1.0, 2.5])),
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_bounds_may_be_arrays(kind, tmp_path):
    lower, upper = BOUNDS[kind]
    hessquik.save(network(), tmp_path / "f.safetensors", lower_bounds=lower, upper_bounds=upper)
    found = storage.parse((tmp_path / "f.safetensors").read_bytes()).metadata
    assert found == {"lower_bounds": [0.0, -1.5], "upper_bounds": [1.0, 2.5]}


def test_names_and_errors_may_be_arrays():
    training = {"error": np.float32(0.5), "losses": torch.tensor([1.0, 0.5]), "sizes": (np.int64(3), 4)}
    data = storage.serialize(network(), input_names=np.array(["x", "y"]), output_names=("f",), training=training)
    found = storage.parse(data).metadata
    assert found["input_names"] == ["x", "y"]
    assert found["output_names"] == ["f"]
    assert found["training"] == {"error": 0.5, "losses": [1.0, 0.5], "sizes": [3, 4]}


def test_widths_and_steps_may_be_scalars_of_numpy():
    f = net.NN(net.fullyConnectedNN(np.array([2, 3]), T), lay.resnetLayer(np.int64(3), h=np.float64(0.5), act=T))
    assert storage.parse(storage.serialize(f)).architecture["layers"][1]["h"] == 0.5


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder does not exist: '.*nowhere'$") as refusal:
        hessquik.save(network(), tmp_path / "nowhere" / "f.safetensors")
    assert refusal.value.filename == str(tmp_path / "nowhere")


def test_concurrent_saves_leave_one_of_the_files(tmp_path):
    """Sixteen threads save to one path while another reads: every file that is seen is complete."""
    path, stop, seen = tmp_path / "f.safetensors", threading.Event(), []
    networks = [net.fullyConnectedNN([2, 40 + i, 1], T) for i in range(16)]
    hessquik.save(networks[0], path)

    def read():
        while not stop.is_set():
            seen.append(hessquik.load(path).widths[1])

    with ThreadPoolExecutor(17) as threads:
        reader = threads.submit(read)
        for _ in range(3):
            list(threads.map(lambda f: hessquik.save(f, path), networks))
        stop.set()
        reader.result()
    assert set(seen) <= set(range(40, 56))
    assert hessquik.load(path).widths[1] in range(40, 56)
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        hessquik.save(network(), tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_has_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        hessquik.save(network(), tmp_path / "f.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f.safetensors").stat().st_mode) == 0o640


def test_a_negated_view_is_saved_as_the_numbers_it_shows():
    f = network()
    weights = torch.imag(torch.conj(torch.complex(torch.zeros(2, 3), torch.ones(2, 3))))
    assert weights.is_neg()
    f[0].K = torch.nn.Parameter(weights)
    assert torch.equal(storage.parse(storage.serialize(f)).network[0].K.detach(), -torch.ones(2, 3))


def test_the_bytes_are_the_same_every_time():
    assert storage.serialize(network(), training={"b": 1, "a": 2}) == storage.serialize(
        network(), training={"b": 1, "a": 2}
    )
