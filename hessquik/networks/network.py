"""A network: a composition of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from hessquik import calculus
from hessquik.errors import CompositionError, OrderError, ShapeError
from hessquik.layers import hessQuikLayer
from hessquik.layers.base import Triple, pull_back
from hessquik.layers.form import Form, Linearization, join

__all__ = ["NN"]

#: Multiplications that take as long as reading and writing one number of a large array, about.
ACCESS = 20


class NN(nn.Sequential):
    """A composition of layers and networks: f = f_L ∘ … ∘ f_1.

    Convex layers pass their input x on to the next layer. A network that ends with one returns its output without x,
    unless networks are chained by hand (``return_input``). Source: Newman & Ruthotto 2022 (doi:10.21105/joss.04171).

    Args:
        args: Layers and networks, each as wide at its input as the one before it is at its output; or one
            ``OrderedDict`` of them, as for :class:`torch.nn.Sequential`.

    Raises:
        CompositionError: two neighbours do not fit, or there is no layer. ``append``, ``insert``, ``extend``, ``+=``,
            ``*=`` and setting or deleting a part raise it too, and then leave the network unchanged.

    Examples:
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

    def __init__(self, *args: Any) -> None:
        """Check that the layers fit and keep them."""
        super().__init__(*args)
        self._check_composition()

    def _check_composition(self) -> None:
        """Check that neighbouring parts fit."""
        if not self._modules:
            raise CompositionError("a network must have at least one layer, got none")
        for block, module in self._modules.items():
            if not isinstance(module, hessQuikLayer | NN):
                raise CompositionError(f"block {block} must be a layer or a network, got {type(module).__name__}")
        for (left, before), (right, after) in pairwise(self.named_layers()):
            if before.dim_output() != after.dim_input():
                raise CompositionError(
                    f"incompatible composition: block {left} gives {before.dim_output()} features, "
                    f"block {right} needs {after.dim_input()}"
                )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Check the composition after a change, and undo the change if it does not fit."""
        before = dict(self._modules)
        try:
            yield
            self._check_composition()
        except BaseException:
            self._modules.clear()
            self._modules.update(before)
            raise

    def append(self, module: nn.Module) -> Self:
        """Add a layer or network at the end."""
        with self._changing():
            super().append(module)
        return self

    def insert(self, index: int, module: nn.Module) -> Self:
        """Add a layer or network before another."""
        with self._changing():
            super().insert(index, module)
        return self

    def extend(self, sequential: Iterable[nn.Module]) -> Self:
        """Add layers and networks at the end."""
        with self._changing():
            super().extend(sequential)
        return self

    def __setitem__(self, index: int, module: nn.Module) -> None:
        with self._changing():
            super().__setitem__(index, module)

    def __delitem__(self, index: int | slice) -> None:
        with self._changing():
            super().__delitem__(index)

    def __add__(self, other: Iterable[nn.Module]) -> NN:
        return NN(*self, *other)

    def __iadd__(self, other: Iterable[nn.Module]) -> Self:
        return self.extend(other)

    def __mul__(self, other: int) -> NN:
        if other < 1:
            raise CompositionError(f"a network can be repeated once or more, got {other}")
        return NN(*(other * list(self)))

    def __rmul__(self, other: int) -> NN:
        return self * other

    def __imul__(self, other: int) -> Self:
        return self.extend(list(self * other)[len(self) :])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what :meth:`backward` needs."""
        return {name: value for name, value in vars(self).items() if name != "_chain"}

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, hessQuikLayer]]:
        """Yield all layers in order, those of nested networks too, with their places (``1.0``)."""
        for name, module in self._modules.items():  # named_children() leaves out a layer's second place
            if isinstance(module, NN):
                yield from module.named_layers(f"{prefix}{name}.")
            else:
                yield prefix + name, cast(hessQuikLayer, module)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return one of the layers and networks, or the network that a slice of them is."""
        return NN(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def layers(self) -> list[hessQuikLayer]:
        """Return all layers in order, those of nested networks too."""
        return [layer for _, layer in self.named_layers()]

    def forms(self) -> list[Form]:
        """Return all layers as data, with their weights as they are now."""
        return [layer.form() for layer in self.layers()]

    def dim_input(self) -> int:
        """Return the number d of inputs."""
        return self.layers()[0].dim_input()

    def dim_output(self) -> int:
        """Return the number m of outputs."""
        return self.layers()[-1].output_widths()[0]

    def setup_forward_mode(self, **kwargs: Any) -> bool | None:
        """Return ``kwargs["forward_mode"]`` or, if there is none, the mode with less work for a Hessian.

        ``True`` carries derivatives forward through the layers; ``False`` pulls adjoints back at the end; ``None``
        only keeps what a later :meth:`backward` needs, so that whole networks can be chained.
        """
        if "forward_mode" in kwargs:
            return cast("bool | None", kwargs["forward_mode"])
        return self._is_forward_cheaper(self.forms(), "hessian")

    def _is_forward_cheaper(self, forms: Sequence[Form], highest: str) -> bool:
        """Return whether forward mode is less work for a sample, up to a Hessian, Laplacian or gradient.

        With F multiplications for the value, W hidden units, t second derivatives along tangents, and a memory access
        that costs as much as some multiplications:
            backward   m adjoints and d tangents through F, and sums over hidden units, dzᵀ diag(c) dz for a Hessian
            forward    d + t tangents through F, their products, and for a Hessian its two triangles
        """
        d, m = self.dim_input(), self.dim_output()
        F, W = sum(map(_multiplications, forms)), sum(form.hidden for form in forms)
        if highest == "gradient":
            return d < m
        if highest == "hessian":
            t, triangles = d * (d + 1) // 2, 2 * m * d * d
            sums = m * d * d * W + ACCESS * m * (d * W + len(forms) * d * d)
        else:
            t, triangles, sums = 1, 0, (m + ACCESS) * d * W
        backward = (m + d) * (F + 2 * ACCESS * W) + sums
        forward = (d + t) * F + ACCESS * ((d + 6 * t) * W + triangles)
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
        return_input: bool | None = None,
        **kwargs: Any,
    ) -> Triple:
        """Evaluate the network and its derivatives.

        Args:
            x: Points (n, d).
            do_gradient: Whether the gradient is wanted.
            do_Hessian: Whether the Hessian is wanted.
            do_Laplacian: Whether the Laplacian is wanted; it comes in the Hessian's place, and only if the
                Hessian is not wanted too.
            dudx: Gradient of x (n, d', d) with respect to variables before it; forward mode only.
            d2ud2x: Hessian of x (n, d', d', d), or its Laplacian (n, 1, d); forward mode only.
            v: Forward: directions (k, d) or (n, k, d). Backward: weights (m, k) or (n, m, k). Because it decides
                what v means, the mode is forward exactly if d < m when only ``v`` is given.
            return_input: Whether the input x that a convex last layer passes on is returned too, after the m
                outputs, as the next network of a chain needs it. By default only with ``forward_mode=None``, which is
                meant for chaining by hand.
            kwargs: ``forward_mode``, see :meth:`setup_forward_mode`.

        Returns:
            f (n, m), gradient (n, d, m) or ``None``, Hessian (n, d, d, m) or Laplacian (n, 1, m) or ``None``, where
            m counts the features passed on too. With ``v``, gradient (n, k, m) and Hessian (n, k, k, m) forward,
            (n, d, k) and (n, d, d, k) backward.

        Raises:
            ShapeError: ``x`` is not (n, d), its dtype is not the weights', or another argument does not fit.
        """
        self._check(x)
        before = dudx is not None or d2ud2x is not None
        if "forward_mode" not in kwargs:
            if v is None and not before and not return_input:
                return self._in_one_pass(x, do_gradient, do_Hessian, do_Laplacian)
            kwargs["forward_mode"] = before or (return_input and v is None) or self.dim_input() < self.dim_output()
        forward_mode = self.setup_forward_mode(**kwargs)
        if do_Laplacian and not do_Hessian:
            forward_mode = True
        if forward_mode:
            return self._carry_forward(x, do_gradient, do_Hessian, do_Laplacian, dudx, d2ud2x, v, bool(return_input))
        if before:
            raise ShapeError(f"dudx and d2ud2x need forward_mode=True, got forward_mode={forward_mode}")
        order = 2 if do_Hessian or forward_mode is None else int(do_gradient)
        chain = calculus.linearize(self.forms(), (x.unsqueeze(1),), order)
        if return_input is None:
            return_input = forward_mode is None
        y = (join(chain[-1].value) if return_input else chain[-1].value[0]).squeeze(1)
        if forward_mode is None:
            self._chain = chain
        if forward_mode is None or order == 0:
            return y, None, None
        gradient, hessian = _carry_back(chain, do_Hessian, None, None, v, return_input)
        return y, gradient if do_gradient else None, hessian

    def backward(
        self,
        do_Hessian: bool = False,
        dgdf: Tensor | None = None,
        d2gd2f: Tensor | None = None,
        v: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Carry the derivatives of g(f) back through the network, after ``forward(x, forward_mode=None)``.

        It may be called repeatedly; copies and pickles of the network do not contain the state of that call.

        Args:
            do_Hessian: Whether the Hessian is wanted.
            dgdf: Gradient of g with respect to f (n, m', m), or with respect to all that was returned; g = f if not
                given.
            d2gd2f: Hessian of g with respect to the same (n, m', m', m); 0 if not given.
            v: Weights (m, k) or (n, m, k): derivatives of the k sums gv replace those of each g.

        Returns:
            Gradient (n, d, m) and Hessian (n, d, d, m) or ``None``, with k in place of m if ``v`` is given.

        Raises:
            OrderError: there was no such forward call.
            ShapeError: ``v`` does not fit.
        """
        chain = self.__dict__.get("_chain")
        if chain is None:
            raise OrderError(f"{type(self).__name__}.backward() needs a forward(x, forward_mode=None) before it")
        return _carry_back(chain, do_Hessian, dgdf, d2gd2f, v)

    def _carry_forward(
        self,
        x: Tensor,
        do_gradient: bool,
        do_Hessian: bool,
        do_Laplacian: bool,
        dudx: Tensor | None,
        d2ud2x: Tensor | None,
        v: Tensor | None,
        return_input: bool,
    ) -> Triple:
        """Carry the derivatives layer by layer from x to f."""
        for layer in self.layers():
            x, dudx, d2ud2x = layer(
                x,
                do_gradient=do_gradient or do_Hessian or do_Laplacian,
                do_Hessian=do_Hessian,
                do_Laplacian=do_Laplacian,
                dudx=dudx,
                d2ud2x=d2ud2x,
                v=v,
            )
            v = None
        own = slice(None if return_input else self.dim_output())
        return (
            x[..., own],
            dudx[..., own] if do_gradient and dudx is not None else None,
            None if d2ud2x is None else d2ud2x[..., own],
        )

    def _in_one_pass(
        self, x: Tensor, do_gradient: bool, do_Hessian: bool, do_Laplacian: bool, forward_mode: bool | None = None
    ) -> Triple:
        """Compute the derivatives by :mod:`hessquik.calculus`, in the cheaper mode if none is given."""
        second = "hessian" if do_Hessian else "laplacian" if do_Laplacian else None
        quantities = {"value"} | ({"gradient"} if do_gradient else set()) | ({second} if second else set())
        forms = self.forms()
        if forward_mode is None:
            forward_mode = self._is_forward_cheaper(forms, second or "gradient")
        mode = calculus.Forward if forward_mode else calculus.Backward
        found = calculus.evaluate(forms, x, quantities, mode=mode)
        assert found.value is not None
        laplacian = None if found.laplacian is None else found.laplacian.unsqueeze(1)
        return found.value, found.gradient, laplacian if found.hessian is None else found.hessian

    def _check(self, x: Tensor) -> None:
        """Check shape and dtype of points."""
        if x.ndim != 2 or x.shape[1] != self.dim_input():
            raise ShapeError(f"points must have the shape (n, {self.dim_input()}), got {tuple(x.shape)}")
        dtype = next((parameter.dtype for parameter in self.parameters()), x.dtype)
        if x.dtype != dtype:
            raise ShapeError(f"points must be {dtype}, as the weights are, got {x.dtype}")


def _multiplications(form: Form) -> int:
    """Return how many multiplications by weights the value of a layer takes for a sample."""
    return sum(part.numel() for part in (*form.into, *form.skip, form.out) if isinstance(part, Tensor))


def _carry_back(
    chain: Sequence[Linearization],
    do_Hessian: bool,
    dgdf: Tensor | None,
    d2gd2f: Tensor | None,
    v: Tensor | None,
    return_input: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient and Hessian that :meth:`NN.backward` describes."""
    y = chain[-1].value[0]
    m = y.shape[-1] if dgdf is None else dgdf.shape[-2]
    rest = sum(part.shape[-1] for part in chain[-1].value) - m
    if rest and not (return_input and dgdf is None):
        keep = torch.eye(m + rest, m, dtype=y.dtype, device=y.device).unsqueeze(0)
        dgdf = keep if dgdf is None else keep @ dgdf
        d2gd2f = None if d2gd2f is None else nn.functional.pad(d2gd2f, (0, 0, 0, rest, 0, rest))
    for layer in reversed(chain):
        dgdf, d2gd2f = pull_back(layer, do_Hessian, dgdf, d2gd2f, v)
        v = None
    assert dgdf is not None
    return dgdf, d2gd2f
