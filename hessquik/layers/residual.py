"""A residual layer."""

from __future__ import annotations

from dataclasses import replace

import torch

from hessquik.activations import hessQuikActivationFunction
from hessquik.layers.base import hessQuikLayer
from hessquik.layers.form import Form
from hessquik.layers.single import singleLayer

__all__ = ["resnetLayer"]


class resnetLayer(hessQuikLayer):
    """The layer y = u + hσ(uK + b).

    Its gradient is ∇y = ∇u (I + h K diag(σ'(uK + b))). Source: Newman & Ruthotto 2022
    (doi:10.21105/joss.04171).

    Args:
        width: Width of u and y.
        h: Step size.
        act: σ; the identity if not given.
        bias: Whether there is a b.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Attributes:
        layer: The :class:`singleLayer` that holds K (width, width) and b (width,).

    Examples:
        >>> import torch
        >>> f = resnetLayer(4, h=0.25)
        >>> fx, dfdx, d2fd2x = f(torch.randn(10, 4), do_gradient=True, do_Hessian=True)
        >>> print(fx.shape, dfdx.shape, d2fd2x.shape)
        torch.Size([10, 4]) torch.Size([10, 4, 4]) torch.Size([10, 4, 4, 4])
    """

    parameter_names = ("width", "h", "act", "bias")

    def __init__(
        self,
        width: int,
        h: float = 1.0,
        act: hessQuikActivationFunction | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the inner layer."""
        super().__init__()
        self.width = width
        self.h = h
        self.layer = singleLayer(width, width, act=act, bias=bias, device=device, dtype=dtype)

    @property
    def act(self) -> hessQuikActivationFunction:
        """σ, which the inner layer holds."""
        return self.layer.act

    @property
    def bias(self) -> bool:
        """True if there is a b."""
        return self.layer.bias

    def input_widths(self) -> tuple[int, ...]:
        """Return (width,)."""
        return (self.width,)

    def output_widths(self) -> tuple[int, ...]:
        """Return (width,)."""
        return (self.width,)

    def form(self) -> Form:
        """Return the layer's form with P = K, S = 1 and Q = h."""
        return replace(self.layer.form(), skip=(1.0,), out=self.h)
