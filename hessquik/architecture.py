"""Networks as data: a type and its constructor arguments, as JSON.

To make a new layer storable: a row in :data:`TYPES`, and its arguments in :data:`ARGUMENTS` if they are new.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hessquik.activations import ACTIVATIONS, hessQuikActivationFunction
from hessquik.errors import ArchitectureError
from hessquik.expressions import fault
from hessquik.layers import (
    ICNNLayer,
    hessQuikLayer,
    quadraticICNNLayer,
    quadraticLayer,
    resnetLayer,
    singleLayer,
    skipLayer,
)
from hessquik.networks import ICNN, NN, Ensemble, fullyConnectedNN, resnetNN
from hessquik.strict_json import plain, shown

__all__ = [
    "ARGUMENTS",
    "ENSEMBLE",
    "MAX_LAYERS",
    "MAX_MEMBERS",
    "MAX_NESTING",
    "TYPES",
    "build",
    "build_activation",
    "count_layers",
    "describe",
]

MAX_WIDTH = 1 << 16
#: Layers of one network, those of networks inside it not counted.
MAX_LAYERS = 1024
#: Networks inside one another.
MAX_NESTING = 8
#: Type of several networks that are one surrogate, and the most of them.
ENSEMBLE = "ensemble"
MAX_MEMBERS = 64

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
        skipLayer,
    )
}


def describe(module: nn.Module) -> dict[str, Any]:
    """Describe a layer or network by its type and constructor arguments, as JSON.

    A network of one of the documented families whose layers were changed after it was made is described layer by
    layer instead.

    Raises:
        ArchitectureError: a part has a type that files do not know, or an argument that they cannot hold.

    Examples:
        >>> describe(resnetLayer(4, h=0.25))
        {'type': 'resnetLayer', 'width': 4, 'h': 0.25, 'act': {'type': 'identityActivation'}, 'bias': True}
    """
    if isinstance(module, Ensemble):
        members = module.networks()
        _require(len(members) <= MAX_MEMBERS, "network.members", f"be at most {MAX_MEMBERS}", len(members))
        described = [_describe(one, f"network.members[{i}]", MAX_NESTING) for i, one in enumerate(members)]
        return {"type": ENSEMBLE, "members": described}
    return _describe(module, "network", MAX_NESTING)


def _describe(module: nn.Module, place: str, nesting: int) -> dict[str, Any]:
    kind = type(module)
    name = kind.__name__
    if not isinstance(module, NN | hessQuikLayer | hessQuikActivationFunction) or _known(name) is not kind:
        raise ArchitectureError(
            f"{place} must have one of the types that files know ({', '.join((*TYPES, *ACTIVATIONS))}), "
            f"got {kind.__module__}.{name}"
        )
    if nesting == 0:
        raise _too_deep(place)
    layers = _describe_layers(module, place, nesting) if isinstance(module, NN) else []
    if kind is NN:
        return {"type": name, "layers": layers}
    arguments = {key: getattr(module, key) for key in module.parameter_names}
    arguments = {
        key: _describe(value, f"{place}.{key}", nesting) if isinstance(value, nn.Module) else plain(value)
        for key, value in arguments.items()
    }
    described = {"type": name, **arguments}
    if not isinstance(module, NN):
        _checked_arguments(kind, arguments, place)
        if getattr(module, "nonneg", functional.softplus) is not functional.softplus:
            raise ArchitectureError(f"{place}.nonneg must be softplus for a file, got another function")
        return described
    rebuilt = build(described, device="meta")
    assert isinstance(rebuilt, NN)
    is_family = layers == _describe_layers(rebuilt, place, nesting)
    return described if is_family else {"type": "NN", "layers": layers}


def _describe_layers(network: NN, place: str, nesting: int) -> list[dict[str, Any]]:
    return [_describe(layer, f"{place}.layers[{i}]", nesting - 1) for i, layer in enumerate(network)]


def _known(name: str) -> type[nn.Module] | None:
    return TYPES.get(name, ACTIVATIONS.get(name))


def build(
    architecture: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> NN | Ensemble | hessQuikLayer:
    """Make the layer, network or ensemble that :func:`describe` described, with new weights.

    Raises:
        ArchitectureError: the description is not one.
        CompositionError: its layers do not fit together.

    Examples:
        >>> build({"type": "fullyConnectedNN", "widths": [2, 8, 1]}).dim_input()
        2
    """
    factory_kwargs = {"device": device, "dtype": dtype}
    if isinstance(architecture, dict) and architecture.get("type") == ENSEMBLE:
        return Ensemble(*_members(architecture, factory_kwargs))
    return _build(architecture, "network", MAX_NESTING, factory_kwargs)


def _members(architecture: Mapping[str, Any], factory_kwargs: Mapping[str, Any]) -> list[NN]:
    """Make the members of an ensemble; a layer alone is a network of one layer."""
    others = sorted(architecture.keys() - {"type", "members"})
    _require(not others, "network", "have 'members' only, as an ensemble", others)
    members = architecture.get("members")
    is_list = isinstance(members, list) and 2 <= len(members) <= MAX_MEMBERS
    _require(is_list, "network.members", f"be a list of 2 to {MAX_MEMBERS} networks", members)
    assert isinstance(members, list)
    built = [_build(one, f"network.members[{i}]", MAX_NESTING, factory_kwargs) for i, one in enumerate(members)]
    return [one if isinstance(one, NN) else NN(one) for one in built]


def _build(architecture: Any, place: str, nesting: int, factory_kwargs: Mapping[str, Any]) -> NN | hessQuikLayer:
    kind, arguments = _type_and_arguments(architecture, place, TYPES)
    if nesting == 0:
        raise _too_deep(place)
    if kind is NN:
        layers = arguments.pop("layers", None)
        _require(not arguments, place, "have 'layers' only", sorted(arguments))
        is_list = isinstance(layers, list) and 0 < len(layers) <= MAX_LAYERS
        _require(is_list, f"{place}.layers", f"be a list of 1 to {MAX_LAYERS} layers", layers)
        return NN(
            *(_build(layer, f"{place}.layers[{i}]", nesting - 1, factory_kwargs) for i, layer in enumerate(layers))
        )
    module = kind(**_checked_arguments(kind, arguments, place), **factory_kwargs)
    assert isinstance(module, NN | hessQuikLayer)
    return module


def _too_deep(place: str) -> ArchitectureError:
    return ArchitectureError(f"{place} must not be inside more than {MAX_NESTING - 1} other networks")


def build_activation(architecture: Any, place: str = "act") -> hessQuikActivationFunction:
    """Make the activation that :func:`describe` described.

    Raises:
        ArchitectureError: the description is not one.

    Examples:
        >>> build_activation({"type": "softplusActivation", "beta": 2.0}).beta
        2.0
    """
    kind, arguments = _type_and_arguments(architecture, place, ACTIVATIONS)
    module = kind(**_checked_arguments(kind, arguments, place))
    assert isinstance(module, hessQuikActivationFunction)
    return module


def count_layers(architecture: Any, nesting: int = MAX_NESTING) -> int:
    """Return the number of layers that a description asks for, without building any.

    A part that is not a valid description counts as one layer, so that an invalid part never hides others.

    Examples:
        >>> count_layers({"type": "NN", "layers": [{"type": "resnetNN", "width": 4, "depth": 3}, {}]})
        4
    """
    arguments = architecture if isinstance(architecture, dict) else {}
    layers, depth, widths = arguments.get("layers"), arguments.get("depth"), arguments.get("widths")
    layers = arguments.get("members", layers) if arguments.get("type") == ENSEMBLE else layers
    if isinstance(layers, list) and nesting > 0:
        return sum(count_layers(layer, nesting - 1) for layer in layers)
    if isinstance(widths, list):
        return max(1, len(widths) - 1)
    return max(1, depth) if isinstance(depth, int) else 1


def _type_and_arguments(
    architecture: Any, place: str, table: Mapping[str, type[nn.Module]]
) -> tuple[type[Any], dict[str, Any]]:
    """Look up the class that a description names; return it and the rest of the description."""
    _require(isinstance(architecture, dict), place, "be an object with a 'type'", architecture)
    name = architecture.get("type")
    _require(isinstance(name, str) and name in table, f"{place}.type", f"be one of {', '.join(table)}", name)
    return table[name], {key: value for key, value in architecture.items() if key != "type"}


def _checked_arguments(kind: type[Any], arguments: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Check each constructor argument of a class by its name and return what the constructor takes."""
    known = inspect.signature(kind).parameters
    for name in kind.parameter_names:
        is_required = known[name].default is inspect.Parameter.empty
        _require(name in arguments or not is_required, place, f"have the argument {name!r}", sorted(arguments))
    for name in arguments:
        is_known = name in kind.parameter_names
        _require(is_known, place, f"have no arguments but {', '.join(kind.parameter_names) or 'its type'}", name)
    checks = {name: ARGUMENTS.get(f"{kind.__name__}.{name}", ARGUMENTS[name]) for name in arguments}
    return {name: check(arguments[name], f"{place}.{name}") for name, check in checks.items()}


def _require(holds: bool, place: str, expected: str, got: Any) -> None:
    if not holds:
        raise ArchitectureError(f"{place} must {expected}, got {shown(got)}")


def _integer(value: Any, place: str, largest: int) -> int:
    holds = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest
    _require(holds, place, f"be an integer from 1 to {largest}", value)
    return int(value)


def _width(value: Any, place: str) -> int:
    return _integer(value, place, MAX_WIDTH)


def _width_or_none(value: Any, place: str) -> int | None:
    return None if value is None else _width(value, place)


def _carried(value: Any, place: str) -> int:
    return value if value == 0 and isinstance(value, int) and not isinstance(value, bool) else _width(value, place)


def _skip(value: Any, place: str) -> str | None:
    _require(value in (None, "identity", "matrix"), place, 'be null, "identity" or "matrix"', value)
    return None if value is None else str(value)


def _formula(value: Any, place: str) -> Any:
    wrong = fault(value)
    if wrong:
        raise ArchitectureError(f"{place}: {wrong}")
    return value


def _depth(value: Any, place: str) -> int:
    return _integer(value, place, MAX_LAYERS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _number(value: Any, place: str) -> float:
    _require(_is_number(value), place, "be a finite number", value)
    return float(value)


def _positive(value: Any, place: str) -> float:
    _require(_is_number(value) and value > 0, place, "be a finite number above 0", value)
    return float(value)


def _flag(value: Any, place: str) -> bool:
    _require(isinstance(value, bool), place, "be true or false", value)
    return bool(value)


def _widths(value: Any, place: str) -> list[int]:
    holds = isinstance(value, list) and 2 <= len(value) <= MAX_LAYERS + 1
    _require(holds, place, f"be a list of 2 to {MAX_LAYERS + 1} widths", value)
    return [_width(width, f"{place}[{i}]") for i, width in enumerate(value)]


def _convex_widths(value: Any, place: str) -> list[int | None]:
    if isinstance(value, list) and value[:1] == [None]:
        return [None, *_widths([1, *value[1:]], place)[1:]]
    return [*_widths(value, place)]


#: Checks of the constructor arguments, by name; ``TYPE.NAME`` goes before ``NAME``. Each returns the argument.
ARGUMENTS: dict[str, Callable[[Any, str], Any]] = {
    "act": build_activation,
    "alpha": _number,
    "beta": _positive,
    "bias": _flag,
    "carried": _carried,
    "depth": _depth,
    "formula": _formula,
    "h": _number,
    "hidden_features": _width,
    "in_features": _width,
    "ICNNLayer.in_features": _width_or_none,
    "quadraticICNNLayer.in_features": _width_or_none,
    "input_dim": _width,
    "mix": _flag,
    "negative_slope": _number,
    "offset": _flag,
    "out_features": _width,
    "rank": _width,
    "skip": _skip,
    "threshold": _number,
    "width": _width,
    "widths": _widths,
    "ICNN.widths": _convex_widths,
}
