"""A network: layers one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from hessquik import calculus
from hessquik.errors import CompositionError, ShapeError
from hessquik.layers import hessQuikLayer
from hessquik.layers.base import Triple
from hessquik.layers.form import Form

__all__ = ["NN"]


class NN(nn.Sequential):
    """Layers and networks one after the other: f = f_L ∘ … ∘ f_1.

    Convex layers hand their input x on to the next layer; what such a network returns at its end is its output
    alone. Source: Newman & Ruthotto 2022 (doi:10.21105/joss.04171).

    Args:
        args: Layers and networks, each as wide at its input as the one before it is at its output.

    Raises:
        CompositionError: two neighbours do not fit.

    Example:
        >>> import torch
        >>> from hessquik.activations import quadraticActivation, softplusActivation, tanhActivation
        >>> from hessquik.layers import resnetLayer, singleLayer
        >>> f = NN(
        ...     singleLayer(10, 32, tanhActivation()),
        ...     resnetLayer(32, h=1.0, act=softplusActivation()),
        ...     singleLayer(32, 64, quadraticActivation()),
        ... )
        >>> fx, dfx, d2fx = f(torch.randn(20, 10), do_gradient=True, do_Hessian=True)
        >>> print(fx.shape, dfx.shape, d2fx.shape)
        torch.Size([20, 64]) torch.Size([20, 10, 64]) torch.Size([20, 10, 10, 64])
    """

    #: Constructor arguments of a family of networks, by name: what a saved file needs to build it again.
    parameter_names: tuple[str, ...] = ()

    def __init__(self, *args: nn.Module) -> None:
        """Check that the layers fit and keep them."""
        super().__init__(*args)
        for block, module in enumerate(args):
            if not isinstance(module, hessQuikLayer | NN):
                raise CompositionError(f"block {block}: expected a layer or a network, got {type(module).__name__}")
        for (left, before), (right, after) in pairwise(self.named_layers()):
            if before.dim_output() != after.dim_input():
                raise CompositionError(
                    f"incompatible composition: block {left} gives {before.dim_output()} features, "
                    f"block {right} expects {after.dim_input()}"
                )

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, hessQuikLayer]]:
        """All layers in order, those of nested networks too, with their places (``1.0``)."""
        for name, module in self.named_children():
            if isinstance(module, NN):
                yield from module.named_layers(f"{prefix}{name}.")
            else:
                yield prefix + name, cast(hessQuikLayer, module)

    def layers(self) -> list[hessQuikLayer]:
        """All layers in order, those of nested networks too."""
        return [layer for _, layer in self.named_layers()]

    def forms(self) -> list[Form]:
        """All layers as data, with their weights as they are now."""
        return [layer.form() for layer in self.layers()]

    def dim_input(self) -> int:
        """Number d of inputs."""
        return self.layers()[0].dim_input()

    def dim_output(self) -> int:
        """Number m of outputs."""
        return self.layers()[-1].output_widths()[0]

    def setup_forward_mode(self, **kwargs: Any) -> bool | None:
        """Return ``kwargs["forward_mode"]`` or, if there is none, the mode with fewer operations.

        ``True`` carries derivatives forward through the layers; ``False`` calls :meth:`backward` at the end;
        ``None`` only keeps what a later :meth:`backward` needs, so that whole networks can be chained.
        """
        if "forward_mode" in kwargs:
            return cast("bool | None", kwargs["forward_mode"])
        d, m, forward, backward = self.dim_input(), self.dim_output(), 0, 0
        for layer in self.layers():
            p, q = layer.dim_input(), layer.dim_output()
            forward += d * d * p * q
            backward += m * p * q * (p + q)
        return forward < backward

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        do_gradient: bool = False,
        do_Hessian: bool = False,
        do_Laplacian: bool = False,
        dudx: Tensor | None = None,
        d2ud2x: Tensor | None = None,
        v: Tensor | None = None,
        **kwargs: Any,
    ) -> Triple:
        """Evaluate the network and its derivatives.

        Args:
            x: Points (n, d).
            do_gradient: Whether the gradient is wanted.
            do_Hessian: Whether the Hessian is wanted.
            do_Laplacian: Whether the Laplacian is wanted; it comes in the Hessian's place, and only if the
                Hessian is not wanted too.
            dudx: Forward: gradient of x (n, d', d) with respect to variables before it.
            d2ud2x: Forward: Hessian of x (n, d', d', d), or its Laplacian (n, 1, d).
            v: Forward: directions (k, d). Backward: weights (m, k).
            kwargs: ``forward_mode``, see :meth:`setup_forward_mode`.

        Returns:
            f (n, m), gradient (n, d, m) or ``None``, Hessian (n, d, d, m) or Laplacian (n, 1, m) or ``None``.

        Raises:
            ShapeError: ``x`` is not (n, d), or its dtype is not the weights'.
        """
        self._check(x)
        if "forward_mode" not in kwargs and v is None and dudx is None and d2ud2x is None:
            return self._sum_over_hidden_units(x, do_gradient, do_Hessian, do_Laplacian)
        forward_mode = self.setup_forward_mode(**kwargs)
        if do_Laplacian and not do_Hessian:
            forward_mode = True
        for place, layer in enumerate(self.layers()):
            x, dudx, d2ud2x = layer(
                x,
                do_gradient=do_gradient or do_Hessian or do_Laplacian,
                do_Hessian=do_Hessian,
                do_Laplacian=do_Laplacian,
                forward_mode=True if forward_mode else None,
                dudx=dudx,
                d2ud2x=d2ud2x,
                v=v if place == 0 and forward_mode else None,
            )
        m = self.dim_output()
        if forward_mode is False and (do_gradient or do_Hessian):
            dudx, d2ud2x = self.backward(do_Hessian=do_Hessian, v=v)
        elif forward_mode:
            dudx = None if dudx is None else dudx[..., :m]
            d2ud2x = None if d2ud2x is None else d2ud2x[..., :m]
        return x[..., :m], dudx if do_gradient else None, d2ud2x

    def backward(
        self,
        do_Hessian: bool = False,
        dgdf: Tensor | None = None,
        d2gd2f: Tensor | None = None,
        v: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Carry the derivatives of g(f) back through the network, after ``forward(x, forward_mode=None)``.

        Args:
            do_Hessian: Whether the Hessian is wanted.
            dgdf: Gradient of g with respect to f (n, m', m); g = f if not given.
            d2gd2f: Hessian of g with respect to f (n, m', m', m); 0 if not given.
            v: Weights (m, k) or (n, m, k): derivatives of the k sums gv replace those of each g.

        Returns:
            Gradient (n, d, m) and Hessian (n, d, d, m) or ``None``, with k in place of m if ``v`` is given.

        Raises:
            OrderError: there was no such forward call.
        """
        *_, last = layers = self.layers()
        carried = last.dim_output() - self.dim_output()
        if carried:
            weight = next(last.parameters())
            keep = torch.eye(last.dim_output(), self.dim_output(), dtype=weight.dtype, device=weight.device)
            dgdf = keep.unsqueeze(0) if dgdf is None else keep @ dgdf
            d2gd2f = None if d2gd2f is None else nn.functional.pad(d2gd2f, (0, 0, 0, carried, 0, carried))
        for layer in reversed(layers):
            dgdf, d2gd2f = layer.backward(do_Hessian=do_Hessian, dgdf=dgdf, d2gd2f=d2gd2f, v=v)
            v = None
        assert dgdf is not None
        return dgdf, d2gd2f

    def _sum_over_hidden_units(self, x: Tensor, do_gradient: bool, do_Hessian: bool, do_Laplacian: bool) -> Triple:
        """The derivatives in one pass, see :mod:`hessquik.calculus`."""
        second = "hessian" if do_Hessian else "laplacian" if do_Laplacian else None
        quantities = {"value"} | ({"gradient"} if do_gradient else set()) | ({second} if second else set())
        found = calculus.evaluate(self.forms(), x, quantities)
        assert found.value is not None
        laplacian = None if found.laplacian is None else found.laplacian.unsqueeze(1)
        return found.value, found.gradient, laplacian if found.hessian is None else found.hessian

    def _check(self, x: Tensor) -> None:
        """Refuse points that do not fit."""
        if x.ndim != 2 or x.shape[1] != self.dim_input():
            raise ShapeError(f"expected points of shape (n, {self.dim_input()}), got {tuple(x.shape)}")
        dtype = next((parameter.dtype for parameter in self.parameters()), x.dtype)
        if x.dtype != dtype:
            raise ShapeError(f"expected points of {dtype}, as the weights are, got {x.dtype}")
