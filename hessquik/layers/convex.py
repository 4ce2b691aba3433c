"""A layer of an input-convex network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hessquik.activations import hessQuikActivationFunction, softplusActivation
from hessquik.layers.base import hessQuikLayer, uniform_
from hessquik.layers.form import Form

__all__ = ["ICNNLayer"]


class ICNNLayer(hessQuikLayer):
    """The layer y = [σ(uL⁺ + xK + b)  x], convex in x if σ is convex and does not decrease.

    L⁺ = softplus(L) has positive entries only. Features come in as [u x], in the first layer of a convex
    network as x alone. With z = uL⁺ + xK + b its gradient is ∇y = [(∇u L⁺ + K) diag(σ'(z))  I].
    Sources: Newman & Ruthotto 2022 (doi:10.21105/joss.04171); Amos, Xu & Kolter 2017 (arXiv:1609.07152).

    Args:
        input_dim: Width d of x.
        in_features: Width p of u, ``None`` in the first layer.
        out_features: Width q of σ(z).
        act: σ; softplus if not given.
        bias: Whether there is a b.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Attributes:
        K: Weights of x (d, q).
        L: Weights of u (p, q) before ``nonneg``, ``None`` in the first layer.
        b: Bias (q,).
        nonneg: The function that makes L⁺ of L, :func:`torch.nn.functional.softplus`. Another one may be set; a file
            cannot hold it.

    Examples:
        >>> import torch
        >>> f = ICNNLayer(4, None, 7)
        >>> fx, dfdx, d2fd2x = f(torch.randn(10, 4), do_gradient=True, do_Hessian=True)
        >>> print(fx.shape, dfdx.shape, d2fd2x.shape)
        torch.Size([10, 11]) torch.Size([10, 4, 11]) torch.Size([10, 4, 4, 11])
    """

    parameter_names = ("input_dim", "in_features", "out_features", "act", "bias")

    def __init__(
        self,
        input_dim: int,
        in_features: int | None,
        out_features: int,
        act: hessQuikActivationFunction | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the weights, uniformly distributed within ±1/√d for K and ±1/√p for L and b."""
        super().__init__()
        self.input_dim = input_dim
        self.in_features = in_features
        self.out_features = out_features
        self.act = softplusActivation() if act is None else act
        self.bias = bias
        self.nonneg: Callable[[Tensor], Tensor] = softplus

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.K = weights(input_dim, out_features)
        self.L = None if in_features is None else weights(in_features, out_features)
        self.b = weights(out_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights with new random numbers."""
        fan_in = self.in_features or self.input_dim
        uniform_(self.K, self.input_dim)
        uniform_(self.L, fan_in)
        uniform_(self.b, fan_in)

    def input_widths(self) -> tuple[int, ...]:
        """Return (p, d), or (d,) in the first layer."""
        return (*(() if self.in_features is None else (self.in_features,)), self.input_dim)

    def output_widths(self) -> tuple[int, ...]:
        """Return (q, d)."""
        return (self.out_features, self.input_dim)

    def form(self) -> Form:
        """Return the form with P = (L⁺, K), Q = 1, and x carried along."""
        widths = self.input_widths()
        return Form(
            self.act,
            widths,
            into=(self.K,) if self.L is None else (self.nonneg(self.L), self.K),
            bias=self.b,
            skip=(None,) * len(widths),
            carries=True,
        )
