"""An independent implementation of a network's values, which the proof of its derivatives differentiates.

The formulas of the documented layers and activations are repeated here, by type name, with torch's own functions.
They use constructor arguments and the state dict, but no form, no ``forward`` and no activation object of the
package, so that an error there shows as a difference. User-defined layers and activations are evaluated by their own
``forward``; :func:`user_defined` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessquik.activations import ACTIVATIONS
from hessquik.architecture import TYPES
from hessquik.errors import ShapeError
from hessquik.networks import NN

__all__ = ["ReferenceDerivatives", "ReferenceNetwork", "slope", "user_defined"]

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

#: The operations of formulas, by name.
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
        network: The network; weights that have the dtype are not copied.
        dtype: Of the computation; weights are converted before anything is computed from them.

    Examples:
        >>> from hessquik.networks import ICNN
        >>> f = ICNN(3, [None, 8, 2], dtype=torch.float64)
        >>> x = torch.zeros(1, 3, dtype=torch.float64)
        >>> torch.allclose(ReferenceNetwork(f, torch.float64)(x), f(x)[0])
        True
    """

    def __init__(self, network: NN, dtype: torch.dtype) -> None:
        """Convert the weights, and copies of user-defined layers and activations."""
        self._network = network
        state = network.state_dict()
        self._weights = {
            name: tensor.detach().to("cpu", dtype, copy=tensor.is_inference()) for name, tensor in state.items()
        }
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


class ReferenceDerivatives:
    """A network's derivatives by automatic differentiation, under the names that formulas of quantities read.

    Shapes are those of :class:`hessquik.calculus.Backward`. A Hessian takes m d passes, so this is for few points of
    small networks.

    Args:
        f: The values.
        x: Points (n, d).
        weights: λ (n, m): derivatives of Σⱼ λⱼ fⱼ instead of every fⱼ.
        directions: (n, k, d).

    Examples:
        >>> from hessquik.networks import ICNN
        >>> f = ReferenceNetwork(ICNN(3, [None, 8, 2]), torch.float64)
        >>> ReferenceDerivatives(f, torch.zeros(1, 3, dtype=torch.float64)).hessian.shape
        torch.Size([1, 3, 3, 2])
    """

    def __init__(
        self, f: ReferenceNetwork, x: Tensor, weights: Tensor | None = None, directions: Tensor | None = None
    ) -> None:
        """Compute the value and the gradient."""
        self._x = x.detach().clone().requires_grad_()
        self._directions = directions
        with torch.enable_grad():
            y = f(self._x)
            if weights is not None:
                y = (y * weights).sum(1, keepdim=True)
            self._rows = [slope(part.sum(), self._x) for part in y.unbind(1)]
        self.value = y.detach().unsqueeze(1)
        self.gradient = torch.stack([row.detach() for row in self._rows], dim=-1)

    @property
    def jvp(self) -> Tensor:
        """Derivatives along the directions, ∇f·v (n, k, m)."""
        return self._along @ self.gradient

    @property
    def hvp(self) -> Tensor:
        """Products Hv (n, k, d, m)."""
        return self._products(self._along)

    @property
    def curvature(self) -> Tensor:
        """Second derivatives vᵀHv (n, k, m)."""
        return (self._along.unsqueeze(-1) * self.hvp).sum(-2)

    @cached_property
    def hessian(self) -> Tensor:
        """The Hessian ∂²f/∂x² (n, d, d, m)."""
        return self._products(torch.eye(self._x.shape[1], dtype=self._x.dtype).expand(len(self._x), -1, -1))

    @property
    def hessian_packed(self) -> Tensor:
        """The lower triangle of the Hessian, row by row (n, d(d+1)/2, m)."""
        a, b = torch.tril_indices(self.hessian.shape[1], self.hessian.shape[1])
        return self.hessian[:, a, b]

    @property
    def hessian_diagonal(self) -> Tensor:
        """The Hessian's diagonal ∂²f/∂x_a² (n, d, m)."""
        return self.hessian.diagonal(dim1=1, dim2=2).mT

    @property
    def laplacian(self) -> Tensor:
        """The Laplacian Δf (n, 1, m)."""
        return self.hessian_diagonal.sum(1, keepdim=True)

    @property
    def _along(self) -> Tensor:
        if self._directions is None:
            raise ShapeError("expected directions of shape (n, k, d), got none")
        return self._directions

    def _products(self, vectors: Tensor) -> Tensor:
        """Return Hv (n, j, d, m) for vectors (n, j, d)."""
        with torch.enable_grad():
            outputs = [
                torch.stack([slope((row * v).sum(), self._x).detach() for v in vectors.unbind(1)], dim=1)
                for row in self._rows
            ]
        return torch.stack(outputs, dim=-1)


def slope(total: Tensor, x: Tensor) -> Tensor:
    """Return ∂total/∂x, which can be differentiated again; zero where x has no part in it."""
    if not total.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(total, x, create_graph=True, allow_unused=True, materialize_grads=True)
    return gradient


def user_defined(network: NN) -> list[str]:
    """Return the type names of layers and activations that the package does not define, in alphabetical order.

    Examples:
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
