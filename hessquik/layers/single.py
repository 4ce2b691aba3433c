"""A fully-connected layer."""

from __future__ import annotations

import torch
from torch import nn

from hessquik.activations import hessQuikActivationFunction, identityActivation
from hessquik.layers.base import hessQuikLayer, uniform_
from hessquik.layers.form import Form

__all__ = ["singleLayer"]


class singleLayer(hessQuikLayer):
    """The layer y = σ(uK + b).

    Its gradient is ∇y = ∇u K diag(σ'(uK + b)). Source: Newman & Ruthotto 2022 (doi:10.21105/joss.04171).

    Args:
        in_features: Width p of u.
        out_features: Width q of y.
        act: σ; the identity if not given.
        bias: Whether there is a b.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Attributes:
        K: Weights (p, q).
        b: Bias (q,).

    Examples:
        >>> import torch
        >>> f = singleLayer(4, 7)
        >>> fx, dfdx, d2fd2x = f(torch.randn(10, 4), do_gradient=True, do_Hessian=True)
        >>> print(fx.shape, dfdx.shape, d2fd2x.shape)
        torch.Size([10, 7]) torch.Size([10, 4, 7]) torch.Size([10, 4, 4, 7])
    """

    parameter_names = ("in_features", "out_features", "act", "bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act: hessQuikActivationFunction | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the weights, uniformly distributed within ±1/√p."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.act = identityActivation() if act is None else act
        self.bias = bias
        self.K = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights with new random numbers."""
        uniform_(self.K, self.in_features)
        uniform_(self.b, self.in_features)

    def input_widths(self) -> tuple[int, ...]:
        """Return (p,)."""
        return (self.in_features,)

    def output_widths(self) -> tuple[int, ...]:
        """Return (q,)."""
        return (self.out_features,)

    def form(self) -> Form:
        """Return the form with P = K, Q = 1."""
        return Form(self.act, self.input_widths(), into=(self.K,), bias=self.b)
