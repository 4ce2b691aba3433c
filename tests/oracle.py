"""Networks and their derivatives computed without the engine: values as documented, derivatives by ``torch.func``.

Only the weights and the constructor arguments of a network are read; no form, no activation object and no derivative
of the engine takes part.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, gelu, leaky_relu, mish, silu, softplus, softsign

from hessquik import layers as lay
from hessquik.networks import NN, Ensemble

SIGMA = {
    "antiTanhActivation": lambda z, act: z.abs() + torch.log1p(torch.exp(-2 * z.abs())),
    "arctanActivation": lambda z, act: torch.atan(z),
    "eluActivation": lambda z, act: elu(z, act.alpha),
    "expActivation": lambda z, act: torch.exp(z),
    "expressionActivation": lambda z, act: formula(act.formula, z),
    "gaussianActivation": lambda z, act: torch.exp(-(z**2)),
    "geluActivation": lambda z, act: gelu(z),
    "geluTanhActivation": lambda z, act: gelu(z, approximate="tanh"),
    "identityActivation": lambda z, act: z * 1.0,
    "mishActivation": lambda z, act: mish(z),
    "quadraticActivation": lambda z, act: z**2 / 2,
    "reluActivation": lambda z, act: leaky_relu(z, act.negative_slope),
    "sigmoidActivation": lambda z, act: torch.sigmoid(z),
    "siluActivation": lambda z, act: silu(z),
    "sinActivation": lambda z, act: torch.sin(z),
    "softplusActivation": lambda z, act: softplus(z, act.beta, act.threshold),
    "softsignActivation": lambda z, act: softsign(z),
    "tanhActivation": lambda z, act: torch.tanh(z),
}


def formula(f, z: Tensor) -> Tensor:
    """Return a formula's value, by Python's operators and torch's functions."""
    match f:
        case "z":
            return z
        case int() | float():
            return torch.tensor(float(f), dtype=z.dtype)
        case [("add" | "sub" | "mul" | "div") as name, a, b]:
            return getattr(torch, name)(formula(a, z), formula(b, z))
        case ["power", a, k]:
            return formula(a, z) ** k
        case [name, a]:
            return {"softplus": softplus, "ndtr": torch.special.ndtr}.get(name, getattr(torch, name, None))(
                formula(a, z)
            )
    raise TypeError(f)


def sigma(act: nn.Module, z: Tensor) -> Tensor:
    """Return σ(z), by torch's functions."""
    return SIGMA[type(act).__name__](z, act)


def value(module: nn.Module, u: Tensor) -> Tensor:
    """Return the output (n, q) of a layer or network for the features (n, p), from its documented formula."""
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
        case lay.skipLayer():
            z = u @ module.K if module.b is None else u @ module.K + module.b
            y = sigma(module.act, z) if module.M is None else sigma(module.act, z) @ module.M
            y = y if module.mu is None else y + module.mu
            rest = u[:, module.in_features - module.carried :]
            if module.skip == "identity":
                y = y + u[:, : module.in_features - module.carried]
            return torch.cat([y if module.S is None else y + u @ module.S, rest], dim=1)
        case lay.ICNNLayer():
            x = u[:, -module.input_dim :]
            z = x @ module.K
            z = z if module.L is None else z + u[:, : module.in_features] @ softplus(module.L)
            return torch.cat([sigma(module.act, z if module.b is None else z + module.b), x], dim=1)
        case lay.quadraticLayer() | lay.quadraticICNNLayer():
            x, w = u[:, -len(module.v) :], getattr(module, "w", None)
            y = x @ module.v + 0.5 * ((x @ module.A.T) ** 2).sum(1) + module.mu
            return (y if w is None else y + u[:, : module.in_features] @ softplus(w)).unsqueeze(1)
    raise TypeError(type(module).__name__)


def derivatives(module: nn.Module, x: Tensor, outputs: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return value (n, m), gradient (n, d, m) and Hessian (n, d, d, m) of the first ``outputs`` outputs (default:
    all).

    For an ensemble, these are the means over its members.
    """
    if isinstance(module, Ensemble):
        value_, gradient_, hessian_ = zip(*(derivatives(one, x, outputs) for one in module.members), strict=True)
        return torch.stack(value_).mean(0), torch.stack(gradient_).mean(0), torch.stack(hessian_).mean(0)
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
    """Return the largest difference, relative to the largest expected entry if that is above 1; check the shape."""
    assert got.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if not expected.numel():
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    assert torch.isfinite(got).all()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
