"""Networks as files: one ``.safetensors`` each, weights under their state-dict names, the architecture as JSON.

A file is data: it is read into memory whole, checked before and after parsing, and never executed. The header's
metadata has ``format`` = ``hessquik``, ``format_version`` = ``1``, ``network`` = the architecture, and optionally
what :data:`METADATA` lists and ``sha256``, a checksum of all else, which :func:`save` writes.

To make a new layer storable: a row in :data:`TYPES`, and its arguments in :data:`ARGUMENTS` if they are new.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from hessquik.activations import ACTIVATIONS, hessQuikActivationFunction
from hessquik.errors import ArchitectureError, CompositionError, FormatError
from hessquik.layers import (
    ICNNLayer,
    hessQuikLayer,
    quadraticICNNLayer,
    quadraticLayer,
    resnetLayer,
    singleLayer,
)
from hessquik.networks import ICNN, NN, fullyConnectedNN, resnetNN

__all__ = [
    "METADATA",
    "TYPES",
    "SavedNetwork",
    "assemble",
    "build",
    "build_activation",
    "describe",
    "load",
    "parse",
    "parse_json",
    "save",
    "serialize",
]

FORMAT, FORMAT_VERSION = "hessquik", "1"
#: Metadata key of the SHA-256 of all else in the file.
CHECKSUM = "sha256"
MAX_FILE_BYTES = 512 << 20
MAX_HEADER_BYTES = 256 << 10
MAX_TENSORS = 1024
MAX_WIDTH = 1 << 16
MAX_LAYERS = 1024
MAX_NESTING = 8

#: Layers and networks by the names that files use.
TYPES: dict[str, type[hessQuikLayer] | type[NN]] = {
    kind.__name__: kind
    for kind in (
        NN,
        fullyConnectedNN,
        resnetNN,
        ICNN,
        singleLayer,
        resnetLayer,
        ICNNLayer,
        quadraticLayer,
        quadraticICNNLayer,
    )
}


@dataclass(frozen=True)
class SavedNetwork:
    """What a file holds.

    Attributes:
        network: The network.
        architecture: Its description.
        metadata: ``description``, ``input_names``, ``output_names``, ``lower_bounds``, ``upper_bounds``,
            ``training``, as far as the file has them.
    """

    network: NN
    architecture: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)


def save(network: NN, path: str | Path, **metadata: Any) -> None:
    """Write a network to a file, which is complete or not there at all.

    Args:
        network: The network.
        path: Where; conventionally ``NAME.safetensors``.
        metadata: Any of ``description`` (str), ``input_names``, ``output_names`` (lists of str), ``lower_bounds``,
            ``upper_bounds`` (lists of numbers), ``training`` (a JSON object).

    Raises:
        ArchitectureError: the network has a part that a file cannot describe.
        FormatError: the metadata do not fit the network.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(fullyConnectedNN([2, 8, 1]), f"{folder}/f.safetensors", input_names=["x", "y"])
        ...     load(f"{folder}/f.safetensors").dim_input()
        2
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(serialize(network, **metadata))
    partial.replace(path)


def serialize(network: NN, **metadata: Any) -> bytes:
    """The bytes that :func:`save` writes.

    Example:
        >>> parse(serialize(fullyConnectedNN([2, 8, 1]))).network.widths
        [2, 8, 1]
    """
    architecture = describe(network)
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "network": json.dumps(architecture)}
    _check_metadata(metadata, network)
    for key, value in metadata.items():
        header[key] = value if key == "description" else json.dumps(value, allow_nan=False)
    # Cloned because safetensors refuses tensors that share memory, as those of a layer in two places do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    header[CHECKSUM] = _checksum(safetensors.torch.save(tensors, header))
    return _with_sorted_metadata(safetensors.torch.save(tensors, header))


def _with_sorted_metadata(data: bytes) -> bytes:
    """The same file with its metadata in alphabetical order: safetensors writes them in a random one."""
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text + data[8 + header_bytes :]


def load(path: str | Path, device: torch.device | str = "cpu") -> NN:
    """Read a network from a file.

    Raises:
        FormatError: the file is not a saved network; the message names the file and the fault.

    See :func:`save` for an example.
    """
    path = Path(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise FormatError(f"{path.name}: expected at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}")
    try:
        return parse(path.read_bytes()).network.to(device)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None


def parse(data: bytes) -> SavedNetwork:
    """Read a network from the bytes of a file.

    Raises:
        FormatError: they are not those of a saved network.

    See :func:`serialize` for an example.
    """
    texts = _read_header(data)
    architecture = parse_json("network", texts["network"])
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise FormatError(f"expected a safetensors file, got one that does not parse ({error})") from None
    try:
        network = assemble(architecture, tensors)
    except (ArchitectureError, CompositionError) as error:
        raise FormatError(str(error)) from None
    metadata = {
        key: text if key == "description" else parse_json(key, text) for key, text in texts.items() if key in METADATA
    }
    _check_metadata(metadata, network)
    return SavedNetwork(network, architecture, metadata)


def assemble(architecture: Any, tensors: Mapping[str, torch.Tensor]) -> NN:
    """Make the network that :func:`describe` described, with the weights of a state dict.

    Raises:
        ArchitectureError: the description is not one.
        CompositionError: its layers do not fit together.
        FormatError: the weights do not fit the description.

    Example:
        >>> f = fullyConnectedNN([2, 8, 1])
        >>> assemble(describe(f), f.state_dict()).widths
        [2, 8, 1]
    """
    _check_tensors(tensors)
    layers = _count_layers(architecture)
    if layers > len(tensors):  # each has one at least; refused before they are made
        raise FormatError(f"expected tensors for {layers} layers, got {len(tensors)} tensors")
    module = build(architecture, device="meta")
    _fill(module, tensors)
    return module if isinstance(module, NN) else NN(module)


def describe(module: nn.Module) -> dict[str, Any]:
    """Describe a layer or network by its type and constructor arguments, as JSON.

    A network of one of the documented families whose layers were changed after it was made is described layer by
    layer instead.

    Raises:
        ArchitectureError: a part has a type that files do not know.

    Example:
        >>> describe(resnetLayer(4, h=0.25))
        {'type': 'resnetLayer', 'width': 4, 'h': 0.25, 'act': {'type': 'identityActivation'}, 'bias': True}
    """
    name = type(module).__name__
    if TYPES.get(name, ACTIVATIONS.get(name)) is not type(module):
        raise ArchitectureError(f"expected one of {', '.join(TYPES)} or a known activation, got {name}")
    assert isinstance(module, NN | hessQuikLayer | hessQuikActivationFunction)
    if type(module) is NN:
        return {"type": name, "layers": [describe(layer) for layer in module]}
    arguments = {key: _describe_argument(getattr(module, key)) for key in module.parameter_names}
    described = {"type": name, **arguments}
    if isinstance(module, NN):
        rebuilt = build(described, device="meta")
        assert isinstance(rebuilt, NN)
        layers = [describe(layer) for layer in module]
        if layers != [describe(layer) for layer in rebuilt]:
            return {"type": "NN", "layers": layers}
    return described


def _describe_argument(value: Any) -> Any:
    return describe(value) if isinstance(value, nn.Module) else value


def build(
    architecture: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> NN | hessQuikLayer:
    """Make the layer or network that :func:`describe` described, with new weights.

    Raises:
        ArchitectureError: the description is not one.
        CompositionError: its layers do not fit together.

    Example:
        >>> build({"type": "fullyConnectedNN", "widths": [2, 8, 1]}).dim_input()
        2
    """
    return _build(architecture, "network", MAX_NESTING, {"device": device, "dtype": dtype})


def _count_layers(architecture: Any, nesting: int = MAX_NESTING) -> int:
    """How many layers a description asks for; what is no description counts as one."""
    arguments = architecture if isinstance(architecture, dict) else {}
    layers, depth, widths = arguments.get("layers"), arguments.get("depth"), arguments.get("widths")
    if isinstance(layers, list) and nesting > 0:
        return sum(_count_layers(layer, nesting - 1) for layer in layers)
    if isinstance(widths, list):
        return len(widths) - 1
    return depth if isinstance(depth, int) else 1


def _build(architecture: Any, place: str, nesting: int, made: Mapping[str, Any]) -> NN | hessQuikLayer:
    kind, arguments = _type_and_arguments(architecture, place, TYPES)
    if nesting == 0:
        raise ArchitectureError(f"{place}: expected networks nested at most {MAX_NESTING} deep")
    if kind is NN:
        layers = arguments.pop("layers", None)
        _expect(not arguments, place, "only 'layers'", sorted(arguments))
        _expect(
            isinstance(layers, list) and 0 < len(layers) <= MAX_LAYERS,
            f"{place}.layers",
            f"a list of 1 to {MAX_LAYERS} layers",
            layers,
        )
        parts = [_build(layer, f"{place}.layers[{i}]", nesting - 1, made) for i, layer in enumerate(layers)]
        return NN(*parts)
    module = kind(**_checked_arguments(kind, arguments, place), **made)
    assert isinstance(module, NN | hessQuikLayer)
    return module


def build_activation(architecture: Any, place: str = "act") -> hessQuikActivationFunction:
    """Make the activation that :func:`describe` described.

    Raises:
        ArchitectureError: the description is not one.

    Example:
        >>> build_activation({"type": "softplusActivation", "beta": 2.0}).beta
        2.0
    """
    kind, arguments = _type_and_arguments(architecture, place, ACTIVATIONS)
    module = kind(**_checked_arguments(kind, arguments, place))
    assert isinstance(module, hessQuikActivationFunction)
    return module


def _type_and_arguments(
    architecture: Any, place: str, table: Mapping[str, type[nn.Module]]
) -> tuple[type[Any], dict[str, Any]]:
    """The class that a description names, looked up in a table, and the rest of the description."""
    _expect(isinstance(architecture, dict), place, "an object with a 'type'", architecture)
    name = architecture.get("type")
    _expect(isinstance(name, str) and name in table, f"{place}.type", f"one of {', '.join(table)}", name)
    return table[name], {key: value for key, value in architecture.items() if key != "type"}


def _checked_arguments(kind: type[Any], arguments: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The constructor arguments of a class, each checked by its name."""
    known = inspect.signature(kind).parameters
    for name in kind.parameter_names:
        required = known[name].default is inspect.Parameter.empty
        _expect(name in arguments or not required, place, f"the argument {name!r}", sorted(arguments))
    for name in arguments:
        _expect(name in kind.parameter_names, place, f"only {', '.join(kind.parameter_names) or 'a type'}", name)
    return {name: _ARGUMENTS[name](value, f"{place}.{name}") for name, value in arguments.items()}


def _expect(holds: bool, place: str, expected: str, got: Any) -> None:
    """Refuse a description where it does not hold."""
    if not holds:
        text = repr(got)
        raise ArchitectureError(f"{place}: expected {expected}, got {text[:60] + '…' if len(text) > 60 else text}")


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _width(value: Any, place: str) -> int:
    _expect(_is_whole(value, 1, MAX_WIDTH), place, f"a whole number from 1 to {MAX_WIDTH}", value)
    return int(value)


def _width_or_none(value: Any, place: str) -> int | None:
    return None if value is None else _width(value, place)


def _depth(value: Any, place: str) -> int:
    _expect(_is_whole(value, 1, MAX_LAYERS), place, f"a whole number from 1 to {MAX_LAYERS}", value)
    return int(value)


def _number(value: Any, place: str) -> float:
    _expect(_is_number(value), place, "a finite number", value)
    return float(value)


def _positive(value: Any, place: str) -> float:
    _expect(_is_number(value) and value > 0, place, "a finite number above 0", value)
    return float(value)


def _flag(value: Any, place: str) -> bool:
    _expect(isinstance(value, bool), place, "true or false", value)
    return bool(value)


def _widths(value: Any, place: str) -> list[int | None]:
    _expect(
        isinstance(value, list) and 2 <= len(value) <= MAX_LAYERS + 1,
        place,
        "a list of at least 2 widths",
        value,
    )
    first, *rest = value
    return [
        _width_or_none(first, f"{place}[0]"),
        *(_width(w, f"{place}[{i}]") for i, w in enumerate(rest, 1)),
    ]


#: What each constructor argument has to be, by its name.
_ARGUMENTS: dict[str, Callable[[Any, str], Any]] = {
    "act": build_activation,
    "beta": _positive,
    "bias": _flag,
    "depth": _depth,
    "h": _number,
    "in_features": _width_or_none,
    "input_dim": _width,
    "out_features": _width,
    "rank": _width,
    "threshold": _number,
    "width": _width,
    "widths": _widths,
}


def _read_header(data: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file, whose sizes are checked first."""
    if not 8 < len(data) <= MAX_FILE_BYTES:
        raise FormatError(f"expected a file of 9 to {MAX_FILE_BYTES} bytes, got {len(data)}")
    (header_bytes,) = struct.unpack("<Q", data[:8])
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise FormatError(
            f"expected a safetensors header of at most {MAX_HEADER_BYTES} bytes within the file, "
            f"got a length of {header_bytes}"
        )
    header = parse_json("header", data[8 : 8 + header_bytes])
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise FormatError("expected metadata of strings in the safetensors header, got none")
    for key, expected in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if texts.get(key) != expected:
            raise FormatError(f"expected {key} {expected!r} in the header's metadata, got {texts.get(key)!r}")
    for key in texts:
        if key not in METADATA and key not in {"format", "format_version", "network", CHECKSUM}:
            raise FormatError(f"expected only the documented keys in the header's metadata, got {key[:64]!r}")
    if CHECKSUM in texts and texts[CHECKSUM] != _checksum(data):
        raise FormatError("expected the contents that the checksum was made of, got others: the file is damaged")
    if "network" not in texts:
        raise FormatError("expected the architecture under 'network' in the header's metadata, got none")
    if len(header) - 1 > MAX_TENSORS:
        raise FormatError(f"expected at most {MAX_TENSORS} tensors, got {len(header) - 1}")
    return texts


def _checksum(data: bytes) -> str:
    """SHA-256 over a file's header, however it is written, without the checksum itself; then its tensors."""
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    header["__metadata__"].pop(CHECKSUM, None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(memoryview(data)[8 + header_bytes :])
    return digest.hexdigest()


def parse_json(what: str, text: str | bytes) -> Any:
    """Read strict JSON: no NaN, no duplicate keys.

    Args:
        what: What the text is, for the message.
        text: The JSON.

    Raises:
        FormatError: it is not.

    Example:
        >>> parse_json("bounds", "[0, 1.5]")
        [0, 1.5]
    """

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("duplicate keys")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise FormatError(f"expected strict JSON in {what!r}, got something else") from None


def _check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are no weights of ours, whatever the architecture."""
    if not tensors:
        raise FormatError("expected at least one tensor, got none")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if not (len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}):
        raise FormatError(f"expected tensors all F32 or all F64, got {', '.join(sorted(map(str, dtypes)))}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(f"expected finite weights, got NaN or infinity in {name!r}")


def _fill(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors in a module's places, which they must fit exactly."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise FormatError(
                f"expected for {name!r} the shape {expected.get(name, 'of no tensor')}, "
                f"got {got.get(name, 'no tensor')}"
            )
    module.load_state_dict(dict(tensors), assign=True)


def _is_names(value: Any, width: int) -> bool:
    return isinstance(value, list) and len(value) == width and all(isinstance(name, str) for name in value)


def _is_bounds(value: Any, width: int) -> bool:
    return isinstance(value, list) and len(value) == width and all(map(_is_number, value))


#: What the metadata of a file may hold, with the test that it fits and what that test expects.
METADATA: dict[str, tuple[Callable[[Any, NN], bool], str]] = {
    "description": (lambda value, _: isinstance(value, str), "a string"),
    "input_names": (lambda value, f: _is_names(value, f.dim_input()), "one string per input"),
    "output_names": (lambda value, f: _is_names(value, f.dim_output()), "one string per output"),
    "lower_bounds": (lambda value, f: _is_bounds(value, f.dim_input()), "one finite number per input"),
    "upper_bounds": (lambda value, f: _is_bounds(value, f.dim_input()), "one finite number per input"),
    "training": (lambda value, _: isinstance(value, dict), "a JSON object"),
}


def _check_metadata(metadata: Mapping[str, Any], network: NN) -> None:
    """Refuse metadata that do not fit the network."""
    for key, value in metadata.items():
        if key not in METADATA:
            raise FormatError(f"expected metadata out of {', '.join(METADATA)}, got {key!r}")
        fits, expected = METADATA[key]
        if not fits(value, network):
            raise FormatError(f"expected as {key} {expected}, got {value!r:.60}")
