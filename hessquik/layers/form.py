"""The form that all layers share, and its linearisation at a batch of points.

    z = Σᵢ uᵢ Pᵢ + b              an affine map into w hidden units
    y = Σᵢ uᵢ Sᵢ + σ(z) Q + μ     a skip and a linear map out

Features are a tuple of parts: ``(u,)`` for most layers; ``(u, x)`` between the layers of a convex network, which pass
on the input ``x`` of its first layer. Tangents and adjoints have the same parts.

Letters: n samples, p features into and q features out of a layer, w hidden units, k tangents, m adjoints.
Shapes: features (n, 1, p) · tangents (n, k, p) · adjoints (n, m, q); a leading axis of 1 stands for "the same
for every sample" and is not expanded before it has to be.

A layer is data (:class:`Form`), its linearisation is a value (:class:`Linearization`); nothing is stored on
a module, so any number of threads may evaluate one network. Arrays are tensors, or the traced arrays of
:mod:`hessquik.trace`.

Source: E. Newman and L. Ruthotto, hessQuik (2022), doi:10.21105/joss.04171, for the layers and their
derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessquik.activations import hessQuikActivationFunction
from hessquik.algebra import leading_shape
from hessquik.errors import ShapeError

__all__ = ["Form", "Linearization", "Map", "Parts", "join", "repartition"]

#: A linear map on row vectors: a matrix, a multiple of the identity, or ``None`` for zero.
Map = Tensor | float | None
#: Features, tangents or adjoints, one array per part.
Parts = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """A layer as data: z = Σᵢ uᵢ Pᵢ + b, y = Σᵢ uᵢ Sᵢ + σ(z) Q + μ.

    Attributes:
        activation: σ, the same for all hidden units.
        widths: Widths pᵢ of the input parts.
        into: Pᵢ, one per part, (pᵢ, w).
        bias: b (w,).
        skip: Sᵢ, one per part, (pᵢ, q); zero if not given.
        out: Q (w, q).
        offset: μ (q,).
        carries: Whether the last input part is also the last output part, after y.

    Raises:
        ShapeError: the maps do not fit each other.

    Examples:
        >>> from hessquik.layers import resnetLayer
        >>> form = resnetLayer(4, h=0.5).form()
        >>> form.skip, form.out
        ((1.0,), 0.5)
        >>> form.linearize((torch.zeros(5, 1, 4),), order=2).value[0].shape
        torch.Size([5, 1, 4])
    """

    activation: hessQuikActivationFunction
    widths: tuple[int, ...]
    into: tuple[Map, ...]
    bias: Tensor | None = None
    skip: tuple[Map, ...] = ()
    out: Map = 1.0
    offset: Tensor | None = None
    carries: bool = False

    def __post_init__(self) -> None:
        """Check that the maps fit."""
        if not self.skip:
            object.__setattr__(self, "skip", (None,) * len(self.widths))
        for name, maps in (("into", self.into), ("skip", self.skip)):
            if len(maps) != len(self.widths):
                raise ShapeError(f"{name} must have one map per part, {len(self.widths)}, got {len(maps)}")
            for width, linear in zip(self.widths, maps, strict=True):
                if isinstance(linear, Tensor) and (linear.ndim != 2 or linear.shape[0] != width):
                    raise ShapeError(f"{name} must map {width} features, got a matrix {tuple(linear.shape)}")
        if all(linear is None for linear in self.into):
            raise ShapeError("into must have at least one map that is not None")
        if self.out is None:
            raise ShapeError("out must be a matrix or a number, got None")
        hidden = {_columns(linear, width) for linear, width in zip(self.into, self.widths, strict=True)} - {None}
        out_rows = self.out.shape[0] if isinstance(self.out, Tensor) else None
        if len(hidden | ({out_rows} - {None})) > 1:
            raise ShapeError(f"into and out must agree on the hidden units, got into {hidden} and out {out_rows}")

    @property
    def hidden(self) -> int:
        """Number w of hidden units."""
        columns = (_columns(linear, width) for linear, width in zip(self.into, self.widths, strict=True))
        return next(width for width in columns if width is not None)

    def linearize(self, features: Parts, order: int) -> Linearization:
        """Evaluate the layer at ``features``, with σ' and σ'' as derivatives up to ``order`` (0, 1, 2) need."""
        features = repartition(features, self.widths)
        z = _sum(*map(_times, features, self.into), self.bias)
        sigma, slope, d2sigma = self.activation.jet(z, order)
        y = _sum(*map(_times, features, self.skip), _times(sigma, self.out), self.offset)
        carried = features[-1:] if self.carries else ()
        return Linearization(
            self, (y, *carried), 1.0 if slope is None else slope, 0.0 if d2sigma is None else d2sigma
        )


@dataclass(frozen=True, slots=True)
class Linearization:
    """The linearisation of a layer at a batch of points, which propagates tangents forward and adjoints backward.

    Attributes:
        form: The layer.
        value: The output features, parts of (n, 1, q).
        slope: σ'(z) (n, 1, w); 1 if no derivatives are needed.
        d2sigma: σ''(z) (n, 1, w); 0 if no second derivatives are needed.

    Examples:
        >>> from hessquik.layers import singleLayer
        >>> here = singleLayer(4, 7).form().linearize((torch.zeros(5, 1, 4),), order=2)
        >>> dz, (dy,) = here.push((torch.eye(4).unsqueeze(0),))
        >>> gs, (gu,) = here.pull((torch.eye(7).unsqueeze(0),))
        >>> torch.equal(dy, gu.mT)  # forward and backward give the same gradient
        True
    """

    form: Form
    value: Parts
    slope: Tensor | float
    d2sigma: Tensor | float

    def push(self, du: Parts) -> tuple[Tensor, Parts]:
        """Carry k tangents forward: dz = Σᵢ duᵢ Pᵢ and dy = Σᵢ duᵢ Sᵢ + (σ'(z) ⊙ dz) Q.

        Args:
            du: Tangents of the input features, parts of (n, k, p).

        Returns:
            dz (n, k, w) and the tangents of the output features, parts of (n, k, q).
        """
        du = repartition(du, self.form.widths)
        dz = _sum(*map(_times, du, self.form.into))
        dy = _sum(*map(_times, du, self.form.skip), _times(dz * self.slope, self.form.out))
        return dz, (dy, *(du[-1:] if self.form.carries else ()))

    def push_second(self, d2u: Parts, products: Tensor) -> Parts:
        """Carry second derivatives forward: d²y = Σᵢ d²uᵢ Sᵢ + (σ'(z) ⊙ Σᵢ d²uᵢ Pᵢ + σ''(z) ⊙ products) Q.

        Args:
            d2u: Second derivatives of the input features, parts of (n, k, p).
            products: dz_a ⊙ dz_b (n, k, w) of the pairs of tangents, or of sums of pairs, that ``d2u`` belongs to.

        Returns:
            The second derivatives of the output features, parts of (n, k, q).
        """
        d2u = repartition(d2u, self.form.widths)
        d2z = _sum(*map(_times, d2u, self.form.into))
        d2s = d2z * self.slope + products * self.d2sigma
        d2y = _sum(*map(_times, d2u, self.form.skip), _times(d2s, self.form.out))
        return d2y, *(d2u[-1:] if self.form.carries else ())

    def pull(self, gy: Parts, extra: Tensor | None = None) -> tuple[Tensor, Parts]:
        """Carry m adjoints back: gs = gy Qᵀ and guᵢ = gy Sᵢᵀ + (σ'(z) ⊙ gs + extra) Pᵢᵀ.

        Args:
            gy: Adjoints of the output features, parts of (n, m, q).
            extra: Adjoints (n, m, w) that are added to those of z.

        Returns:
            gs (n, m, w), the adjoint of σ(z), and the adjoints of the input features, parts of (n, m, p).
        """
        gy = repartition(gy, tuple(part.shape[-1] for part in self.value))
        gs = _sum(_times(gy[0], _transposed(self.form.out)))
        gz = _sum(gs * self.slope, extra)
        zeros = [gs.new_zeros(1, gs.shape[-2], width) for width in self.form.widths]
        gu = [
            _sum(_times(gy[0], _transposed(skip)), _times(gz, _transposed(into)), zero)
            for skip, into, zero in zip(self.form.skip, self.form.into, zeros, strict=True)
        ]
        if self.form.carries:
            gu[-1] = gu[-1] + gy[-1]
        return gs, tuple(gu)


def join(parts: Parts) -> Tensor:
    """Concatenate the parts along the last axis.

    Examples:
        >>> join((torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))).shape
        torch.Size([5, 2, 7])
    """
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        leading = leading_shape(*parts)
        parts = tuple(part.expand(*leading, -1) for part in parts)
    return torch.cat(parts, dim=-1)


def repartition(parts: Parts, widths: tuple[int, ...]) -> Parts:
    """Split the same columns into parts of other ``widths``, which have the same sum.

    Examples:
        >>> [part.shape[-1] for part in repartition((torch.zeros(5, 1, 3), torch.zeros(5, 1, 4)), (1, 6))]
        [1, 6]
    """
    if tuple(part.shape[-1] for part in parts) == widths:
        return parts
    return tuple(torch.split(join(parts), list(widths), dim=-1))


def _columns(linear: Map, width: int) -> int | None:
    """Return how many columns a map has; ``None`` for zero."""
    if linear is None:
        return None
    return linear.shape[1] if isinstance(linear, Tensor) else width


def _times(u: Tensor, linear: Map) -> Tensor | None:
    """Return the product u M, ``None`` where M is zero."""
    if linear is None:
        return None
    if isinstance(linear, Tensor):
        return u @ linear
    return u if linear == 1.0 else u * linear


def _transposed(linear: Map) -> Map:
    """Return Mᵀ."""
    return linear.T if isinstance(linear, Tensor) else linear


def _sum(*terms: Tensor | None) -> Tensor:
    """Return the sum of the terms that are not ``None``, of which there is at least one."""
    present = [term for term in terms if term is not None]
    total = present[0]
    for term in present[1:]:
        total = total + term
    return total
