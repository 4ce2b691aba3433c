"""Conversion of checkpoints of the original hessQuik.

The original's users save networks, or their state dicts, with ``torch.save``, which uses pickle. They are read by
``torch.load(weights_only=True)``, which runs no code from the file: the names of the original's classes are mapped to
stand-ins that only hold attributes, and a pickle that names anything else is refused. The attributes become an
architecture and weights, which pass the same checks as those of a model file.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessquik import storage, strict_json
from hessquik.activations import ACTIVATIONS
from hessquik.architecture import MAX_NESTING, TYPES, build, describe
from hessquik.errors import ArchitectureError, CompositionError, FormatError
from hessquik.layers import hessQuikLayer
from hessquik.networks import NN
from hessquik.original import MODULES

__all__ = ["convert", "read_checkpoint"]


class _Object:
    """Stand-in for an object of a pickle: holds attributes, and has no code that could run."""


class _Softplus:
    """Stand-in for softplus, which the original's convex layers hold as an attribute; it is never called."""


def _stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return a stand-in for every class, under the names that the original's and our own pickles use."""
    packages: dict[type[nn.Module], str] = dict.fromkeys(ACTIVATIONS.values(), "activations")
    packages |= {kind: "layers" if issubclass(kind, hessQuikLayer) else "networks" for kind in TYPES.values()}
    places = {}
    for kind, package in packages.items():
        places[f"{kind.__module__}.{kind.__qualname__}"] = kind.__name__
        places |= {f"hessQuik.{package}.{module}.{kind.__name__}": kind.__name__ for module in MODULES[package]}
    classes = {name: type(name, (_Object,), {}) for name in places.values()}
    softplus = [(_Softplus, place) for place in ("torch._C._nn.softplus", "torch.nn.functional.softplus")]
    return [*((classes[name], place) for place, name in places.items()), *softplus]


_ALLOWED = _stand_ins()


def convert(
    checkpoint: str | Path, out: str | Path, architecture: str | Path | None = None, **metadata: Any
) -> storage.Network:
    """Write the network of a checkpoint to a ``.safetensors`` file.

    Args:
        checkpoint: File that ``torch.save`` wrote, from a network or from a state dict.
        out: File to write.
        architecture: JSON file that describes the network of a state dict, as
            :func:`hessquik.architecture.describe` does.
        metadata: See :func:`hessquik.save`.

    Returns:
        The network.

    Raises:
        ArchitectureError: the description is not one, or is missing.
        CompositionError: its layers do not fit together.
        FormatError: the checkpoint holds something else than a network.

    Examples:
        >>> import tempfile
        >>> from hessquik.networks import fullyConnectedNN
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(fullyConnectedNN([2, 8, 1]), f"{folder}/f.pt")
        ...     convert(f"{folder}/f.pt", f"{folder}/f.safetensors", input_names=["x", "y"]).widths
        [2, 8, 1]
    """
    described = None if architecture is None else strict_json.parse("architecture", Path(architecture).read_text())
    network = read_checkpoint(checkpoint, described)
    storage.save(network, out, **metadata)
    return network


def read_checkpoint(checkpoint: str | Path, architecture: Mapping[str, Any] | None = None) -> storage.Network:
    """Read the network of a checkpoint.

    Args:
        checkpoint: File that ``torch.save`` wrote, from a network or from a state dict, or from a dict that has one
            of these among its values.
        architecture: Describes the network of a state dict, as :func:`hessquik.architecture.describe` does.

    Raises:
        ArchitectureError: the description is not one, or is missing.
        CompositionError: its layers do not fit together.
        FormatError: the checkpoint holds something else than a network.

    Examples:
        >>> import tempfile, torch
        >>> from hessquik.networks import resnetNN
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(resnetNN(4, depth=3, h=0.5), f"{folder}/network.pt")
        ...     f = read_checkpoint(f"{folder}/network.pt")
        >>> f.depth, f.h
        (3, 0.5)
    """
    path = Path(checkpoint)
    try:
        found = _find_network(_unpickle(path))
        if isinstance(found, _Object):
            if architecture is not None:
                raise ArchitectureError("there must be no architecture beside a whole network, which has its own")
            return storage.assemble(_describe(found, MAX_NESTING), _tensors(found))
        if architecture is None:
            raise ArchitectureError(
                "a state dict needs an architecture beside it, since it has no activations and no step sizes. "
                "Its names and shapes tell this much; fill in every '?':\n" + json.dumps(_sketch(found), indent=2)
            )
        return storage.assemble(dict(architecture), found)
    except (ArchitectureError, CompositionError, FormatError) as error:
        raise type(error)(f"{path.name}: {error}") from None


def _unpickle(path: Path) -> Any:
    """Read the objects in a checkpoint; refuse those that are neither tensors nor the original's, by name."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # any error that a broken or hostile pickle causes
        name = re.search(r"(?:GLOBAL|unrecognized function) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and name:
            raise FormatError(
                f"a checkpoint must hold layers, networks and tensors only, got {name[1]!r:.200}"
            ) from None
        raise FormatError(
            "a checkpoint must be a file that torch.save wrote; this one is not or is damaged"
        ) from None


def _find_network(found: Any) -> Any:
    """Return the network or state dict itself, or the only one among a dict's values."""
    if _is_network(found) or _is_state_dict(found):
        return found
    if isinstance(found, dict):
        inside = [value for value in found.values() if _is_network(value) or _is_state_dict(value)]
        if len(inside) == 1:
            return inside[0]
        keys = ", ".join(sorted(map(str, found)))
        raise FormatError(f"one value must be a network or state dict, got {len(inside)} under the keys {keys:.200}")
    raise FormatError(f"a checkpoint must hold a network or a state dict, got {type(found).__name__}")


def _is_network(found: Any) -> bool:
    return isinstance(found, _Object) and type(found).__name__ in TYPES


def _is_state_dict(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items())
    )


def _describe(module: Any, nesting: int) -> dict[str, Any]:
    """Return the architecture of a stand-in, as :func:`hessquik.architecture.describe` writes it."""
    name = type(module).__name__
    if not isinstance(module, _Object) or nesting < 0:
        raise FormatError(f"layers and networks must be nested at most {MAX_NESTING} deep, got more at {name}")
    parts = _parts(module, "_modules")
    if name in ACTIVATIONS:
        return {"type": name, **{key: vars(module).get(key) for key in ACTIVATIONS[name].parameter_names}}
    if name not in _FAMILIES and name != "NN":
        inner = parts.get("layer", module)  # a residual layer's σ and b are those of the single layer inside
        held = vars(module) | _parts(inner, "_modules")
        held["bias"] = _parts(inner, "_parameters").get("b") is not None
        arguments = {key: held.get(key) for key in TYPES[name].parameter_names}
        if "act" in arguments:
            arguments["act"] = _describe(arguments["act"], nesting - 1)
        return {"type": name, **arguments}
    layers = [_describe(layer, nesting - 1) for layer in parts.values()]
    plain = {"type": "NN", "layers": layers}
    try:
        family = {"type": name, **_FAMILIES[name](layers)}
        rebuilt = build(family, device="meta")
        assert isinstance(rebuilt, NN)
        return family if [describe(layer) for layer in rebuilt] == layers else plain
    except (IndexError, KeyError, ArchitectureError, CompositionError):
        return plain


#: The arguments of a family of networks, from its layers' descriptions; its own are not in the pickle.
_FAMILIES: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    "fullyConnectedNN": lambda layers: {
        "widths": [layers[0]["in_features"], *(layer["out_features"] for layer in layers)],
        "act": layers[0]["act"],
    },
    "resnetNN": lambda layers: {
        "width": layers[0]["width"],
        "depth": len(layers),
        "h": layers[0]["h"],
        "act": layers[0]["act"],
    },
    "ICNN": lambda layers: {
        "input_dim": layers[0]["input_dim"],
        "widths": [layers[0]["in_features"], *(layer["out_features"] for layer in layers)],
        "act": layers[0]["act"],
    },
}


def _tensors(module: Any, prefix: str = "", nesting: int = MAX_NESTING + 1) -> dict[str, torch.Tensor]:
    """Return the state dict of a stand-in; a layer may contain one module."""
    if nesting < 0:
        raise FormatError(f"layers and networks must be nested at most {MAX_NESTING} deep, got more at {prefix:.60}")
    found = {prefix + name: value for name, value in _parts(module, "_parameters").items() if value is not None}
    for name, part in _parts(module, "_modules").items():
        found |= _tensors(part, f"{prefix}{name}.", nesting - 1)
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise FormatError(f"{name:.60} must be a tensor, got {type(value).__name__}")
    return found


def _parts(module: Any, kind: str) -> dict[str, Any]:
    """Return the parameters or modules that a stand-in holds."""
    parts = vars(module).get(kind, {}) if isinstance(module, _Object) else {}
    if not isinstance(parts, dict):
        raise FormatError(f"{kind} must be a dict, got {type(parts).__name__}")
    return parts


Node = dict[str, Any]


def _sketch(tensors: Mapping[str, torch.Tensor]) -> Node:
    """Return as much of the architecture as the names and shapes of a state dict tell, with '?' for the rest."""
    tree: Node = {}
    for name, tensor in tensors.items():
        *way, last = name.split(".")
        node = tree
        for step in way:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                raise FormatError(f"{step!r:.60} must be a tensor or a layer, got both in {name!r:.60}")
        node[last] = tuple(tensor.shape)
    # The first layer of a convex network has the same tensors as a single layer; the next one tells them apart.
    for node, after in pairwise(_leaves(tree)):
        if {"L", "w"} & after.keys() and "K" in node and "L" not in node:
            node["L"] = None
    return _sketch_node(tree, "the state dict")


def _is_network_node(node: Node) -> bool:
    return bool(node) and all(name.isdigit() for name in node)


def _in_order(node: Node) -> list[tuple[str, Node]]:
    return sorted(node.items(), key=lambda item: int(item[0]))


def _leaves(node: Node) -> list[Node]:
    """Return the layers of the tree, in order."""
    return [leaf for _, part in _in_order(node) for leaf in _leaves(part)] if _is_network_node(node) else [node]


def _sketch_node(node: Node, place: str) -> Node:
    if _is_network_node(node):
        return {"type": "NN", "layers": [_sketch_node(part, name) for name, part in _in_order(node)]}
    names = tuple(sorted(node.keys() - {"b"}))
    try:
        sketched = _SKETCHES[names](node)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise FormatError(f"{place} must hold the tensors of a layer, got {', '.join(sorted(node)):.200}") from None
    return sketched


def _with_act(node: Node, **arguments: Any) -> Node:
    return {**arguments, "act": {"type": "?"}, "bias": "b" in node}


#: Layers by the names of their tensors but b; L is ``None`` in the first layer of a convex network.
_SKETCHES: dict[tuple[str, ...], Callable[[Node], Node]] = {
    ("K",): lambda node: _with_act(node, type="singleLayer", in_features=node["K"][0], out_features=node["K"][1]),
    ("layer",): lambda node: _with_act(node["layer"], type="resnetLayer", width=node["layer"]["K"][0], h="?"),
    ("K", "L"): lambda node: _with_act(
        node,
        type="ICNNLayer",
        input_dim=node["K"][0],
        in_features=node["L"] and node["L"][0],
        out_features=node["K"][1],
    ),
    ("A", "mu", "v"): lambda node: {"type": "quadraticLayer", "in_features": node["A"][1], "rank": node["A"][0]},
    ("A", "mu", "v", "w"): lambda node: {
        "type": "quadraticICNNLayer",
        "input_dim": node["A"][1],
        "in_features": node["w"][0],
        "rank": node["A"][0],
    },
}
