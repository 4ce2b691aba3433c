"""The parameters of a module, one by one and as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from hessquik.errors import ShapeError

__all__ = ["extract_data", "insert_data", "module_getattr", "module_setattr"]


def module_getattr(obj: nn.Module, names: str | Sequence[str]) -> Any:
    """Get an attribute of a module at any level.

    Args:
        obj: The module.
        names: The names on the way to the attribute, as a sequence or joined by dots.

    Examples:
        >>> from hessquik.networks import resnetNN
        >>> f = resnetNN(4, depth=2)
        >>> module_getattr(f, ("1", "layer", "K")) is module_getattr(f, "1.layer.K") is f[1].layer.K
        True
    """
    return reduce(getattr, _path(names), obj)


def module_setattr(obj: nn.Module, names: str | Sequence[str], val: Any) -> None:
    """Set an attribute of a module at any level.

    Args:
        obj: The module.
        names: The names on the way to the attribute, as a sequence or joined by dots.
        val: Its new value.

    Examples:
        >>> import torch
        >>> from hessquik.networks import resnetNN
        >>> f = resnetNN(4, depth=2)
        >>> module_setattr(f, ("1", "layer", "K", "data"), torch.zeros(4, 4))
        >>> f[1].layer.K.sum().item()
        0.0
    """
    *way, last = _path(names)
    setattr(module_getattr(obj, way), last, val)


def extract_data(net: nn.Module, attr: str = "data") -> Tensor:
    """Copy an attribute of all parameters into one vector, in the order of ``net.parameters()``.

    Args:
        net: The module.
        attr: ``"data"`` for the parameters themselves or ``"grad"`` for their gradients, which are 0 where there
            are none.

    Examples:
        >>> from hessquik.layers import singleLayer
        >>> extract_data(singleLayer(4, 7)).shape
        torch.Size([35])
    """
    held = ((parameter, getattr(parameter, attr)) for parameter in net.parameters())
    parts = [
        (torch.zeros_like(parameter) if value is None else value).detach().flatten() for parameter, value in held
    ]
    return torch.cat(parts) if parts else torch.empty(0)


def insert_data(net: nn.Module, theta: Tensor) -> None:
    """Copy a vector into the parameters, in the order of :func:`extract_data`.

    Args:
        net: The module.
        theta: A vector with as many entries as the module has parameters.

    Raises:
        ShapeError: ``theta`` has another length.

    Examples:
        >>> import torch
        >>> from hessquik.layers import singleLayer
        >>> f = singleLayer(4, 7)
        >>> insert_data(f, torch.arange(35.0))
        >>> f.b
        Parameter containing:
        tensor([28., 29., 30., 31., 32., 33., 34.], requires_grad=True)
    """
    parameters = list(net.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    if theta.shape != (sum(sizes),):
        raise ShapeError(f"theta must have the shape ({sum(sizes)},), got {tuple(theta.shape)}")
    with torch.no_grad():
        for parameter, part in zip(parameters, theta.split(sizes), strict=True):
            parameter.copy_(part.view_as(parameter))


def _path(names: str | Sequence[str]) -> list[str]:
    return names.split(".") if isinstance(names, str) else list(names)
