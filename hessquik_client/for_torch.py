"""Models of the service as torch modules: differentiable twice, on any device, also under ``torch.func``.

surrogate = RemoteNetwork(client.model("borehole"))
surrogate(x).sum().backward()
torch.vmap(torch.func.hessian(surrogate))(x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hessquik_client.client import Model
from hessquik_client.domain import Outside

__all__ = ["RemoteNetwork"]


class RemoteNetwork(torch.nn.Module):
    """The function f: (…, d) → (…, m), evaluated by the service in the dtype of the points.

    One request returns the value and, if it will be needed, the gradient, so that first derivatives need no further
    request; a second derivative requests a Hessian-vector product. Reverse and forward mode may be nested, and a
    batch under ``vmap`` is one request.

    Args:
        model: The model.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.
    """

    def __init__(self, model: Model, outside: Outside | None = None) -> None:
        """Create the module; nothing is requested yet."""
        super().__init__()
        self._model = model.with_options(outside=outside)

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x).

        Raises:
            ClientError: the service does not answer.
        """
        points = x.reshape(-1, x.shape[-1])
        has_gradient = (points.requires_grad and torch.is_grad_enabled()) or _has_tangent(points)
        value: Tensor = _Value.apply(points, self._model, has_gradient)[0]  # type: ignore[no-untyped-call]
        return value.reshape(*x.shape[:-1], value.shape[-1])


# Letters: x (n, d) points, G (n, d, m) the gradient there, y (n, m), u and v (n, d); H_j is the Hessian of output j.
# Functions of x get G beside it, which they take for a function of x without asking for it again.


class _Value(torch.autograd.Function):
    """The functions y = f(x) and G = ∂f/∂x, (n, d, m); G has no columns if it is not needed."""

    @staticmethod
    def forward(x: Tensor, model: Model, has_gradient: bool) -> tuple[Tensor, Tensor]:
        answer = model.evaluate(x, ["value", "gradient"][: 1 + has_gradient], dtype=_dtype(x))
        return _like(x, answer["value"]), _like(x, answer["gradient"]) if has_gradient else x.new_empty(len(x), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.model = inputs[1]
        ctx.mark_non_differentiable(output[1])
        _save(ctx, inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor, None, None]:
        x, gradient = ctx.saved_tensors
        return _Pulled.apply(x, adjoints[0], gradient, ctx.model), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        x, gradient = ctx.saved_tensors
        if gradient.shape[1:] == (0,):  # a forward mode that could not be seen
            gradient = _Value.apply(x, ctx.model, True)[1]  # type: ignore[no-untyped-call]
        return _Pushed.apply(x, tangents[0], gradient, ctx.model), None  # type: ignore[no-untyped-call]


class _Pulled(torch.autograd.Function):
    """The function G y, (n, d), of x and an adjoint y."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, gradient: Tensor, model: Model) -> Tensor:
        return torch.einsum("naj,nj->na", gradient, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.model = inputs[3]
        _save(ctx, *inputs[:3])

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, gradient = ctx.saved_tensors
        product = _Product.apply(x, adjoints[0], y, ctx.model)  # type: ignore[no-untyped-call]
        return product, _Pushed.apply(x, adjoints[0], gradient, ctx.model), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, y, gradient = ctx.saved_tensors
        dx, dy = _zeros_for_none(tangents, (x, y))
        along_x: Tensor = _Product.apply(x, dx, y, ctx.model)  # type: ignore[no-untyped-call]
        along_y: Tensor = _Pulled.apply(x, dy, gradient, ctx.model)  # type: ignore[no-untyped-call]
        return along_x + along_y


class _Pushed(torch.autograd.Function):
    """The function Gᵀ v, (n, m), of x and a direction v."""

    @staticmethod
    def forward(x: Tensor, v: Tensor, gradient: Tensor, model: Model) -> Tensor:
        return torch.einsum("naj,na->nj", gradient, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.model = inputs[3]
        _save(ctx, *inputs[:3])

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, v, gradient = ctx.saved_tensors
        product = _Product.apply(x, v, adjoints[0], ctx.model)  # type: ignore[no-untyped-call]
        return product, _Pulled.apply(x, adjoints[0], gradient, ctx.model), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, v, gradient = ctx.saved_tensors
        dx, dv = _zeros_for_none(tangents, (x, v))
        products: Tensor = _Product.apply(x, dx, None, ctx.model)  # type: ignore[no-untyped-call]
        along_v: Tensor = _Pushed.apply(x, dv, gradient, ctx.model)  # type: ignore[no-untyped-call]
        return torch.einsum("naj,na->nj", products, v) + along_v


class _Product(torch.autograd.Function):
    """The function Σ_j y_j H_j v, (n, d), or without y H_j v of every output, (n, d, m). It has no derivatives."""

    @staticmethod
    def forward(x: Tensor, v: Tensor, y: Tensor | None, model: Model) -> Tensor:
        products = _like(x, model.hvp(x, v[:, None], weights=y, dtype=_dtype(x))[:, 0])
        return products if y is None else products[..., 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> Tensor:
        raise NotImplementedError("expected at most two derivatives of a remote network, got a third")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError("expected at most two derivatives of a remote network, got a third")


def _over_a_batch(function: type[torch.autograd.Function]) -> Any:
    """Return the ``vmap`` rule of a function, which evaluates the points of all batches in one request."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = [
            (one.expand(size, *one.shape) if axis is None else one.movedim(axis, 0)).flatten(0, 1)
            if isinstance(one, Tensor)
            else one
            for one, axis in zip(arguments, in_dims, strict=True)
        ]
        out = function.apply(*folded)
        if isinstance(out, Tensor):
            return out.unflatten(0, (size, -1)), 0
        return tuple(one.unflatten(0, (size, -1)) for one in out), (0,) * len(out)

    return staticmethod(vmap)


for _function in (_Value, _Pulled, _Pushed, _Product):
    _function.vmap = _over_a_batch(_function)  # type: ignore[method-assign]


def _save(ctx: Any, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _zeros_for_none(tangents: tuple[Any, ...], points: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        torch.zeros_like(point) if tangent is None else tangent
        for tangent, point in zip(tangents, points, strict=False)
    ]


def _has_tangent(x: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:  # vmap inside forward mode hides it
        return False


def _dtype(x: Tensor) -> str:
    return "float32" if x.dtype == torch.float32 else "float64"


def _like(x: Tensor, array: Any) -> Tensor:
    return torch.as_tensor(array, dtype=x.dtype, device=x.device)
