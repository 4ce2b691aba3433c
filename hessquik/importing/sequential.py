"""State dicts with an architecture beside them: JSON that lists the modules of an ``nn.Sequential``.

Modules are made from a table of names, never imported by name; weights are read by ``torch.load(weights_only=True)``
or from safetensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hessquik import strict_json
from hessquik.errors import ArchitectureError, FormatError
from hessquik.strict_json import shown

__all__ = ["MODULES", "read_sequential"]

MAX_NUMBER = 1 << 16
#: Dtypes of weights: there is one for all numbers of any two.
REAL = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
#: Modules that an architecture may name.
MODULES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.BatchNorm1d,
        nn.CELU,
        nn.Dropout,
        nn.ELU,
        nn.Flatten,
        nn.GELU,
        nn.Identity,
        nn.LeakyReLU,
        nn.Linear,
        nn.LogSigmoid,
        nn.Mish,
        nn.PReLU,
        nn.ReLU,
        nn.SELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Softsign,
        nn.Tanh,
        nn.Tanhshrink,
    )
}


def read_sequential(weights: str | Path, architecture: str | Path) -> nn.Sequential:
    """Return the module of a state dict, in evaluation mode.

    Args:
        weights: A file that ``torch.save`` wrote from a state dict, or a ``.safetensors`` file of one.
        architecture: JSON, ``{"type": "Sequential", "layers": [{"type": "Linear", "in_features": 2, …}, …]}``: each
            module with its constructor arguments by name.

    Raises:
        ArchitectureError: the architecture is malformed.
        FormatError: the file is not a state dict, or does not fit the architecture.
    """
    with torch.device("meta"):  # sizes are compared with those of the file before memory is taken for them
        module = _build(strict_json.parse("architecture", Path(architecture).read_bytes()))
    state = _read(Path(weights))
    expected = module.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        wanted, given = (_described(tensors.get(name)) for tensors in (expected, state))
        if wanted != given:
            raise FormatError(f"tensor {shown(name)} must be {wanted}, got {given}")
    dtype = functools.reduce(
        torch.promote_types, {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    )
    numbers = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    module.load_state_dict(numbers, assign=True)
    return module.eval()


def _described(tensor: Tensor | None) -> str:
    """Return what a tensor has to be like, for a comparison and its message."""
    if tensor is None:
        return "none"
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        return "numbers in another form than an array"
    return f"{'real' if tensor.dtype in REAL else tensor.dtype} numbers of the shape {tuple(tensor.shape)}"


def _build(architecture: Any) -> nn.Sequential:
    layers = architecture.get("layers") if isinstance(architecture, dict) else None
    if not isinstance(layers, list) or not layers or architecture.get("type") != "Sequential":
        raise ArchitectureError(
            'architecture must be {"type": "Sequential", "layers": [{"type": "Linear", "in_features": 2, …}, …]}, '
            f"got {shown(architecture)}"
        )
    return nn.Sequential(*(_module(layer, f"layers[{i}]") for i, layer in enumerate(layers)))


def _module(layer: Any, place: str) -> nn.Module:
    name = layer.get("type") if isinstance(layer, dict) else None
    if not isinstance(name, str) or name not in MODULES:
        raise ArchitectureError(f"{place}.type must be one of {', '.join(MODULES)}, got {shown(name)}")
    arguments = {key: value for key, value in layer.items() if key != "type"}
    known = set(inspect.signature(MODULES[name]).parameters) - {"device", "dtype", "inplace", "dim"}
    for key, value in arguments.items():
        is_plain = isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) <= MAX_NUMBER)
        if key not in known or not is_plain:
            raise ArchitectureError(
                f"{place} must have arguments out of {', '.join(sorted(known)) or 'none'}, got {key}: {shown(value)}"
            )
    try:
        return MODULES[name](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArchitectureError(f"{place} ({name}): {error}") from None


def _read(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file."""
    try:
        if path.suffix.lower() == ".safetensors":
            found: Any = safetensors.torch.load(path.read_bytes())
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # any error that a broken or hostile pickle causes
        raise FormatError(
            f"{path.name}: the file must be a state dict that torch.save wrote, which holds tensors alone; a whole "
            "module is a pickle of code: save module.state_dict(), or torch.export.save the module to a .pt2 file"
        ) from None
    is_named = isinstance(found, dict) and bool(found) and all(isinstance(name, str) for name in found)
    if not (is_named and all(isinstance(value, Tensor) and not value.is_meta for value in found.values())):
        kind = (
            f"a dict of {', '.join(map(shown, list(found)[:4]))}" if isinstance(found, dict) else type(found).__name__
        )
        raise FormatError(
            f"{path.name}: the file must hold a state dict, which has names and tensors alone, got {kind}; save "
            "module.state_dict() alone"
        )
    if all(str(name).startswith("module.") for name in found):
        raise FormatError(
            f"{path.name}: the names of the tensors must be those of the layers, got module.… as DataParallel writes "
            "them; save model.module.state_dict()"
        )
    state: dict[str, Tensor] = found
    return state
