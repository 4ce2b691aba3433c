"""A malformed model file is refused by a FormatError that names the fault, never by another exception.

Each leaf of a file's header, of its architecture and of its metadata is replaced in turn by each kind of wrong value;
in the short form by every fourth kind, beginning with another one at each leaf.
"""

import copy
import json
import struct
import time

import pytest
import safetensors.torch
import torch

from hessquik import layers as lay
from hessquik import networks as net
from hessquik import storage
from hessquik.activations import softplusActivation, tanhActivation
from hessquik.architecture import describe
from hessquik.errors import FormatError
from tests.whole import choose

#: JSON texts, since some have no Python value that json.dumps writes.
WRONG = {
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "negative": "-1",
    "fraction": "2.5",
    "large": "1000000000000",
    "65 bits": "36893488147419103232",
    "400 digits": "1" + "0" * 400,
    "minus 400 digits": "-1" + "0" * 400,
    "5000 digits": "1" * 5000,
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "1e999": "1e999",
    "tiny": "1e-320",
    "empty text": '""',
    "text": '"x"',
    "number as text": '"3"',
    "lone surrogate": '"\\ud800"',
    "null byte": '"\\u0000"',
    "empty list": "[]",
    "list of null": "[null]",
    "numbers": "[1, 2, 3]",
    "empty object": "{}",
    "object": '{"type": "NN"}',
    "deep list": "[" * 900 + "]" * 900,
    "deep object": '{"a":' * 900 + "0" + "}" * 900,
    "very deep list": "[" * 100_000 + "]" * 100_000,
    "cut off": "[1, ",
}
PLACEHOLDER = "\N{REPLACEMENT CHARACTER} here"


def network():
    torch.manual_seed(0)
    return net.NN(
        lay.singleLayer(3, 4, softplusActivation(2.0, 15.0)),
        net.NN(net.resnetNN(4, 2, 0.25, tanhActivation()), net.fullyConnectedNN([4, 3])),
        net.ICNN(3, [None, 4]),
        lay.quadraticICNNLayer(3, 4, 2),
        lay.quadraticLayer(1, 2),
    )


METADATA = {
    "description": "a test",
    "input_names": ["x", "y", "z"],
    "output_names": ["f"],
    "lower_bounds": [0.0, -1.5, 0.0],
    "upper_bounds": [1.0, 2.0, 3.0],
    "training": {"target": "nothing", "errors": [0.5, {"a": 1}]},
}


def leaves(value, way=()):
    """Yield the paths of all values inside a JSON value, containers included."""
    yield way
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from leaves(child, (*way, key))


def places(value, wrong):
    """Return the paths at which a kind of wrong value is tried."""
    step = choose(4, 1)
    return list(leaves(value))[list(WRONG).index(wrong) % step :: step]


def replaced(value, way, text):
    """Return the JSON text of a value in which the value at a path is replaced by another JSON text."""
    if not way:
        return text
    value = copy.deepcopy(value)
    parent = value
    for key in way[:-1]:
        parent = parent[key]
    parent[way[-1]] = PLACEHOLDER
    return json.dumps(value).replace(json.dumps(PLACEHOLDER), text)


def without(value, way):
    value = copy.deepcopy(value)
    parent = value
    for key in way[:-1]:
        parent = parent[key]
    del parent[way[-1]]
    return json.dumps(value)


def parts(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def file(header_text, tensors):
    text = header_text.encode()
    return struct.pack("<Q", len(text)) + text + tensors


def is_read_or_refused(data):
    """Return whether a file is refused; one that is read must be a network that can be saved again."""
    try:
        saved = storage.parse(data)
    except FormatError as error:
        message = str(error)
        assert len(message) < 2000
        message.encode()  # can be printed and sent
        return True
    assert isinstance(saved.network, net.NN)
    json.dumps(saved.architecture, allow_nan=False).encode()
    json.dumps(saved.metadata, allow_nan=False, ensure_ascii=False).encode()
    storage.parse(storage.serialize(saved.network, **saved.metadata))
    return False


@pytest.fixture(scope="module")
def whole():
    header, tensors = parts(storage.serialize(network(), **METADATA))
    del header["__metadata__"][storage.CHECKSUM]
    return header, tensors


@pytest.mark.parametrize("wrong", WRONG)
def test_every_place_of_the_architecture_with_every_wrong_value(wrong, whole):
    header, tensors = whole
    architecture = json.loads(header["__metadata__"]["network"])
    refused = 0
    for way in (tried := places(architecture, wrong)):
        texts = {**header["__metadata__"], "network": replaced(architecture, way, WRONG[wrong])}
        refused += is_read_or_refused(file(json.dumps({**header, "__metadata__": texts}), tensors))
    assert refused > 0.6 * len(tried)


@pytest.mark.parametrize("wrong", WRONG)
def test_every_place_of_the_header_with_every_wrong_value(wrong, whole):
    header, tensors = whole
    tried = places(header, wrong)
    refused = sum(is_read_or_refused(file(replaced(header, way, WRONG[wrong]), tensors)) for way in tried)
    assert refused > len(tried) // 2


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("key", [key for key in METADATA if key != "description"])
def test_every_place_of_the_metadata_with_every_wrong_value(key, wrong, whole):
    header, tensors = whole
    value = json.loads(header["__metadata__"][key])
    for way in places(value, wrong):
        texts = {**header["__metadata__"], key: replaced(value, way, WRONG[wrong])}
        is_read_or_refused(file(json.dumps({**header, "__metadata__": texts}), tensors))


def test_every_place_of_every_part_left_out(whole):
    header, tensors = whole
    for way in leaves(header):
        if way:
            assert is_read_or_refused(file(without(header, way), tensors)) or way[0] == "__metadata__", way
    for key in ("network", "input_names", "lower_bounds", "training"):
        value = json.loads(header["__metadata__"][key])
        for way in leaves(value):
            if way:
                texts = {**header["__metadata__"], key: without(value, way)}
                is_read_or_refused(file(json.dumps({**header, "__metadata__": texts}), tensors))


def fully_connected(**texts):
    f = net.fullyConnectedNN([2, 3, 1], tanhActivation())
    described = {"network": json.dumps(describe(f)), **texts}
    tensors = {name: tensor.detach() for name, tensor in f.state_dict().items()}
    return safetensors.torch.save(tensors, {"format": "hessquik", "format_version": "1", **described})


def architecture(text):
    return fully_connected(network=text)


HUGE = "1" + "0" * 400
FAULTS = {
    "null width": (
        architecture('{"type": "fullyConnectedNN", "widths": [null, 3, 1]}'),
        r"network\.widths\[0\] must be an integer from 1 to 65536, got null",
    ),
    "null features": (
        architecture('{"type": "singleLayer", "in_features": null, "out_features": 1}'),
        r"network\.in_features must be an integer from 1 to 65536, got null",
    ),
    "null features of a quadratic layer": (
        architecture('{"type": "quadraticLayer", "in_features": null, "rank": 1}'),
        r"network\.in_features must be an integer",
    ),
    "null inside the widths of a convex network": (
        architecture('{"type": "ICNN", "input_dim": 2, "widths": [null, null, 1]}'),
        r"network\.widths\[1\] must be an integer",
    ),
    "a width of 400 digits": (
        architecture(f'{{"type": "fullyConnectedNN", "widths": [2, {HUGE}, 1]}}'),
        r"network\.widths\[1\] must be between -2\^63 and 2\^64",
    ),
    "h of 400 digits": (
        architecture(f'{{"type": "resnetNN", "width": 2, "depth": 1, "h": {HUGE}}}'),
        r"network\.h must be between -2\^63 and 2\^64",
    ),
    "h infinite": (
        architecture('{"type": "resnetNN", "width": 2, "depth": 1, "h": 1e999}'),
        r"network\.h must be a finite number",
    ),
    "β of 400 digits": (
        architecture(
            '{"type": "fullyConnectedNN", "widths": [2, 3, 1], '
            f'"act": {{"type": "softplusActivation", "beta": {HUGE}}}}}'
        ),
        r"network\.act\.beta must be between",
    ),
    "an infinite error": (fully_connected(training='{"loss": 1e999}'), r"training\.loss must be a finite number"),
    "a bound of 400 digits": (
        fully_connected(lower_bounds=f"[0, {HUGE}]", upper_bounds="[1, 1]"),
        r"lower_bounds\[1\] must be between",
    ),
    "lower bounds alone": (
        fully_connected(lower_bounds="[0, 0]"),
        "lower_bounds and upper_bounds must be given together, got lower_bounds only",
    ),
    "upper bounds alone": (fully_connected(upper_bounds="[0, 0]"), "got upper_bounds only"),
    "bounds reversed": (
        fully_connected(lower_bounds="[0, 3]", upper_bounds="[1, 2]"),
        r"lower_bounds\[1\] must be below upper_bounds\[1\], got 3 and 2",
    ),
    "bounds equal": (
        fully_connected(lower_bounds="[0, 2]", upper_bounds="[1, 2]"),
        r"lower_bounds\[1\] must be below upper_bounds\[1\]",
    ),
    "bounds further apart than the largest number": (
        fully_connected(lower_bounds="[0, -1e308]", upper_bounds="[1, 1e308]"),
        r"upper_bounds\[1\] - lower_bounds\[1\] must be finite",
    ),
    "a lone surrogate": (
        fully_connected(input_names='["x", "\\ud800"]'),
        r"input_names\[1\] must be Unicode text, got a lone surrogate",
    ),
    "deep metadata": (
        fully_connected(training='{"a":' * 100 + "0" + "}" * 100),
        "training must be nested at most 32 deep",
    ),
    "depth negative beside many layers": (
        architecture(
            json.dumps(
                {
                    "type": "NN",
                    "layers": [{"type": "resnetNN", "width": 1, "depth": -(10**9)}]
                    + [{"type": "NN", "layers": [{"type": "resnetNN", "width": 1, "depth": 1024}] * 100}] * 10,
                }
            )
        ),
        "tensors",
    ),
    "half precision": (
        safetensors.torch.save(
            {"0.K": torch.zeros(2, 1).half()},
            {
                "format": "hessquik",
                "format_version": "1",
                "network": '{"type": "singleLayer", "in_features": 2, "out_features": 1, "bias": false}',
            },
        ),
        "tensors must be all F32 or all F64, got F16",
    ),
    "cut off": (fully_connected()[:-4], "the file is truncated"),
    "cut off in the header": (fully_connected()[:60], "the file is truncated"),
    "something else": (b"\x08\x07\x12\x06onnx\x00\x00" * 99, "not a safetensors file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_message_names_the_fault(fault, tmp_path):
    data, message = FAULTS[fault]
    with pytest.raises(FormatError, match=message):
        storage.parse(data)
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match=r"^bad\.safetensors: "):
        storage.load(tmp_path / "bad.safetensors")


def test_a_damaged_file_is_corrupted():
    data = bytearray(storage.serialize(network()))
    data[-1] ^= 1
    with pytest.raises(FormatError, match="checksum mismatch: the file is corrupted"):
        storage.parse(bytes(data))


def test_refusing_is_as_quick_as_reading():
    """The size of the file bounds the work: no description builds more layers than the file has tensors."""
    layer = {"type": "resnetNN", "width": 1, "depth": 1024}
    bombs = [
        {"type": "NN", "layers": [{"type": "resnetNN", "width": 1, "depth": -(10**9)}, *[layer] * 1000]},
        {"type": "NN", "layers": [{"type": "fullyConnectedNN", "widths": []}, *[layer] * 1000]},
        {"type": "NN", "layers": [{"type": "NN", "layers": []}, *[layer] * 1000]},
        {"type": "NN", "layers": [{"type": "singleLayer", "depth": -(10**9)}, *[layer] * 1000]},
    ]
    for bomb in bombs:
        began = time.process_time()
        with pytest.raises(FormatError):
            storage.parse(architecture(json.dumps(bomb)))
        assert time.process_time() - began < 1.0
