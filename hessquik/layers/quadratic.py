"""Quadratic layers with scalar output, on all features or as the head of an input-convex network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hessquik.activations import quadraticActivation
from hessquik.layers.base import hessQuikLayer, uniform_
from hessquik.layers.form import Form

__all__ = ["quadraticICNNLayer", "quadraticLayer"]


class quadraticLayer(hessQuikLayer):
    """The layer y = u·v + ½‖uAᵀ‖² + μ.

    Its gradient is ∇y = ∇u (v + AᵀA u) and the Hessian of y with respect to u is AᵀA. Source: Newman & Ruthotto
    2022 (doi:10.21105/joss.04171); A is held as (r, p), as in that paper's software.

    Args:
        in_features: Width p of u.
        rank: Rank r of the quadratic term.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Attributes:
        v: Weights of the linear term (p,).
        A: Weights of the quadratic term (r, p).
        mu: Constant (1,).

    Examples:
        >>> import torch
        >>> f = quadraticLayer(4, 2)
        >>> fx, dfdx, d2fd2x = f(torch.randn(10, 4), do_gradient=True, do_Hessian=True)
        >>> print(fx.shape, dfdx.shape, d2fd2x.shape)
        torch.Size([10, 1]) torch.Size([10, 4, 1]) torch.Size([10, 4, 4, 1])
    """

    parameter_names = ("in_features", "rank")

    def __init__(
        self,
        in_features: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the weights, uniformly distributed within ±1/√p."""
        super().__init__()
        self.in_features = in_features
        self.rank = rank
        self.v = nn.Parameter(torch.empty(in_features, device=device, dtype=dtype))
        self.mu = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights with new random numbers."""
        for parameter in (self.v, self.mu, self.A):
            uniform_(parameter, self.in_features)

    def input_widths(self) -> tuple[int, ...]:
        """Return (p,)."""
        return (self.in_features,)

    def output_widths(self) -> tuple[int, ...]:
        """Return (1,)."""
        return (1,)

    def form(self) -> Form:
        """Return the form with P = Aᵀ, σ(z) = ½z², S = v, Q = 1 summed over the hidden units."""
        return _quadratic_form(self, into=(self.A.T,), skip=(self.v.unsqueeze(-1),))


class quadraticICNNLayer(hessQuikLayer):
    """The layer y = u·w⁺ + x·v + ½‖xAᵀ‖² + μ, convex in u and x; the head of an input-convex network.

    w⁺ = softplus(w) has positive entries only. Features come in as [u x], or as x alone. Its gradient is
    ∇y = ∇u w⁺ + v + AᵀA x. Source: Newman & Ruthotto 2022 (doi:10.21105/joss.04171); A is held as (r, d), as in
    that paper's software.

    Args:
        input_dim: Width d of x.
        in_features: Width p of u, ``None`` if there is none.
        rank: Rank r of the quadratic term.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Attributes:
        v: Weights of x (d,).
        w: Weights of u (p,) before ``nonneg``, or ``None``.
        A: Weights of the quadratic term (r, d).
        mu: Constant (1,).
        nonneg: The function that makes w⁺ of w, :func:`torch.nn.functional.softplus`. Another one may be set; a file
            cannot hold it.

    Examples:
        >>> import torch
        >>> f = quadraticICNNLayer(4, None, 2)
        >>> fx, dfdx, d2fd2x = f(torch.randn(10, 4), do_gradient=True, do_Hessian=True)
        >>> print(fx.shape, dfdx.shape, d2fd2x.shape)
        torch.Size([10, 1]) torch.Size([10, 4, 1]) torch.Size([10, 4, 4, 1])
    """

    parameter_names = ("input_dim", "in_features", "rank")

    def __init__(
        self,
        input_dim: int,
        in_features: int | None,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the weights, uniformly distributed within ±1/√d, w within ±1/√p."""
        super().__init__()
        self.input_dim = input_dim
        self.in_features = in_features
        self.rank = rank
        self.nonneg: Callable[[Tensor], Tensor] = softplus

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.w = None if in_features is None else weights(in_features)
        self.v = weights(input_dim)
        self.mu = weights(1)
        self.A = weights(rank, input_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights with new random numbers."""
        uniform_(self.w, self.in_features or 1)
        for parameter in (self.v, self.mu, self.A):
            uniform_(parameter, self.input_dim)

    def input_widths(self) -> tuple[int, ...]:
        """Return (p, d), or (d,) if there is no u."""
        return (*(() if self.in_features is None else (self.in_features,)), self.input_dim)

    def output_widths(self) -> tuple[int, ...]:
        """Return (1,)."""
        return (1,)

    def form(self) -> Form:
        """Return the form with P = (0, Aᵀ), σ(z) = ½z², S = (w⁺, v), Q = 1 summed over the hidden units."""
        into, skip = (self.A.T,), (self.v.unsqueeze(-1),)
        if self.w is None:
            return _quadratic_form(self, into, skip)
        return _quadratic_form(self, (None, *into), (self.nonneg(self.w).unsqueeze(-1), *skip))


def _quadratic_form(
    layer: quadraticLayer | quadraticICNNLayer,
    into: tuple[Tensor | None, ...],
    skip: tuple[Tensor | None, ...],
) -> Form:
    """Return the form that both quadratic layers share."""
    return Form(
        quadraticActivation(),
        layer.input_widths(),
        into=into,
        skip=skip,
        out=torch.ones_like(layer.A[:, :1]),
        offset=layer.mu,
    )
