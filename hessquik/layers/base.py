"""The documented interface of all layers, implemented in terms of a layer's form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hessquik.algebra import congruence
from hessquik.errors import OrderError, ShapeError
from hessquik.layers.form import Form, Linearization, join

__all__ = ["Triple", "check_directions", "hessQuikLayer", "pull_back", "uniform_"]

Triple = tuple[Tensor, Tensor | None, Tensor | None]


class hessQuikLayer(nn.Module):
    """Base class of all layers.

    A subclass defines :meth:`form` and the widths; evaluation and derivatives follow from them. Letters and shapes
    are those of :mod:`hessquik.layers.form`. In the interface below the layer's outputs are the last axis: gradients
    (n, d, q), Hessians (n, d, d, q).

    Examples:
        >>> from hessquik.activations import sinActivation
        >>> class waveLayer(hessQuikLayer):
        ...     def form(self):  # y = u + sin(2u)
        ...         return Form(sinActivation(), (3,), into=(2.0,), skip=(1.0,))
        ...
        ...     def input_widths(self):
        ...         return (3,)
        ...
        ...     output_widths = input_widths
        >>> y, gradient, hessian = waveLayer()(torch.zeros(5, 3), do_gradient=True, do_Hessian=True)
        >>> gradient[0].diagonal()
        tensor([3., 3., 3.])
    """

    #: Constructor arguments, by name: what a saved file needs to build the layer again.
    parameter_names: tuple[str, ...] = ()

    def form(self) -> Form:
        """Return the layer's form, with its current weights."""
        raise NotImplementedError(
            f"{type(self).__name__} must define form(), from which its value and derivatives follow"
        )

    def input_widths(self) -> tuple[int, ...]:
        """Return the widths of the parts of the input features."""
        raise NotImplementedError(f"{type(self).__name__} must define input_widths()")

    def output_widths(self) -> tuple[int, ...]:
        """Return the widths of the parts of the output features."""
        raise NotImplementedError(f"{type(self).__name__} must define output_widths()")

    def dim_input(self) -> int:
        """Return the number of input features."""
        return sum(self.input_widths())

    def dim_output(self) -> int:
        """Return the number of output features."""
        return sum(self.output_widths())

    def forward(
        self,
        u: Tensor,
        do_gradient: bool = False,
        do_Hessian: bool = False,
        do_Laplacian: bool = False,
        forward_mode: bool | None = True,
        dudx: Tensor | None = None,
        d2ud2x: Tensor | None = None,
        v: Tensor | None = None,
    ) -> Triple:
        """Evaluate the layer and, with ``forward_mode=True``, carry derivatives with respect to x through it.

        With dz = ∂z/∂x and the linearised output map of :meth:`Linearization.push`:
            ∇y  = push(∇u)
            ∇²y = push(∇²u) + (σ''(z) ⊙ dz_a ⊙ dz_b) Q          Δy = trace of ∇²y over the tangents
        Source: Newman & Ruthotto 2022 (doi:10.21105/joss.04171), "Forward Mode".

        Args:
            u: Features (n, p).
            do_gradient: Whether the gradient is wanted.
            do_Hessian: Whether the Hessian is wanted.
            do_Laplacian: Whether to return the Laplacian in place of the Hessian, always in forward mode; ignored
                with ``do_Hessian``.
            forward_mode: ``True`` carries derivatives forward; ``False`` calls :meth:`backward` at the end;
                ``None`` only keeps what a later :meth:`backward` needs.
            dudx: Gradient of u (n, d, p); that of u itself if not given.
            d2ud2x: Hessian of u (n, d, d, p), or its Laplacian (n, 1, p) when that is wanted; 0 if not given.
            v: Directions. Forward: (k, d) or (n, k, d), the k tangents replace the d unit ones.
                Backward: (q, k) or (n, q, k), derivatives of the k weighted sums replace those of each output.

        Returns:
            y (n, q), gradient (n, d, q) or ``None``, Hessian (n, d, d, q) or Laplacian (n, 1, q) or ``None``.

        Raises:
            ShapeError: the last axis of ``u`` is not :meth:`dim_input` wide, or ``v`` does not fit.
        """
        if u.shape[-1] != self.dim_input():
            raise ShapeError(f"{type(self).__name__} needs {self.dim_input()} features, got {u.shape[-1]}")
        if do_Laplacian and not do_Hessian:
            forward_mode = True
        wants_second = do_Hessian or do_Laplacian
        order = 2 if wants_second or forward_mode is None else int(do_gradient)
        here = self.form().linearize((u.unsqueeze(1),), order)
        y, n = join(here.value).squeeze(1), u.shape[0]
        if forward_mode is None:
            self._here = here
        if forward_mode is None or order == 0:
            return y, None, None
        if not forward_mode:
            gradient, hessian = pull_back(here, do_Hessian, None, None, v)
            return y, gradient if do_gradient else None, hessian

        tangents = _unit(u, self.dim_input()) if dudx is None else dudx
        check_directions(v, n, width=tangents.shape[1], axis=-1)
        dz, dy = here.push((tangents if v is None else v @ tangents,))
        carried = _per_sample(join(dy), n) if do_gradient else None
        if do_Hessian:
            k = dz.shape[1]
            products = (dz.unsqueeze(2) * dz.unsqueeze(1)).flatten(1, 2)
            d2y = _second(here, products, None if d2ud2x is None else d2ud2x.flatten(1, 2))
            return y, carried, _per_sample(d2y, n).unflatten(1, (k, k))
        if do_Laplacian:
            trace = _second(here, (dz * dz).sum(1, keepdim=True), d2ud2x)
            return y, carried, _per_sample(trace, n)
        return y, carried, None

    def backward(
        self,
        do_Hessian: bool = False,
        dgdf: Tensor | None = None,
        d2gd2f: Tensor | None = None,
        v: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Carry the derivatives of g(y) back through the layer, after ``forward(u, forward_mode=None)``.

        It may be called repeatedly; copies and pickles of the layer do not contain the state of that call.

        With D = ∂y/∂u (p, q), Z = ∂z/∂u (p, w) and gs the adjoint of σ(z):
            ∇_u g  = pull(∇_y g)
            ∇²_u g = D ∇²_y g Dᵀ + Z diag(gs ⊙ σ''(z)) Zᵀ
        Source: Newman & Ruthotto 2022 (doi:10.21105/joss.04171), "Backward Mode".

        Args:
            do_Hessian: Whether the Hessian is wanted.
            dgdf: Gradient of g with respect to y (n, q, m); g = y if not given.
            d2gd2f: Hessian of g with respect to y (n, q, q, m); 0 if not given.
            v: Weights (m, k) or (n, m, k): derivatives of the k sums gv replace those of each g.

        Returns:
            Gradient (n, p, m) and Hessian (n, p, p, m) or ``None``, with k in place of m if ``v`` is given.

        Raises:
            OrderError: there was no such forward call.
            ShapeError: ``v`` does not fit.
        """
        here = self.__dict__.get("_here")
        if here is None:
            raise OrderError(f"{type(self).__name__}.backward() needs a forward(u, forward_mode=None) before it")
        return pull_back(here, do_Hessian, dgdf, d2gd2f, v)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what :meth:`backward` needs."""
        return {name: value for name, value in vars(self).items() if name != "_here"}

    def extra_repr(self) -> str:
        """Show the constructor arguments that are plain numbers."""
        shown = ((name, getattr(self, name)) for name in self.parameter_names)
        return ", ".join(f"{name}={value}" for name, value in shown if not isinstance(value, nn.Module))


def _second(here: Linearization, products: Tensor, d2u: Tensor | None) -> Tensor:
    """Return second derivatives of y (n, k, q) for the wanted products of tangents and the same ones of u."""
    if d2u is None:
        d2u = products.new_zeros(1, products.shape[1], sum(here.form.widths))
    return join(here.push_second((d2u,), products))


def check_directions(v: Tensor | None, n: int, width: int, axis: int) -> None:
    """Check the shape of directions (k, width) or weights (width, k), shared or one set per sample.

    Raises:
        ShapeError: ``v`` has another shape.
    """
    if v is None or (v.ndim in {2, 3} and v.shape[axis] == width and (v.ndim == 2 or v.shape[0] == n)):
        return
    one = f"k, {width}" if axis == -1 else f"{width}, k"
    raise ShapeError(f"v must have the shape ({one}) or ({n}, {one}), got {tuple(v.shape)}")


def pull_back(
    here: Linearization, do_Hessian: bool, dgdf: Tensor | None, d2gd2f: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient and Hessian that :meth:`hessQuikLayer.backward` describes."""
    y = join(here.value)
    n = y.shape[0]
    gy = _unit(y, y.shape[-1]) if dgdf is None else dgdf.mT
    check_directions(v, n, width=gy.shape[1], axis=-2)
    gy = gy if v is None else v.mT @ gy
    gs, gu = here.pull((gy,))
    gradient = _per_sample(join(gu), n).mT
    if not do_Hessian:
        return gradient, None
    assert here.d2sigma is not None
    dz, dy = here.push((_unit(y, sum(here.form.widths)),))
    hessian = congruence(_per_sample(dz, n), _per_sample(gs * here.d2sigma, n))
    if d2gd2f is not None:
        d2g = d2gd2f if v is None else d2gd2f @ v.unsqueeze(-3)
        jacobian = _per_sample(join(dy), n)
        hessian = hessian + torch.einsum("npq,nqrm,nsr->npsm", jacobian, d2g, jacobian)
    return gradient, hessian


def _unit(like: Tensor, width: int) -> Tensor:
    """Return the unit tangents or adjoints of ``width`` features, the same for every sample: (1, width, width)."""
    return torch.eye(width, dtype=like.dtype, device=like.device).unsqueeze(0)


def _per_sample(tensor: Tensor, n: int) -> Tensor:
    """Return a tensor with its leading axis expanded to n."""
    return tensor.expand(n, *tensor.shape[1:])


def uniform_(tensor: Tensor | None, fan_in: int) -> None:
    """Fill a parameter, if there is one, from U(−1/√fan_in, 1/√fan_in); one without memory is left as it is."""
    if tensor is not None and not tensor.is_meta:
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(tensor, -bound, bound)
