"""Networks and their derivatives computed without the engine: values as documented, derivatives by ``torch.func``.

Only the weights and the constructor arguments of a network are read; no form, no activation object and no derivative
of the engine takes part.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu, softplus

from hessquik import layers as lay
from hessquik.networks import NN

SIGMA = {
    "antiTanhActivation": lambda z, act: z.abs() + torch.log1p(torch.exp(-2 * z.abs())),
    "arctanActivation": lambda z, act: torch.atan(z),
    "expActivation": lambda z, act: torch.exp(z),
    "gaussianActivation": lambda z, act: torch.exp(-(z**2)),
    "geluActivation": lambda z, act: gelu(z),
    "identityActivation": lambda z, act: z * 1.0,
    "quadraticActivation": lambda z, act: z**2 / 2,
    "sigmoidActivation": lambda z, act: torch.sigmoid(z),
    "siluActivation": lambda z, act: silu(z),
    "sinActivation": lambda z, act: torch.sin(z),
    "softplusActivation": lambda z, act: softplus(z, act.beta, act.threshold),
    "tanhActivation": lambda z, act: torch.tanh(z),
}


def sigma(act: nn.Module, z: Tensor) -> Tensor:
    """σ(z) by torch's own functions."""
    return SIGMA[type(act).__name__](z, act)


def value(module: nn.Module, u: Tensor) -> Tensor:
    """The features (n, q) that a layer or network makes of the features (n, p), as its documentation says."""
    match module:
        case NN():
            for child in module._modules.values():
                u = value(child, u)
            return u
        case lay.singleLayer():
            z = u @ module.K
            return sigma(module.act, z if module.b is None else z + module.b)
        case lay.resnetLayer():
            return u + module.h * value(module.layer, u)
        case lay.ICNNLayer():
            x = u[:, -module.input_dim :]
            z = x @ module.K
            z = z if module.L is None else z + u[:, : module.in_features] @ softplus(module.L)
            return torch.cat([sigma(module.act, z if module.b is None else z + module.b), x], dim=1)
        case lay.quadraticLayer():
            return (u @ module.v + 0.5 * ((u @ module.A.T) ** 2).sum(1) + module.mu).unsqueeze(1)
        case lay.quadraticICNNLayer():
            x = u[:, -module.input_dim :]
            y = x @ module.v + 0.5 * ((x @ module.A.T) ** 2).sum(1) + module.mu
            return (y if module.w is None else y + u[:, : module.in_features] @ softplus(module.w)).unsqueeze(1)
    raise TypeError(type(module).__name__)


def derivatives(module: nn.Module, x: Tensor, outputs: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Value (n, m), gradient (n, d, m) and Hessian (n, d, d, m) of the first ``outputs`` outputs, all by default."""
    n, d = x.shape
    m = module.dim_output() if outputs is None else outputs

    def f(points: Tensor) -> Tensor:
        return value(module, points)[:, :m]

    jacobian = torch.func.jacrev(lambda points: f(points).sum(0))  # (m, n, d): samples do not mix

    def sums_and_gradient(points: Tensor) -> tuple[Tensor, Tensor]:
        gradient = jacobian(points)
        return gradient.sum(1), gradient

    if n == 0:
        return x.new_zeros(0, m), x.new_zeros(0, d, m), x.new_zeros(0, d, d, m)
    hessian, gradient = torch.func.jacrev(sums_and_gradient, has_aux=True)(x)  # (m, d, n, d) and (m, n, d)
    return f(x).detach(), gradient.permute(1, 2, 0).detach(), hessian.permute(2, 1, 3, 0).detach()


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected entry where that is above 1; a wrong shape is refused."""
    assert got.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if not expected.numel():
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    assert torch.isfinite(got).all()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
