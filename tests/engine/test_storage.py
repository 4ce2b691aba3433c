"""Networks are saved and loaded unchanged, and any other file is refused with its fault."""

import json
import mmap
import random
import struct
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import hessquik
from hessquik import architecture, storage
from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import ACTIVATIONS, identityActivation, softplusActivation, tanhActivation
from hessquik.architecture import MAX_NESTING
from hessquik.errors import ArchitectureError, CompositionError, FormatError
from tests.engine import random_networks as draws

T = tanhActivation()


def network():
    torch.manual_seed(0)
    return net.NN(
        lay.singleLayer(3, 4, softplusActivation(2.0, 15.0), bias=False),
        net.NN(net.resnetNN(4, 2, 0.25, T), net.fullyConnectedNN([4, 3], T)),
        net.ICNN(3, [None, 4]),
        lay.quadraticICNNLayer(3, 4, 2),
        lay.skipLayer(1, 3, 2, T, carried=1),
        lay.skipLayer(3, 1, 1, T),
        lay.quadraticLayer(1, 2),
    )


def same(got, expected):
    states = got.state_dict(), expected.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_saved_is_loaded(dtype, tmp_path):
    f = network().to(dtype)
    metadata = {
        "description": "a test — with ∂",
        "input_names": ["x", "y", "z"],
        "output_names": ["f"],
        "lower_bounds": [0, -1.5, 0.0],
        "upper_bounds": [1, 2, 3],
        "training": {"target": "nothing", "error": 0.5},
    }
    hessquik.save(f, tmp_path / "f.safetensors", **metadata)
    g = hessquik.load(tmp_path / "f.safetensors")
    assert same(g, f)
    assert architecture.describe(g) == architecture.describe(f)
    assert next(g.parameters()).dtype is dtype
    x = torch.randn(5, 3, dtype=dtype)
    for got, expected in zip(g(x, True, True), f(x, True, True), strict=True):
        assert torch.equal(got, expected)
    found = storage.parse((tmp_path / "f.safetensors").read_bytes())
    assert found.metadata == metadata
    assert found.architecture == architecture.describe(f)
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]
    assert all(parameter.requires_grad for parameter in g.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc: run on Linux")
@pytest.mark.parametrize("padding", [0, 8, 3], ids="{} blanks".format)
def test_weights_are_views_of_a_file_that_never_changes(padding, tmp_path):
    """But copied where its header ends at another place than a multiple of 8 bytes."""
    f, path = network(), tmp_path / "f.safetensors"
    data = storage.serialize(f)
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + header_bytes] + b" " * padding
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + header_bytes :])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        g = storage.parse(mapped, str(path)).network
    assert same(g, f)
    maps = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert len(places) == (padding != 3)
    for first, last in places:
        assert all(int(first, 16) < parameter.data_ptr() < int(last, 16) for parameter in g.parameters())
    x = torch.randn(5, 3)
    assert torch.equal(g(x)[0], f(x)[0])
    with torch.no_grad():  # views of a private mapping
        g[0].K.zero_()


def test_random_networks_are_saved_and_loaded():
    for seed in range(100):
        draw = random.Random(seed)
        f = draws.network(draw, *draws.shapes()[seed % 16])
        g = storage.parse(storage.serialize(f)).network
        assert same(g, f), seed
        assert architecture.describe(g) == architecture.describe(f), seed


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_described(name):
    described = architecture.describe(ACTIVATIONS[name]())
    assert described["type"] == name
    assert architecture.describe(architecture.build_activation(described)) == described


@pytest.mark.parametrize("kind", sorted(architecture.TYPES))
def test_every_layer_and_network_can_be_described(kind):
    assert {type(module).__name__ for module in network().modules()} >= set(architecture.TYPES) - {kind}
    made = {type(module).__name__: module for module in [network(), *network().modules()]}[kind]
    described = architecture.describe(made)
    assert json.loads(json.dumps(described)) == described
    assert architecture.describe(architecture.build(described)) == described


def test_a_layer_alone_is_a_network_of_one():
    f = lay.singleLayer(3, 2, T)
    data = storage.serialize(net.NN(f))
    assert storage.parse(data).network.dim_input() == 3
    tensors = {name: tensor.detach() for name, tensor in f.state_dict().items()}
    assert isinstance(storage.assemble(architecture.describe(f), tensors), net.NN)


def test_a_layer_in_two_places_is_saved_twice():
    shared = lay.resnetLayer(3, act=T)
    f = net.NN(shared, shared)
    g = storage.parse(storage.serialize(f)).network
    assert same(g, f)
    assert g[0] is not g[1]


def test_a_changed_family_is_described_layer_by_layer():
    f = net.resnetNN(3, 2, 0.5, T)
    f[1].h = 0.25
    described = architecture.describe(f)
    assert described["type"] == "NN"
    assert [layer["h"] for layer in described["layers"]] == [0.5, 0.25]


class strangeActivation(tanhActivation):
    pass


class softplusImpostor(softplusActivation):
    pass


softplusImpostor.__name__ = "softplusActivation"


@pytest.mark.parametrize(
    "act", [strangeActivation(), softplusImpostor(), torch.nn.Tanh()], ids=["own", "impostor", "torch"]
)
def test_what_files_cannot_describe_is_not_saved(act, tmp_path):
    with pytest.raises(
        ArchitectureError, match=r"network\.layers\[0\]\.act must have one of the types that files know"
    ):
        storage.save(net.NN(lay.singleLayer(2, 2, act)), tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"descriptoin": "x"}, 'metadata must be among description, .* got "descriptoin"'),
        ({"description": 3}, "description must be a string, got 3"),
        ({"input_names": ["x"]}, "input_names must be one string per input"),
        ({"output_names": ["a", "b"]}, "output_names must be one string per output"),
        ({"lower_bounds": [0, 1, float("nan")]}, r"lower_bounds\[2\] must be a finite number, got NaN"),
        ({"upper_bounds": [0, 1, True]}, "upper_bounds must be one number per input"),
        ({"training": "well"}, 'training must be a JSON object, got "well"'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_that_do_not_fit_are_refused(metadata, message):
    with pytest.raises(FormatError, match=message):
        storage.serialize(network(), **metadata)


def file(described=None, tensors=None, **header):
    """Return the bytes of a file with parts of it replaced."""
    f = net.fullyConnectedNN([2, 3, 1], T)
    texts = {
        "format": "hessquik",
        "format_version": "1",
        "network": json.dumps(architecture.describe(f) if described is None else described),
        **header,
    }
    weights = {name: tensor.detach() for name, tensor in f.state_dict().items()} if tensors is None else tensors
    return safetensors.torch.save(weights, {key: text for key, text in texts.items() if text is not None})


def weights(**changed):
    f = net.fullyConnectedNN([2, 3, 1], T)
    return {**{name: tensor.detach() for name, tensor in f.state_dict().items()}, **changed}


LAYER = {"type": "singleLayer", "in_features": 2, "out_features": 2}
NESTED = LAYER
for _ in range(MAX_NESTING + 2):
    NESTED = {"type": "NN", "layers": [NESTED]}

REFUSED = {
    "empty": (b"", "bytes"),
    "short": (b"12345678", "bytes"),
    "length beyond the file": (struct.pack("<Q", 1 << 40) + b"{}", "the header must have at most"),
    "no JSON": (struct.pack("<Q", 8) + b"12345678" + b"x", "must be a safetensors file"),
    "other format": (file(format="onnx"), "format"),
    "no format": (file(format=None), "format"),
    "newer version": (file(format_version="2"), "format_version"),
    "no network": (file(network=None), "network"),
    "network no JSON": (file(network="{"), "network must be strict JSON"),
    "network with NaN": (file(network='{"type": NaN}'), "network must be strict JSON"),
    "duplicate keys": (
        file(network='{"type": "NN", "type": "NN"}'),
        r"network must be strict JSON \(duplicate keys\)",
    ),
    "deep JSON": (file(network="[" * 100_000), "network must be nested at most 32 deep"),
    "network a list": (file([]), "network must be an object with a 'type'"),
    "unknown type": (file({"type": "os.system"}), r"network\.type must be one of NN"),
    "type a list": (file({"type": ["NN"]}), r"network\.type must be one of NN, .* got \[\"NN\"\]"),
    "no layers": (file({"type": "NN", "layers": []}), r"network\.layers must be a list of 1 to"),
    "missing argument": (
        file({"type": "singleLayer", "in_features": 2}),
        "network must have the argument 'out_features'",
    ),
    "extra argument": (
        file({**LAYER, "device": "cuda"}),
        "network must have no arguments but in_features, out_features, act, bias",
    ),
    "width zero": (
        file({**LAYER, "in_features": 0}),
        r"network\.in_features must be an integer from 1 to 65536, got 0",
    ),
    "width huge": (file({**LAYER, "in_features": 1 << 40}), r"network\.in_features must be an integer"),
    "width a bool": (file({**LAYER, "in_features": True}), r"network\.in_features must be an integer"),
    "width a float": (file({**LAYER, "in_features": 2.0}), r"network\.in_features must be an integer"),
    "bias a number": (file({**LAYER, "bias": 1}), r"network\.bias must be true or false, got 1"),
    "unknown activation": (
        file({**LAYER, "act": {"type": "swishActivation"}}),
        r"network\.act\.type must be one of antiTanh",
    ),
    "β zero": (
        file({**LAYER, "act": {"type": "softplusActivation", "beta": 0}}),
        r"network\.act\.beta must be a finite number above 0, got 0",
    ),
    "step a string": (
        file({"type": "resnetLayer", "width": 2, "h": "1"}),
        r"network\.h must be a finite number, got",
    ),
    "nested too deep": (file(NESTED), "must not be inside more than 7 other networks"),
    "incompatible": (
        file({"type": "NN", "layers": [LAYER, {**LAYER, "in_features": 3}]}),
        "incompatible composition",
    ),
    "wrong shape": (
        file(tensors=weights(**{"0.K": torch.zeros(3, 2)})),
        r"tensor 0\.K must have the shape \(2, 3\), got \(3, 2\)",
    ),
    "missing tensor": (
        file(tensors={"0.K": torch.zeros(2, 3)}),
        r"there must be tensors for 2 layers, got 1 tensors",
    ),
    "extra tensor": (file(tensors=weights(extra=torch.zeros(1))), 'there must be no tensor "extra"'),
    "no tensors": (file(tensors={}), "at least one tensor"),
    "mixed dtypes": (file(tensors=weights(**{"0.K": torch.zeros(2, 3).double()})), "all F32 or all F64"),
    "half": (file(tensors={name: tensor.half() for name, tensor in weights().items()}), "all F32 or all F64"),
    "NaN": (
        file(tensors=weights(**{"0.b": torch.full((3,), torch.nan)})),
        r"weights must be finite, got NaN or infinity in \"0\.b\"",
    ),
    "infinity": (file(tensors=weights(**{"0.b": torch.full((3,), torch.inf)})), "weights must be finite"),
    "cut off": (file()[:-4], "truncated"),
    "bytes too many": (file() + b"1234", "must be a safetensors file"),
    "metadata no JSON": (file(input_names="x, y"), "input_names must be strict JSON"),
    "metadata that do not fit": (file(input_names='["x"]'), "input_names must be one string per input"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_saved_network_is_refused(fault, tmp_path):
    data, message = REFUSED[fault]
    with pytest.raises(FormatError, match=message):
        storage.parse(data)
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match=r"^bad\.safetensors: "):
        storage.load(tmp_path / "bad.safetensors")


def test_a_mangled_file_is_refused_or_right():
    """Each byte of a small file is changed in turn: the result is a FormatError or a network, no other exception."""
    data = file()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    generator, refused = random.Random(0), 0
    for place in [*range(8), *generator.sample(range(8, header), 200), *range(header, len(data), 7)]:
        mangled = bytearray(data)
        mangled[place] ^= 1 << generator.randrange(8)
        try:
            assert isinstance(storage.parse(bytes(mangled)).network, net.NN)
        except FormatError:
            refused += 1
    assert refused > 100


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch):
    storage.save(net.fullyConnectedNN([2, 3, 1], T), tmp_path / "f.safetensors")
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", 100)
    with pytest.raises(FormatError, match=r"f\.safetensors: the file must have 9 to 100 bytes, got more than 100"):
        storage.load(tmp_path / "f.safetensors")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.load(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("description", "error"),
    [({"type": "softplusActivation", "gamma": 1}, ArchitectureError), ({"type": "NN"}, ArchitectureError)],
    ids=["argument", "network"],
)
def test_what_describes_no_activation_is_refused(description, error):
    with pytest.raises(error):
        architecture.build_activation(description)


def test_building_makes_new_weights_where_and_of_what_is_asked():
    described = architecture.describe(network())
    made = architecture.build(described, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float64)}
    with pytest.raises(CompositionError):
        architecture.build({"type": "NN", "layers": [LAYER, {**LAYER, "in_features": 3}]})


def test_arguments_with_defaults_may_be_left_out():
    made = architecture.build(LAYER)
    assert isinstance(made.act, identityActivation)
    assert made.b is not None
