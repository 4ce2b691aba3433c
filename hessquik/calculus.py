"""Formulas of the values and derivatives of a chain of layers.

Every layer is linearised at the output of the one before it; tangents are propagated forward and adjoints backward.
With dz = ∂z/∂x, gs the adjoint of σ(z) and c = gs ⊙ σ''(z), every quantity is a sum over hidden units:

    gradient           the adjoint of x
    Hessian            Σ dzᵀ diag(c) dz                      a sum of congruences; packed, its lower triangle
    Laplacian          Σ c · ‖dz‖²                           column norms, no Hessian
    Hessian diagonal   Σ c · dz²
    Jv                 v · gradient
    Hv                 the adjoint of x, with c ⊙ (dz v) entering at every z
    vᵀHv               Σ c · (dz v)²

:class:`Backward` computes them so. :class:`Forward` carries second derivatives of pairs of tangents along instead,
which takes fewer operations when there are many outputs and few inputs. Where x enters the network through fewer than
d columns, [K₁ K₂ …] = QR, tangents may start from the rows of Qᵀ instead of the unit vectors: f(x) = g(xQ), so
∇²f = Q ∇²g Qᵀ and Δf = Δg.

Both run on tensors, as the reference, and on the traced arrays of :mod:`hessquik.trace`, which record the graph of a
plan.

Letters: n samples, d inputs, m outputs (1 if weighted), k directions, w hidden units. Shapes: (n, k, w); a leading
axis of 1 stands for all samples.

Sources: E. Newman and L. Ruthotto, hessQuik (2022), doi:10.21105/joss.04171, for the layers' derivatives;
R. M. Gower and M. P. Mello, arXiv:1309.5479, for Hessians as sums over nonlinear sites.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from hessquik.algebra import congruence, pack, pairs, unpack
from hessquik.errors import ShapeError
from hessquik.layers.form import Form, Linearization, Parts, join
from hessquik.quantities import QUANTITIES, SPREADS, highest_order

__all__ = [
    "Backward",
    "Derivatives",
    "Forward",
    "Question",
    "Unavailable",
    "compute",
    "evaluate",
    "linearize",
]


class Unavailable(Exception):
    """The mode cannot compute a quantity."""


@dataclass(frozen=True, slots=True)
class Question:
    """The arguments of an evaluation.

    Attributes:
        x: Points (n, 1, d).
        quantities: Names of the quantities.
        weights: λ (n or 1, 1, m): derivatives of Σⱼ λⱼ fⱼ instead of every fⱼ; m becomes 1.
        directions: Directions v (n or 1, k, d).
        basis: Q (d, r), if tangents start from the rows of Qᵀ.
    """

    x: Tensor
    quantities: Collection[str]
    weights: Tensor | None = None
    directions: Tensor | None = None
    basis: Tensor | None = None

    @property
    def order(self) -> int:
        """Return the order of the highest derivative."""
        return highest_order(self.quantities)

    def start(self) -> Tensor:
        """Return the initial tangents: the unit vectors (1, d, d), or the rows of Qᵀ (1, r, d) with a basis."""
        if self.basis is None:
            return _unit(self.x, self.x.shape[-1])
        start = self.basis.mT.unsqueeze(0)
        return start if isinstance(self.x, Tensor) else self.x.constant(start)

    def along(self) -> Tensor:
        """Return the directions."""
        if self.directions is None:
            asked = ", ".join(name for name in self.quantities if QUANTITIES[name].is_directional)
            raise ShapeError(f"{asked} expect directions of shape (k, d) or (n, k, d), got none")
        return self.directions


class Backward:
    """Computation of the quantities by adjoints.

    Args:
        forms: The layers.
        question: The arguments of the evaluation.
    """

    def __init__(self, forms: Sequence[Form], question: Question) -> None:
        """Linearise the layers."""
        self._question = question
        self._chain = linearize(forms, (question.x,), question.order)
        self._y, *carried = self._chain[-1].value
        self._carried = tuple(carried)

    @property
    def value(self) -> Tensor:
        """The value f (n, 1, m)."""
        weights = self._question.weights
        return self._y if weights is None else self._y @ weights.mT

    @property
    def gradient(self) -> Tensor:
        """The gradient ∂f/∂x (n, d, m)."""
        return self._adjoints[1].mT

    @property
    def jvp(self) -> Tensor:
        """Derivatives along the directions, ∇f·v (n, k, m)."""
        return self._question.along() @ self.gradient

    @property
    def hessian(self) -> Tensor:
        """The Hessian ∂²f/∂x² (n, d, d, m): Σ dzᵀ diag(c) dz."""
        basis, middle = self._question.basis, self._middle
        if basis is None:
            return middle
        half = basis @ middle  # Σ_t Q[b, t] M[s, t, m], (n, r, d, m)
        hessian: Tensor = (basis @ half.flatten(-2)).unflatten(-1, tuple(half.shape[-2:]))
        return hessian

    @property
    def hessian_packed(self) -> Tensor:
        """The lower triangle of the Hessian, row by row (n, d(d+1)/2, m)."""
        return pack(self.hessian)

    @property
    def laplacian(self) -> Tensor:
        """The Laplacian Δf (n, 1, m): Σ c · ‖dz‖²."""
        return _total((dz * dz).sum(-2, keepdim=True) @ c.mT for dz, c in zip(self._units, self._c, strict=True))

    @property
    def hessian_diagonal(self) -> Tensor:
        """The Hessian's diagonal ∂²f/∂x_a² (n, d, m): Σ c · dz²."""
        basis = self._question.basis
        if basis is None:
            return _total((dz * dz) @ c.mT for dz, c in zip(self._units, self._c, strict=True))
        half = basis @ self._middle
        sums = (half * basis.mT.unsqueeze(-1)).flatten(-2).sum(-2, keepdim=True)
        diagonal: Tensor = sums.unflatten(-1, tuple(half.shape[-2:])).flatten(-3, -2)
        return diagonal

    @property
    def curvature(self) -> Tensor:
        """Second derivatives vᵀHv (n, k, m): Σ c · (dz v)²."""
        return _total((dz * dz) @ c.mT for dz, c in zip(self._along, self._c, strict=True))

    @property
    def hvp(self) -> Tensor:
        """Products Hv (n, k, d, m): adjoints of x that begin with c ⊙ (dz v) at every z."""
        k, m = self._question.along().shape[-2], self._unit.shape[-2]
        extra = [
            (dz.unsqueeze(-2) * c.unsqueeze(-3)).flatten(-3, -2) for dz, c in zip(self._along, self._c, strict=True)
        ]
        _, gx = self._pull(self._y.new_zeros(1, k * m, self._y.shape[-1]), extra)
        products: Tensor = gx.unflatten(-2, (k, m)).mT
        return products

    @cached_property
    def _units(self) -> list[Tensor]:
        """Return the tangents dz of every layer's hidden units for the initial tangents."""
        return self._push(self._question.start())

    @cached_property
    def _along(self) -> list[Tensor]:
        """Return the tangents dz v of every layer's hidden units for the directions."""
        return self._push(self._question.along())

    def _push(self, tangents: Tensor) -> list[Tensor]:
        """Propagate tangents through the layers and return those at every z."""
        du: Parts = (tangents,)
        dz: list[Tensor] = []
        for here in self._chain:
            at_z, du = here.push(du)
            dz.append(at_z)
        return dz

    @property
    def _unit(self) -> Tensor:
        """Return the initial adjoints of the output: unit vectors, or the weights λ."""
        return _unit(self._y, self._y.shape[-1]) if self._question.weights is None else self._question.weights

    @cached_property
    def _adjoints(self) -> tuple[list[Tensor], Tensor]:
        """The weights c of every layer's hidden units, and the adjoint of x."""
        return self._pull(self._unit, [None] * len(self._chain))

    @property
    def _c(self) -> list[Tensor]:
        """The weights c = gs ⊙ σ''(z) of every layer's hidden units (n, m, w)."""
        return self._adjoints[0]

    @cached_property
    def _middle(self) -> Tensor:
        """Return the Hessian with respect to the coordinates of the initial tangents."""
        return _total(congruence(dz, c) for dz, c in zip(self._units, self._c, strict=True))

    def _pull(self, gy: Tensor, extra: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        """Pull adjoints of y back to x.

        Args:
            gy: Adjoints of the output y.
            extra: Adjoints that are added at every z.

        Returns:
            c = gs ⊙ σ''(z) of every layer, and the adjoints of x.
        """
        adjoints: Parts = (gy, *(part.new_zeros(1, gy.shape[-2], part.shape[-1]) for part in self._carried))
        c: list[Tensor] = []
        for here, entering in zip(reversed(self._chain), reversed(extra), strict=True):
            gs, adjoints = here.pull(adjoints, entering)
            if entering is None:
                c.insert(0, gs * here.d2sigma)
        return c, join(adjoints)


class Forward:
    """Computation of the quantities by tangents and second derivatives, propagated forward.

    Args:
        forms: The layers.
        question: The arguments of the evaluation.

    Raises:
        Unavailable: there are weights and a quantity over all axes, or the quantities need as tangents both all axes
            and the given directions.
    """

    def __init__(self, forms: Sequence[Form], question: Question) -> None:
        """Propagate tangents and second derivatives through all layers."""
        self._question = question
        asked = [QUANTITIES[name] for name in question.quantities if QUANTITIES[name].order]
        self._is_along = bool(asked) and all(quantity.is_directional for quantity in asked)
        if not self._is_along and (question.weights is not None or any(q.is_directional for q in asked)):
            raise Unavailable("all axes and given directions, or weights, at once")
        du: Parts = (question.along() if self._is_along else question.start(),)
        self._products = self._choose_products()
        first = self._products(du[0])
        d2u: Parts = (first.new_zeros(1, first.shape[-2], question.x.shape[-1]),)
        features: Parts = (question.x,)
        for form in forms:
            here = form.linearize(features, question.order)
            features = here.value
            if question.order == 2:
                dz, du_out = here.push(du)
                d2u = here.push_second(d2u, self._products(dz))
                du = du_out
            elif question.order == 1:
                _, du = here.push(du)
        self._y, self._dy, self._d2y = features[0], du[0], d2u[0]

    def _choose_products(self) -> Any:
        """Return which pairs of tangents have second derivatives: all, each with itself, or the sum of those."""
        asked = {name for name in self._question.quantities if QUANTITIES[name].order == 2}
        if asked <= {"laplacian"}:
            return lambda dz: (dz * dz).sum(-2, keepdim=True)
        if self._is_along or (asked <= {"laplacian", "hessian_diagonal"} and self._question.basis is None):
            return lambda dz: dz * dz
        return pairs

    @property
    def value(self) -> Tensor:
        """The value f (n, 1, m)."""
        return self._weighted(self._y)

    @property
    def gradient(self) -> Tensor:
        """The gradient ∂f/∂x (n, d, m)."""
        self._expect(is_along=False)
        basis = self._question.basis
        return self._dy if basis is None else basis @ self._dy

    @property
    def jvp(self) -> Tensor:
        """Derivatives along the directions, ∇f·v (n, k, m)."""
        self._expect(is_along=True)
        return self._weighted(self._dy)

    @property
    def hessian(self) -> Tensor:
        """The Hessian ∂²f/∂x² (n, d, d, m)."""
        self._expect(is_along=False)
        basis, middle = self._question.basis, unpack(self._d2y)
        if basis is None:
            return middle
        half = basis @ middle
        hessian: Tensor = (basis @ half.flatten(-2)).unflatten(-1, tuple(half.shape[-2:]))
        return hessian

    @property
    def hessian_packed(self) -> Tensor:
        """The lower triangle of the Hessian, row by row (n, d(d+1)/2, m)."""
        self._expect(is_along=False)
        return self._d2y if self._question.basis is None else pack(self.hessian)

    @property
    def laplacian(self) -> Tensor:
        """The Laplacian Δf (n, 1, m)."""
        self._expect(is_along=False)
        if self._products is pairs:
            return torch.diagonal(unpack(self._d2y), dim1=-3, dim2=-2).mT.sum(-2, keepdim=True)
        return self._d2y.sum(-2, keepdim=True)

    @property
    def hessian_diagonal(self) -> Tensor:
        """The Hessian's diagonal ∂²f/∂x_a² (n, d, m)."""
        self._expect(is_along=False)
        if self._question.basis is not None or self._products is pairs:
            return torch.diagonal(self.hessian, dim1=-3, dim2=-2).mT
        return self._d2y

    @property
    def curvature(self) -> Tensor:
        """Second derivatives vᵀHv (n, k, m)."""
        self._expect(is_along=True)
        return self._weighted(self._d2y)

    @property
    def hvp(self) -> Tensor:
        """Raise :class:`Unavailable`: this mode cannot compute Hessian-vector products."""
        raise Unavailable("hvp by tangents alone")

    def _expect(self, *, is_along: bool) -> None:
        """Check that the tangents are of the kind that a formula needs: the directions, or all axes."""
        if self._is_along != is_along:
            raise Unavailable("derivatives along all axes from those along given directions, or the reverse")

    def _weighted(self, y: Tensor) -> Tensor:
        """Return the weighted sums of an array with m columns; without weights the array itself."""
        weights = self._question.weights
        return y if weights is None else y @ weights.mT


def linearize(forms: Sequence[Form], features: Parts, order: int) -> list[Linearization]:
    """Linearise each layer of a chain at the output of the one before it."""
    chain: list[Linearization] = []
    for form in forms:
        chain.append(form.linearize(features, order))
        features = chain[-1].value
    return chain


def compute(mode: type[Backward] | type[Forward], forms: Sequence[Form], question: Question) -> dict[str, Tensor]:
    """Compute the requested quantities, each with a leading axis n; values have shape (n, 1, m).

    Raises:
        Unavailable: the mode cannot compute one of them.
    """
    at = mode(forms, question)
    return {name: QUANTITIES[name].formula(at) for name in question.quantities}


class Derivatives:
    """The requested quantities, as attributes; a quantity that was not requested is ``None``.

    Shapes: value (n, m), gradient (n, d, m), hessian (n, d, d, m), laplacian (n, m), hessian_diagonal (n, d, m), jvp
    (n, k, m), hvp (n, k, d, m), curvature (n, k, m), hessian_packed (n, d(d+1)/2, m), and what else
    :data:`hessquik.quantities.QUANTITIES` and :data:`hessquik.quantities.SPREADS` have.

    Examples:
        >>> found = Derivatives(value=torch.zeros(5, 1))
        >>> found.value.shape, found.hessian
        (torch.Size([5, 1]), None)
    """

    __slots__ = ("_found",)

    def __init__(self, **found: Tensor) -> None:
        """Store the quantities."""
        self._found = found

    def __getattr__(self, name: str) -> Tensor | None:
        """Return a quantity, or ``None`` if it was not requested."""
        if name not in QUANTITIES and name not in SPREADS:
            raise AttributeError(f"there is no quantity {name!r}; expected one of {', '.join(QUANTITIES)}")
        return self._found.get(name)

    def __repr__(self) -> str:
        """Return the names and shapes of the quantities."""
        return f"Derivatives({', '.join(f'{name}={list(array.shape)}' for name, array in self._found.items())})"


def evaluate(
    forms: Sequence[Form],
    x: Tensor,
    quantities: Collection[str],
    weights: Tensor | None = None,
    directions: Tensor | None = None,
    mode: type[Backward] | type[Forward] = Backward,
) -> Derivatives:
    """Compute quantities with torch in one pass, as the reference for every backend.

    Args:
        forms: The layers.
        x: Points (n, d).
        quantities: Names out of :data:`QUANTITIES`.
        weights: λ (m,) or (n, m): derivatives of Σⱼ λⱼ fⱼ instead of every fⱼ; the m axis becomes 1.
        directions: (k, d) or (n, k, d), for the quantities that have an axis of directions.
        mode: Whether adjoints or tangents are carried.

    Returns:
        The named quantities.

    Cost: with F operations for the value, (1 + m)F + dF for everything and 2d²mΣw more for a Hessian.
    """
    question = Question(
        x.unsqueeze(-2),
        quantities,
        None if weights is None else (weights.unsqueeze(0) if weights.ndim == 1 else weights).unsqueeze(-2),
        None if directions is None else (directions.unsqueeze(0) if directions.ndim == 2 else directions),
    )
    n, (d, m) = x.shape[0], (x.shape[1], 1)
    found = compute(mode, forms, question)
    k = 0 if directions is None else directions.shape[-2]
    results: dict[str, Tensor] = {}
    for name, array in found.items():
        m = array.shape[-1]
        results[name] = array.expand(n, *array.shape[1:]).reshape(n, *QUANTITIES[name].shape(d, m, k))
    return Derivatives(**results)


def _unit(like: Tensor, width: int) -> Tensor:
    """Return the unit tangents or adjoints of ``width`` features, the same for every sample."""
    if isinstance(like, Tensor):
        return torch.eye(width, dtype=like.dtype, device=like.device).unsqueeze(0)
    # Recorded, so that products with it are dropped and not computed.
    return like.constant(torch.eye(width, dtype=torch.float64).unsqueeze(0))


def _total(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one term."""
    return reduce(add, terms)
