"""Networks as files: one ``.safetensors`` each, weights under their state-dict names, the architecture as JSON.

A file is data: it is read into memory whole, checked before and after parsing, and never executed. The header's
metadata has ``format`` = ``hessquik``, ``format_version`` = ``1``, ``network`` = the architecture, and optionally
the keys in :data:`METADATA` and two keys that :func:`save` writes: ``sha256``, a checksum of the rest of the file,
and ``kinks``, the activations without two continuous derivatives. When a file is read, the kinks are determined from
the architecture again.

:func:`save` parses every file before it writes it, so that :func:`load` can read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn

from hessquik import strict_json
from hessquik.activations import kinks
from hessquik.architecture import build, count_layers, describe
from hessquik.errors import ArchitectureError, CompositionError, FormatError
from hessquik.networks import NN, Ensemble
from hessquik.strict_json import shown

__all__ = [
    "METADATA",
    "SavedNetwork",
    "assemble",
    "load",
    "parse",
    "save",
    "serialize",
    "write",
]

FORMAT, FORMAT_VERSION = "hessquik", "1"
#: Metadata key of the SHA-256 of the rest of the file.
CHECKSUM = "sha256"
#: Metadata key of the result of :func:`hessquik.activations.kinks` for the network.
KINKS = "kinks"
#: The content of a file.
Network = NN | Ensemble
MAX_FILE_BYTES = 512 << 20
MAX_HEADER_BYTES = 256 << 10
MAX_TENSORS = 1024
#: Types of the weights, by their names in a file.
DTYPES = {"F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class SavedNetwork:
    """The contents of a model file.

    Attributes:
        network: The network or ensemble.
        architecture: Its description.
        metadata: ``description``, ``input_names``, ``output_names``, ``lower_bounds``, ``upper_bounds``,
            ``training``, as far as the file has them; and ``kinks`` if some activations have any.
    """

    network: Network
    architecture: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)


def save(network: Network, path: str | Path, **metadata: Any) -> None:
    """Write a network to a file.

    The file is written beside its destination and renamed when it is complete, so that a reader sees the old file or
    the new one, also while several processes save to one path.

    Args:
        network: The network or ensemble.
        path: The file; conventionally ``NAME.safetensors``.
        metadata: Any of ``description`` (str), ``input_names``, ``output_names`` (sequences of str),
            ``lower_bounds``, ``upper_bounds`` (sequences of numbers, or arrays; both or neither), ``training`` (a
            JSON object).

    Raises:
        ArchitectureError: the network has a part that a file cannot describe.
        FileNotFoundError: the folder does not exist.
        FormatError: the weights or metadata are such that :func:`load` would refuse the file.

    Examples:
        >>> import tempfile
        >>> from hessquik.networks import fullyConnectedNN
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(fullyConnectedNN([2, 8, 1]), f"{folder}/f.safetensors", input_names=["x", "y"])
        ...     load(f"{folder}/f.safetensors").dim_input()
        2
    """
    write(serialize(network, **metadata), path)


def write(data: bytes, path: str | Path) -> None:
    """Write a file atomically: its path never has a part of the bytes.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(path.parent))
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def serialize(network: Network, **metadata: Any) -> bytes:
    """Return the bytes that :func:`save` writes; arguments and errors are those of :func:`save`.

    Examples:
        >>> from hessquik.networks import fullyConnectedNN
        >>> parse(serialize(fullyConnectedNN([2, 8, 1]))).network.widths
        [2, 8, 1]
    """
    architecture = describe(network)
    metadata = {key: strict_json.plain(value) for key, value in metadata.items() if key != KINKS}
    _check_metadata(metadata, network)
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "network": json.dumps(architecture)}
    header |= {key: value if key == "description" else json.dumps(value) for key, value in metadata.items()}
    if found := kinks(network):
        header[KINKS] = json.dumps(found)
    state = _state(network)
    _check_tensors(state)
    # Cloned because safetensors refuses tensors that share memory, as those of a layer in two places do.
    tensors = {name: tensor.cpu().resolve_neg().contiguous().clone() for name, tensor in state.items()}
    header[CHECKSUM] = _checksum(safetensors.torch.save(tensors, header))
    data = _with_sorted_metadata(safetensors.torch.save(tensors, header))
    parse(data)
    return data


def _state(module: nn.Module, place: str = "") -> dict[str, torch.Tensor]:
    """Return the weights by name, with numbers for the parts of a network even if an ``OrderedDict`` named them."""
    if isinstance(module, Ensemble):
        parts = (_state(member, f"members.{number}.") for number, member in enumerate(module.networks()))
        return {name: tensor for part in parts for name, tensor in part.items()}
    if isinstance(module, NN):
        parts = (_state(part, f"{place}{number}.") for number, part in enumerate(module))
        return {name: tensor for part in parts for name, tensor in part.items()}
    return {place + name: tensor.detach() for name, tensor in module.state_dict().items()}


def _with_sorted_metadata(data: bytes) -> bytes:
    """Return the same file with its metadata in alphabetical order: safetensors writes them in a random one."""
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text + data[8 + header_bytes :]


def load(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """Read a network or an ensemble from a file.

    Raises:
        FormatError: the file is not a saved network; the message names the file and the fault.
        OSError: the file cannot be read.

    See :func:`save` for an example.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_FILE_BYTES + 1)).network.to(device)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None


def parse(data: bytes | mmap.mmap, path: str | None = None) -> SavedNetwork:
    """Read a network from the bytes of a file.

    Args:
        data: The bytes.
        path: A file that has the same bytes and never changes. The weights are views of it, so that processes share
            their memory; without it, they are copied.

    Raises:
        FormatError: they are not those of a saved network.

    See :func:`serialize` for an example.
    """
    texts = _read_header(data)
    architecture = strict_json.parse("network", texts["network"])
    try:
        is_aligned = struct.unpack("<Q", data[:8])[0] % 8 == 0
        tensors = safetensors.torch.load(data[:]) if path is None or not is_aligned else load_file(path)
    except (safetensors.SafetensorError, OverflowError, RuntimeError) as error:
        raise FormatError(f"the file must be a safetensors file, got one that does not parse ({error})") from None
    try:
        network = assemble(architecture, tensors)
    except (ArchitectureError, CompositionError) as error:
        raise FormatError(str(error)) from None
    metadata = {
        key: text if key == "description" else strict_json.parse(key, text)
        for key, text in texts.items()
        if key in METADATA
    }
    _check_metadata(metadata, network)
    if found := kinks(network):
        metadata[KINKS] = found
    return SavedNetwork(network, architecture, metadata)


def assemble(architecture: Any, tensors: Mapping[str, torch.Tensor]) -> Network:
    """Make the network that :func:`hessquik.architecture.describe` described, with the weights of a state dict.

    Raises:
        ArchitectureError: the description is invalid.
        CompositionError: its layers do not fit together.
        FormatError: the weights do not fit the description.

    Examples:
        >>> from hessquik.networks import fullyConnectedNN
        >>> f = fullyConnectedNN([2, 8, 1])
        >>> assemble(describe(f), f.state_dict()).widths
        [2, 8, 1]
    """
    _check_tensors(tensors)
    layers = count_layers(architecture)
    if layers > len(tensors):  # each has one at least; refused before they are made
        raise FormatError(f"there must be tensors for {shown(layers)} layers, got {len(tensors)} tensors")
    module = build(architecture, device="meta")
    _fill(module, tensors)
    return module if isinstance(module, Network) else NN(module)


def _read_header(data: bytes | mmap.mmap) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file, whose sizes are checked first."""
    if not 8 < len(data) <= MAX_FILE_BYTES:
        size = f"more than {MAX_FILE_BYTES}" if len(data) > MAX_FILE_BYTES else len(data)
        raise FormatError(f"the file must have 9 to {MAX_FILE_BYTES} bytes, got {size}")
    (header_bytes,) = struct.unpack("<Q", data[:8])
    if data[8:9] != b"{":
        raise FormatError("the file must be a safetensors file, but is not a safetensors file")
    if header_bytes > MAX_HEADER_BYTES:
        raise FormatError(f"the header must have at most {MAX_HEADER_BYTES} bytes, got {header_bytes}")
    if header_bytes > len(data) - 8:
        raise FormatError(f"the file is truncated: its header has {header_bytes} bytes, the file {len(data) - 8}")
    header = strict_json.parse("the header", data[8 : 8 + header_bytes])
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise FormatError(f"__metadata__ in the header must be an object of strings, got {shown(texts)}")
    for key, expected in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if texts.get(key) != expected:
            raise FormatError(f"{key} must be {shown(expected)}, got {shown(texts.get(key))}")
    for key in texts:
        if key not in METADATA and key not in {"format", "format_version", "network", CHECKSUM, KINKS}:
            raise FormatError(f"metadata must be among {', '.join(METADATA)}, got {shown(key)}")
    if "network" not in texts:
        raise FormatError("network must be the architecture, got null")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > MAX_TENSORS:
        raise FormatError(f"there must be at most {MAX_TENSORS} tensors, got {len(entries)}")
    _check_entries(entries, len(data) - 8 - header_bytes)
    if CHECKSUM in texts and texts[CHECKSUM] != _checksum(data):
        raise FormatError("checksum mismatch: the file is corrupted")
    return texts


def _check_entries(entries: Mapping[str, Any], available_bytes: int) -> None:
    """Refuse entries of tensors that are not weights, or whose bytes are not all there."""
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise FormatError(f"the entry of tensor {shown(name)} must be an object, got {shown(entry)}")
    dtypes = {entry.get("dtype") for entry in entries.values() if isinstance(entry.get("dtype"), str)}
    if entries and not (len(dtypes) == 1 and dtypes <= DTYPES.keys()):
        got = ", ".join(sorted(dtypes))
        raise FormatError(f"tensors must be all F32 or all F64, got {got[:60] or 'neither'}")
    offsets = (entry.get("data_offsets") for entry in entries.values())
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int)]
    if max(ends, default=0) > available_bytes:
        raise FormatError(f"the file is truncated: its tensors have {max(ends)} bytes, the file {available_bytes}")


def _checksum(data: bytes | mmap.mmap) -> str:
    """Return the SHA-256 of a file: of its header, normalised and without the checksum, followed by its tensors."""
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    header["__metadata__"].pop(CHECKSUM, None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(memoryview(data)[8 + header_bytes :])
    return digest.hexdigest()


def _check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that no architecture has: mixed or other dtypes, other layouts, numbers that are not finite."""
    if not tensors:
        raise FormatError("there must be at least one tensor, got none")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if not (len(dtypes) == 1 and dtypes <= set(DTYPES.values())):
        got = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise FormatError(f"weights must be all float32 or all float64, got {got}")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise FormatError(f"weights must be dense tensors with memory, got another kind in {shown(name)}")
        if not _is_finite(tensor):
            raise FormatError(f"weights must be finite, got NaN or infinity in {shown(name)}")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are finite; the extremes of numbers with a NaN are NaN. No array is made."""
    return not tensor.numel() or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor.detach()))


def _fill(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load the tensors into a module; all names and shapes must match."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if name not in expected:
            raise FormatError(f"there must be no tensor {shown(name)} in this architecture, got one")
        if expected[name] != got.get(name):
            raise FormatError(f"tensor {name} must have the shape {expected[name]}, got {got.get(name, 'no tensor')}")
    module.load_state_dict(dict(tensors), assign=True)


def _is_names(value: Any, width: int) -> bool:
    return isinstance(value, list) and len(value) == width and all(isinstance(name, str) for name in value)


def _is_bounds(value: Any, width: int) -> bool:
    return isinstance(value, list) and len(value) == width and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


#: Keys that the metadata of a file may have, each with its check and a description of a valid value.
METADATA: dict[str, tuple[Callable[[Any, Network], bool], str]] = {
    "description": (lambda value, _: isinstance(value, str), "a string"),
    "input_names": (lambda value, f: _is_names(value, f.dim_input()), "one string per input"),
    "output_names": (lambda value, f: _is_names(value, f.dim_output()), "one string per output"),
    "lower_bounds": (lambda value, f: _is_bounds(value, f.dim_input()), "one number per input"),
    "upper_bounds": (lambda value, f: _is_bounds(value, f.dim_input()), "one number per input"),
    "training": (lambda value, _: isinstance(value, dict), "a JSON object"),
}


def _check_metadata(metadata: Mapping[str, Any], network: Network) -> None:
    """Refuse metadata that do not fit the network."""
    for key, value in metadata.items():
        if key not in METADATA:
            raise FormatError(f"metadata must be among {', '.join(METADATA)}, got {shown(key)}")
        strict_json.check(value, key)
        fits, expected = METADATA[key]
        if not fits(value, network):
            raise FormatError(f"{key} must be {expected}, got {shown(value)}")
    given = [key for key in ("lower_bounds", "upper_bounds") if key in metadata]
    if len(given) == 1:
        raise FormatError(f"lower_bounds and upper_bounds must be given together, got {given[0]} only")
    for i, (lower, upper) in enumerate(zip(*(metadata[key] for key in given), strict=True) if given else ()):
        if not lower < upper:
            raise FormatError(f"lower_bounds[{i}] must be below upper_bounds[{i}], got {lower} and {upper}")
        if not math.isfinite(upper - lower):
            raise FormatError(f"upper_bounds[{i}] - lower_bounds[{i}] must be finite, got infinity")
