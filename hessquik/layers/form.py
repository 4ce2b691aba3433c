"""The one form that every layer has, and its linearisation at a batch of points.

    z = Σᵢ uᵢ Pᵢ + b              an affine map into w hidden units
    y = Σᵢ uᵢ Sᵢ + σ(z) Q + μ     a skip and a linear map out

Features are a tuple of parts: ``(u,)`` for most layers; ``(u, x)`` between the layers of a convex network,
which carry along the input ``x`` of its first layer. Tangents and adjoints have the same parts.

Letters: n samples, p features into and q features out of a layer, w hidden units, k tangents, m adjoints.
Shapes: features (n, p) · tangents (n, k, p) · adjoints (n, m, q); a leading axis of 1 stands for "the same
for every sample" and is not expanded before it has to be.

A layer is data (:class:`Form`), its linearisation is a value (:class:`Linearization`); nothing is stored on
a module, so any number of threads may evaluate one network.

Source: E. Newman and L. Ruthotto, hessQuik (2022), doi:10.21105/joss.04171, for the layers and their
derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessquik.activations import hessQuikActivationFunction

__all__ = ["Form", "Linearization", "Map", "Parts", "congruence", "join", "regroup"]

#: A linear map on row vectors: a matrix, a multiple of the identity, or ``None`` for zero.
Map = Tensor | float | None
#: Features, tangents or adjoints, one tensor per part.
Parts = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """A layer as data: z = Σᵢ uᵢ Pᵢ + b, y = Σᵢ uᵢ Sᵢ + σ(z) Q + μ.

    Attributes:
        activation: σ.
        widths: Widths pᵢ of the parts that come in.
        into: Pᵢ, one per part, (pᵢ, w).
        bias: b (w,).
        skip: Sᵢ, one per part, (pᵢ, q).
        out: Q (w, q).
        offset: μ (q,).
        carries: Whether the last part that comes in also goes out, behind y.

    Example:
        >>> from hessquik.layers import resnetLayer
        >>> form = resnetLayer(4, h=0.5).form()
        >>> form.skip, form.out
        ((1.0,), 0.5)
        >>> form.linearize((torch.zeros(5, 4),), order=2).value[0].shape
        torch.Size([5, 4])
    """

    activation: hessQuikActivationFunction
    widths: tuple[int, ...]
    into: tuple[Map, ...]
    bias: Tensor | None = None
    skip: tuple[Map, ...] = (None,)
    out: Map = 1.0
    offset: Tensor | None = None
    carries: bool = False

    def linearize(self, features: Parts, order: int) -> Linearization:
        """Evaluate the layer at ``features`` and keep what derivatives up to ``order`` (0, 1, 2) need."""
        features = regroup(features, self.widths)
        z = _sum(*map(_times, features, self.into), self.bias)
        sigma, slope, curvature = (z, None, None) if self.activation.is_linear else self.activation.jet(z, order)
        y = _sum(*map(_times, features, self.skip), _times(sigma, self.out), self.offset)
        carried = features[-1:] if self.carries else ()
        return Linearization(self, (y, *carried), slope, curvature)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Form:
        """The same layer with its tensors copied, detached, to ``device`` and ``dtype``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        def move_map(linear: Map) -> Map:
            return move(linear) if isinstance(linear, Tensor) else linear

        return replace(
            self,
            into=tuple(map(move_map, self.into)),
            bias=None if self.bias is None else move(self.bias),
            skip=tuple(map(move_map, self.skip)),
            out=move_map(self.out),
            offset=None if self.offset is None else move(self.offset),
        )


@dataclass(frozen=True, slots=True)
class Linearization:
    """A layer at a batch of points: what carries tangents forward and adjoints back through it.

    Attributes:
        form: The layer.
        value: The features that go out, parts of (n, q).
        slope: σ'(z) (n, w); ``None`` stands for 1.
        curvature: σ''(z) (n, w); ``None`` stands for 0.

    Example:
        >>> from hessquik.layers import singleLayer
        >>> here = singleLayer(4, 7).form().linearize((torch.zeros(5, 4),), order=2)
        >>> dz, (dy,) = here.push((torch.eye(4).unsqueeze(0),))
        >>> gs, (gu,) = here.pull((torch.eye(7).unsqueeze(0),))
        >>> torch.equal(dy, gu.mT)  # forward and backward give the same gradient
        True
    """

    form: Form
    value: Parts
    slope: Tensor | None
    curvature: Tensor | None

    def push(self, du: Parts) -> tuple[Tensor, Parts]:
        """Carry k tangents forward: dz = Σᵢ duᵢ Pᵢ and dy = Σᵢ duᵢ Sᵢ + (σ'(z) ⊙ dz) Q.

        Args:
            du: Tangents of the features that come in, parts of (n, k, p).

        Returns:
            dz (n, k, w) and the tangents of the features that go out, parts of (n, k, q).
        """
        du = regroup(du, self.form.widths)
        dz = _sum(*map(_times, du, self.form.into))
        dy = _sum(*map(_times, du, self.form.skip), _times(_scale(dz, self.slope), self.form.out))
        return dz, (dy, *(du[-1:] if self.form.carries else ()))

    def pull(self, gy: Parts, gz_extra: Tensor | None = None) -> tuple[Tensor, Parts]:
        """Carry m adjoints back: gs = gy Qᵀ and guᵢ = gy Sᵢᵀ + (σ'(z) ⊙ gs + gz_extra) Pᵢᵀ.

        Args:
            gy: Adjoints of the features that went out, parts of (n, m, q).
            gz_extra: Adjoints (n, m, w) that enter at z itself.

        Returns:
            gs (n, m, w), the adjoint of σ(z), and the adjoints of the features that came in, parts of (n, m, p).
        """
        gy = regroup(gy, tuple(part.shape[-1] for part in self.value))
        gs = _sum(_transposed(gy[0], self.form.out))
        gz = _sum(_scale(gs, self.slope), gz_extra)
        gu = [
            _sum(_transposed(gy[0], skip), _transposed(gz, into))
            for skip, into in zip(self.form.skip, self.form.into, strict=True)
        ]
        if self.form.carries:
            gu[-1] = gu[-1] + gy[-1]
        return gs, tuple(gu)

    def bend(self, products: Tensor) -> Parts:
        """What the curvature of σ adds to second derivatives of y: (σ''(z) ⊙ products) Q.

        Args:
            products: dz_a ⊙ dz_b of the wanted pairs or sums of pairs of tangents, (n, k, w).

        Returns:
            Parts of (n, k, q), zero where features are only carried along.
        """
        zeros = [
            part.new_zeros(1, products.shape[1], part.shape[-1])
            for part in (self.value if self.curvature is None else self.value[1:])
        ]
        if self.curvature is None:
            return tuple(zeros)
        return _sum(_times(_scale(products, self.curvature), self.form.out)), *zeros


def congruence(tangents: Tensor, weights: Tensor) -> Tensor:
    """The matrices Σ_w tangents[a, w] weights[k, w] tangents[b, w] of every sample, as one batched GEMM.

    Args:
        tangents: (n, d, w).
        weights: (n, k, w).

    Returns:
        (n, d, d, k), in memory as written.

    Example:
        >>> congruence(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.ones(1, 1, 2)).squeeze()
        tensor([[5., 2.],
                [2., 1.]])
    """
    d, k = tangents.shape[1], weights.shape[1]
    weighted = (tangents.unsqueeze(2) * weights.unsqueeze(1)).flatten(1, 2)
    hessian: Tensor = (tangents @ weighted.mT).unflatten(2, (d, k))
    return hessian


def join(parts: Parts) -> Tensor:
    """The parts side by side along the last axis.

    Example:
        >>> join((torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))).shape
        torch.Size([5, 2, 7])
    """
    if len(parts) == 1:
        return parts[0]
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*leading, -1) for part in parts], dim=-1)


def regroup(parts: Parts, widths: tuple[int, ...]) -> Parts:
    """Cut the same columns at other places: into parts of ``widths``, which have the same sum.

    Example:
        >>> [part.shape[1] for part in regroup((torch.zeros(5, 3), torch.zeros(5, 4)), (1, 6))]
        [1, 6]
    """
    if tuple(part.shape[-1] for part in parts) == widths:
        return parts
    pieces: Parts = torch.split(join(parts), list(widths), dim=-1)
    return pieces


def _times(u: Tensor, linear: Map) -> Tensor | None:
    """The product u M, ``None`` where M is zero."""
    if linear is None:
        return None
    if isinstance(linear, Tensor):
        return u @ linear
    return u if linear == 1.0 else u * linear


def _transposed(g: Tensor, linear: Map) -> Tensor | None:
    """The product g Mᵀ, ``None`` where M is zero."""
    return _times(g, linear.T if isinstance(linear, Tensor) else linear)


def _scale(tangents: Tensor, slope: Tensor | None) -> Tensor:
    """Each of the k tangents (n, k, w) times the slope (n, w)."""
    return tangents if slope is None else tangents * slope.unsqueeze(1)


def _sum(*terms: Tensor | None) -> Tensor:
    """The sum of the terms that are not zero, of which there is at least one."""
    first, *rest = (term for term in terms if term is not None)
    for term in rest:
        first = first + term
    return first
