"""Values of a network computed a second, independent way: what the proof of its derivatives differentiates.

The formulas of the documented layers and activations stand here once more, by type name, on torch's own functions.
They read constructor arguments and the state dict; no form, no ``forward`` and no activation object of the package
takes part, so that an error there shows as a difference. Layers and activations of a user's own are evaluated by
their own ``forward``; :func:`user_defined` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessquik.activations import ACTIVATIONS
from hessquik.architecture import TYPES
from hessquik.networks import NN

__all__ = ["ReferenceNetwork", "user_defined"]

Weights = Mapping[str, Tensor]
Sigma = Callable[[Any, Tensor], Tensor]

#: σ(z) by the activation's type name; the second argument is the activation, for its parameters.
SIGMA: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "antiTanhActivation": lambda z, act: z - functional.logsigmoid(2 * z),
    "arctanActivation": lambda z, act: torch.atan(z),
    "eluActivation": lambda z, act: functional.elu(z, act.alpha),
    "expActivation": lambda z, act: torch.exp(z),
    "expressionActivation": lambda z, act: _formula(act.formula, z),
    "gaussianActivation": lambda z, act: torch.exp(-z.square()),
    "geluActivation": lambda z, act: functional.gelu(z),
    "geluTanhActivation": lambda z, act: functional.gelu(z, approximate="tanh"),
    "identityActivation": lambda z, act: z,
    "mishActivation": lambda z, act: functional.mish(z),
    "quadraticActivation": lambda z, act: z.square() / 2,
    "reluActivation": lambda z, act: functional.leaky_relu(z, act.negative_slope),
    "sigmoidActivation": lambda z, act: torch.sigmoid(z),
    "siluActivation": lambda z, act: functional.silu(z),
    "sinActivation": lambda z, act: torch.sin(z),
    "softplusActivation": lambda z, act: functional.softplus(z, act.beta, act.threshold),
    "softsignActivation": lambda z, act: functional.softsign(z),
    "tanhActivation": lambda z, act: torch.tanh(z),
}

#: What a formula is made of, by the operation's name.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "power": torch.pow,
    "softplus": lambda u: functional.softplus(u, 1.0, 40.0),
    "ndtr": torch.special.ndtr,
}


def _formula(formula: Any, z: Tensor) -> Tensor:
    """Return a formula's value at z."""
    if not isinstance(formula, list | tuple):
        return z if formula == "z" else torch.full_like(z, formula)
    operation, *operands = formula
    exponent = [operands.pop()] if operation == "power" else []
    function = OPERATIONS[operation] if operation in OPERATIONS else getattr(torch, operation)
    value: Tensor = function(*(_formula(operand, z) for operand in operands), *exponent)
    return value


class ReferenceNetwork:
    """The values of a network in one dtype on the CPU, differentiable by automatic differentiation.

    Args:
        network: The network.
        dtype: Of the computation; weights are converted before anything is computed from them.

    Example:
        >>> from hessquik.networks import ICNN
        >>> f = ICNN(3, [None, 8, 2], dtype=torch.float64)
        >>> x = torch.zeros(1, 3, dtype=torch.float64)
        >>> torch.allclose(ReferenceNetwork(f, torch.float64)(x), f(x)[0])
        True
    """

    def __init__(self, network: NN, dtype: torch.dtype) -> None:
        """Convert the weights, and copies of what is user-defined."""
        self._network = network
        state = network.state_dict()
        self._weights = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in state.items()}
        self._own = {id(part): deepcopy(part).to("cpu", dtype) for part in _parts(network) if not _is_known(part)}

    def __call__(self, x: Tensor) -> Tensor:
        """Return f(x) (n, m) at points (n, d)."""
        return self._features(self._network, "", x)[:, : self._network.dim_output()]

    def _features(self, module: nn.Module, place: str, u: Tensor) -> Tensor:
        """Return what a module makes of the features u (n, p); the names of its weights begin with ``place``."""
        if isinstance(module, NN):
            for name, child in _children(module):
                u = self._features(child, f"{place}{name}.", u)
            return u
        own = self._own.get(id(module))
        if own is not None:
            features: Tensor = own(u)[0]
            return features
        weights = {name[len(place) :]: part for name, part in self._weights.items() if name.startswith(place)}
        return LAYERS[type(module).__name__](module, weights, self._sigma, u)

    def _sigma(self, act: Any, z: Tensor) -> Tensor:
        """Return σ(z)."""
        own = self._own.get(id(act))
        if own is None:
            return SIGMA[type(act).__name__](z, act)
        sigma: Tensor = own(z)[0]
        return sigma


def user_defined(network: NN) -> list[str]:
    """Return the type names of layers and activations that the package does not define, in alphabetical order.

    Example:
        >>> from hessquik.networks import ICNN
        >>> user_defined(ICNN(3, [None, 8, 2]))
        []
    """
    return sorted({type(part).__name__ for part in _parts(network) if not _is_known(part)})


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all layers and their activations, those of nested networks too."""
    if isinstance(module, NN):
        for _, child in _children(module):
            yield from _parts(child)
    else:
        yield module
        if _is_known(module):
            yield from (part for part in module.modules() if part is not module)


def _children(network: NN) -> Iterator[tuple[str, nn.Module]]:
    """Return the parts of a network in order with their names; named_children() would leave out a second place."""
    return ((name, child) for name, child in network._modules.items() if child is not None)


def _is_known(module: nn.Module) -> bool:
    name = type(module).__name__
    return TYPES.get(name, ACTIVATIONS.get(name)) is type(module)


def _affine(u: Tensor, K: Tensor, b: Tensor | None) -> Tensor:
    return u @ K if b is None else u @ K + b


def _single(layer: Any, weights: Weights, sigma: Sigma, u: Tensor) -> Tensor:
    return sigma(layer.act, _affine(u, weights["K"], weights.get("b")))


def _residual(layer: Any, weights: Weights, sigma: Sigma, u: Tensor) -> Tensor:
    y: Tensor = u + layer.h * sigma(layer.act, _affine(u, weights["layer.K"], weights.get("layer.b")))
    return y


def _skip(layer: Any, weights: Weights, sigma: Sigma, u: Tensor) -> Tensor:
    y = sigma(layer.act, _affine(u, weights["K"], weights.get("b")))
    y = y @ weights["M"] if layer.mix else y
    if layer.skip is not None:
        y = y + (u[:, : layer.out_features] if layer.skip == "identity" else u @ weights["S"])
    y = y + weights["mu"] if layer.offset else y
    return torch.cat([y, u[:, layer.in_features - layer.carried :]], dim=1)


def _convex(layer: Any, weights: Weights, sigma: Sigma, u: Tensor) -> Tensor:
    x = u[:, -layer.input_dim :]
    z = _affine(x, weights["K"], weights.get("b"))
    if "L" in weights:
        z = z + u[:, : layer.in_features] @ layer.nonneg(weights["L"])
    return torch.cat([sigma(layer.act, z), x], dim=1)


def _quadratic(layer: Any, weights: Weights, sigma: Sigma, u: Tensor) -> Tensor:
    y: Tensor = u @ weights["v"] + (u @ weights["A"].T).square().sum(1) / 2 + weights["mu"]
    return y.unsqueeze(1)


def _convex_quadratic(layer: Any, weights: Weights, sigma: Sigma, u: Tensor) -> Tensor:
    y: Tensor = _quadratic(layer, weights, sigma, u[:, -layer.input_dim :])
    if "w" in weights:
        y = y + (u[:, : layer.in_features] @ layer.nonneg(weights["w"])).unsqueeze(1)
    return y


#: Features (n, q) from features (n, p) by the layer's type name.
LAYERS: dict[str, Callable[[Any, Weights, Sigma, Tensor], Tensor]] = {
    "singleLayer": _single,
    "resnetLayer": _residual,
    "skipLayer": _skip,
    "ICNNLayer": _convex,
    "quadraticLayer": _quadratic,
    "quadraticICNNLayer": _convex_quadratic,
}
