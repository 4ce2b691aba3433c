"""Networks differentiated by torch instead of analytically: the references to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessquik.layers.base import Triple
from hessquik.networks.network import NN

__all__ = ["NNPytorchAD", "NNPytorchHessian"]


class NNPytorchAD(nn.Module):
    """Derivatives by repeated :func:`torch.autograd.grad`, one column at a time.

    Args:
        net: The network.

    Examples:
        >>> import torch
        >>> from hessquik.networks import fullyConnectedNN
        >>> _, gradient, _ = NNPytorchAD(fullyConnectedNN([3, 5, 2]))(torch.zeros(4, 3), do_gradient=True)
        >>> gradient.shape
        torch.Size([4, 3, 2])
    """

    def __init__(self, net: NN) -> None:
        """Keep the network."""
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, do_gradient: bool = False, do_Hessian: bool = False, **kwargs: Any) -> Triple:
        """Evaluate f (n, m), its gradient (n, d, m) and Hessian (n, d, d, m); ``x`` is unchanged."""
        if not (do_gradient or do_Hessian):
            return self.net(x)[0], None, None
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            f = self.net(x)[0]
            gradient = torch.stack([_gradient(column, x) for column in f.sum(0)], dim=-1)
            if not do_Hessian:
                return f, gradient, None
            rows = gradient.sum(0)
            hessian = torch.stack(
                [torch.stack([_gradient(entry, x) for entry in row], dim=-1) for row in rows], dim=1
            )
        return f, gradient if do_gradient else None, hessian


class NNPytorchHessian(nn.Module):
    """Derivatives by :func:`torch.autograd.functional.jacobian` and ``hessian``, one output at a time.

    Args:
        net: The network.

    Examples:
        >>> import torch
        >>> from hessquik.networks import fullyConnectedNN
        >>> _, _, hessian = NNPytorchHessian(fullyConnectedNN([3, 5, 2]))(torch.zeros(4, 3), do_Hessian=True)
        >>> hessian.shape
        torch.Size([4, 3, 3, 2])
    """

    def __init__(self, net: NN) -> None:
        """Keep the network."""
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, do_gradient: bool = False, do_Hessian: bool = False, **kwargs: Any) -> Triple:
        """Evaluate f (n, m), its gradient (n, d, m) and Hessian (n, d, d, m); ``x`` is unchanged."""
        f = self.net(x)[0]
        if not (do_gradient or do_Hessian):
            return f, None, None
        if not x.shape[0]:  # torch refuses to differentiate nothing
            return NNPytorchAD(self.net).forward(x, do_gradient, do_Hessian)
        samples, outputs = torch.arange(x.shape[0]), range(f.shape[1])

        def total(points: Tensor, output: int) -> Tensor:
            column: Tensor = self.net(points)[0][:, output]
            return column.sum()

        columns = [torch.autograd.functional.jacobian(lambda p, j=j: total(p, j), x) for j in outputs]
        gradient = torch.stack(columns, dim=-1)
        hessian = None
        if do_Hessian:
            full = [torch.autograd.functional.hessian(lambda p, j=j: total(p, j), x) for j in outputs]
            hessian = torch.stack([block[samples, :, samples] for block in full], dim=-1)
        return f, gradient if do_gradient else None, hessian


def _gradient(scalar: Tensor, x: Tensor) -> Tensor:
    """Return ∂scalar/∂x, shaped like x; zero where the scalar does not depend on x."""
    if not scalar.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(scalar, x, create_graph=True, allow_unused=True, materialize_grads=True)
    return gradient
