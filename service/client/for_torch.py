"""Models of the service as torch modules: differentiable twice, on any device.

surrogate = RemoteNetwork(client.model("borehole"))
surrogate(x).sum().backward()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from service.client.client import Model

__all__ = ["RemoteNetwork"]


class RemoteNetwork(torch.nn.Module):
    """f: (…, d) → (…, m), computed by the service in the dtype of the points.

    The value and, where it will be needed, the gradient come in one request; a backward pass costs none, a second one
    asks for a weighted Hessian times a vector.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        """Nothing is asked yet."""
        super().__init__()
        self._model = model

    def forward(self, x: Tensor) -> Tensor:
        """f(x).

        Raises:
            ClientError: the service does not answer.
        """
        points = x.reshape(-1, x.shape[-1])
        value: Tensor = _Value.apply(points, self._model)  # type: ignore[no-untyped-call]
        return value.reshape(*x.shape[:-1], value.shape[-1])


class _Value(torch.autograd.Function):
    """y = f(x), (n, d) → (n, m)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: Model) -> Tensor:
        is_differentiated = ctx.needs_input_grad[0]
        answer = model.evaluate(x, ["value", "gradient"] if is_differentiated else ["value"], dtype=_dtype(x))
        if is_differentiated:
            ctx.model = model
            ctx.save_for_backward(x, _like(x, answer["gradient"]))
        return _like(x, answer["value"])

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor, None]:
        x, gradient = ctx.saved_tensors
        return _Pulled.apply(x, adjoints[0], gradient, ctx.model), None  # type: ignore[no-untyped-call]


class _Pulled(torch.autograd.Function):
    """gx[n, a] = Σ_j ∂f_j/∂x_a gy[n, j], as a function of x and gy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gy: Tensor, gradient: Tensor, model: Model) -> Tensor:
        ctx.model = model
        ctx.save_for_backward(x, gy, gradient)
        return torch.einsum("naj,nj->na", gradient, gy)

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, gy, gradient = ctx.saved_tensors
        gx, ggy = _Products.apply(x, gy, gradient, adjoints[0], ctx.model)  # type: ignore[no-untyped-call]
        return gx, ggy, None, None


class _Products(torch.autograd.Function):
    """(Σ_j gy[n, j] H_j) v[n] and Jᵀ's adjoint, J v[n]: what a second backward pass needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gy: Tensor, gradient: Tensor, v: Tensor, model: Model) -> tuple[Tensor, Tensor]:
        answer = model.evaluate(x, ["hvp"], weights=gy, directions=v[:, None], dtype=_dtype(x))
        return _like(x, answer["hvp"][:, 0, :, 0]), torch.einsum("naj,na->nj", gradient, v)

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> Tensor:
        raise NotImplementedError("expected at most two derivatives of a remote network, got a third")


def _dtype(x: Tensor) -> str:
    return "float32" if x.dtype == torch.float32 else "float64"


def _like(x: Tensor, array: Any) -> Tensor:
    return torch.as_tensor(array, dtype=x.dtype, device=x.device)
