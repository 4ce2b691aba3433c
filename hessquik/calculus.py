"""Values and derivatives of a chain of layers: pure functions on values.

Linearise every layer at the points, carry tangents forward and adjoints back, and every quantity is a sum over
the layers' hidden units. With dz = ∂z/∂x, gs the adjoint of σ(z) and c = gs ⊙ σ''(z):

    gradient           the adjoint of x
    Hessian            Σ dzᵀ diag(c) dz                      a sum of congruences, one batched GEMM
    Laplacian          Σ c · ‖dz‖²                           column norms, no Hessian
    Hessian diagonal   Σ c · dz²
    Jv                 the tangent of y
    Hv                 the adjoint of x, with c ⊙ (dz v) entering at every z
    vᵀHv               Σ c · (dz v)²

Letters: n samples, d inputs, m outputs (1 if weighted), k directions, w hidden units.

Sources: E. Newman and L. Ruthotto, hessQuik (2022), doi:10.21105/joss.04171, for the layers' derivatives;
R. M. Gower and M. P. Mello, arXiv:1309.5479, for Hessians as sums over nonlinear sites.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessquik.errors import ShapeError
from hessquik.layers.form import Form, Linearization, Parts, congruence, join

__all__ = ["DIRECTIONAL", "QUANTITIES", "Derivatives", "evaluate", "linearize", "pull", "push"]

#: Everything that can be asked for.
QUANTITIES = ("value", "gradient", "hessian", "laplacian", "hessian_diagonal", "jvp", "hvp", "curvature")
#: What needs directions.
DIRECTIONAL = frozenset({"jvp", "hvp", "curvature"})
#: What needs σ''.
_SECOND_ORDER = frozenset({"hessian", "laplacian", "hessian_diagonal", "hvp", "curvature"})


@dataclass(frozen=True, slots=True)
class Derivatives:
    """The quantities that were asked for; a field is ``None`` exactly when it was not.

    Attributes:
        value: (n, m).
        gradient: (n, d, m).
        hessian: (n, d, d, m).
        laplacian: (n, m).
        hessian_diagonal: (n, d, m).
        jvp: Jv (n, k, m).
        hvp: Hv (n, k, d, m).
        curvature: vᵀHv (n, k, m).
    """

    value: Tensor | None = None
    gradient: Tensor | None = None
    hessian: Tensor | None = None
    laplacian: Tensor | None = None
    hessian_diagonal: Tensor | None = None
    jvp: Tensor | None = None
    hvp: Tensor | None = None
    curvature: Tensor | None = None


def linearize(forms: Sequence[Form], features: Parts, order: int) -> list[Linearization]:
    """Linearise each layer of a chain where the one before it leaves the features."""
    chain: list[Linearization] = []
    for form in forms:
        chain.append(form.linearize(features, order))
        features = chain[-1].value
    return chain


def push(chain: Sequence[Linearization], tangents: Parts) -> tuple[list[Tensor], Parts]:
    """Carry tangents (n, k, d) of x to every dz (n, k, w) and to y (n, k, m)."""
    dz = []
    for layer in chain:
        at_hidden, tangents = layer.push(tangents)
        dz.append(at_hidden)
    return dz, tangents


def pull(
    chain: Sequence[Linearization], adjoints: Parts, extra: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    """Carry adjoints (n, m, q) of y back to every gs (n, m, w) and to x (n, m, d).

    ``extra`` has, for every layer, the adjoints that enter at its z, or ``None``.
    """
    gs = []
    for layer, at_hidden in zip(reversed(chain), reversed(extra), strict=True):
        at_sigma, adjoints = layer.pull(adjoints, at_hidden)
        gs.append(at_sigma)
    return gs[::-1], join(adjoints)


def evaluate(
    forms: Sequence[Form],
    x: Tensor,
    quantities: Collection[str],
    weights: Tensor | None = None,
    directions: Tensor | None = None,
) -> Derivatives:
    """Compute the wanted quantities at ``x`` in one pass that shares what they have in common.

    Args:
        forms: The layers.
        x: Points (n, d).
        quantities: Names out of :data:`QUANTITIES`.
        weights: λ (n or 1, m): derivatives of Σⱼ λⱼ fⱼ instead of every fⱼ; the m axis becomes 1.
        directions: (n or 1, k, d), for :data:`DIRECTIONAL`.

    Returns:
        The named quantities.

    Cost: with F operations for the value, (1 + m)F + dF for everything and 2d²mΣw more for a Hessian.
    """
    wanted = set(quantities)
    order = 2 if wanted & _SECOND_ORDER else int(bool(wanted & {"gradient", "jvp"}))
    chain = linearize(forms, (x,), order)
    y, *carried = chain[-1].value
    n, m = y.shape
    found: dict[str, Tensor] = {}
    if "value" in wanted:
        found["value"] = y if weights is None else (y * weights).sum(-1, keepdim=True)
    if order == 0:
        return Derivatives(**found)

    unit = _unit(m, x) if weights is None else weights.unsqueeze(1)
    gs, gx = pull(chain, _start(unit, carried), [None] * len(chain))
    gradient = gx.mT.expand(n, -1, -1)
    if "gradient" in wanted:
        found["gradient"] = gradient
    if "jvp" in wanted:
        found["jvp"] = _given(directions) @ gradient
    if order == 1:
        return Derivatives(**found)

    c = [_times_curvature(adjoint, layer) for adjoint, layer in zip(gs, chain, strict=True)]
    weight = _side_by_side(c, c, x.new_empty(n, unit.shape[1], 0))
    if wanted & {"hessian", "laplacian", "hessian_diagonal"}:
        dz, _ = push(chain, (_unit(x.shape[1], x),))
        tangents = _side_by_side(dz, c, x.new_empty(n, x.shape[1], 0))
        if "hessian" in wanted:
            found["hessian"] = congruence(tangents, weight)
        if wanted & {"laplacian", "hessian_diagonal"}:
            squares = tangents * tangents
            if "laplacian" in wanted:
                found["laplacian"] = (squares.sum(1, keepdim=True) @ weight.mT).squeeze(1)
            if "hessian_diagonal" in wanted:
                found["hessian_diagonal"] = squares @ weight.mT
    if wanted & {"hvp", "curvature"}:
        directions = _given(directions)
        dz, _ = push(chain, (directions,))
        if "curvature" in wanted:
            tangents = _side_by_side(dz, c, x.new_empty(n, directions.shape[1], 0))
            found["curvature"] = (tangents * tangents) @ weight.mT
        if "hvp" in wanted:
            found["hvp"] = _hessian_vector(chain, dz, c, unit.shape[1])
    return Derivatives(**found)


def _unit(width: int, like: Tensor) -> Tensor:
    """The unit tangents or adjoints of ``width`` features, the same for every sample."""
    return torch.eye(width, dtype=like.dtype, device=like.device).unsqueeze(0)


def _start(unit: Tensor, carried: Sequence[Tensor]) -> Parts:
    """Adjoints of the last layer's features: those of y, and zero for what is only carried along."""
    return (unit, *(part.new_zeros(1, unit.shape[1], part.shape[-1]) for part in carried))


def _given(directions: Tensor | None) -> Tensor:
    """The directions, which the caller has to give for what needs them."""
    if directions is None:
        raise ShapeError(f"{', '.join(sorted(DIRECTIONAL))} expect directions of shape (k, d) or (n, k, d), got none")
    return directions


def _times_curvature(gs: Tensor, layer: Linearization) -> Tensor | None:
    """The weights c = gs ⊙ σ''(z) of a layer's hidden units (n, m, w), ``None`` where σ'' = 0."""
    return None if layer.curvature is None else gs * layer.curvature.unsqueeze(1)


def _side_by_side(tensors: Sequence[Tensor | None], c: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The tangents or weights (n, k, w) of the hidden units that have curvature, as one (n, k, Σw)."""
    kept = [here for here, weight in zip(tensors, c, strict=True) if weight is not None]
    return torch.cat([like, *(here.expand(like.shape[0], -1, -1) for here in kept if here is not None)], dim=-1)


def _hessian_vector(
    chain: Sequence[Linearization], dz: Sequence[Tensor], c: Sequence[Tensor | None], m: int
) -> Tensor:
    """Hv (n, k, d, m): pull c ⊙ dz v back from every z."""
    y, *carried = chain[-1].value
    extra = [
        None if weight is None else (here.unsqueeze(2) * weight.unsqueeze(1)).flatten(1, 2)
        for here, weight in zip(dz, c, strict=True)
    ]
    k = dz[0].shape[1]
    _, gx = pull(chain, _start(y.new_zeros(1, k * m, y.shape[-1]), carried), extra)
    product: Tensor = gx.expand(y.shape[0], -1, -1).unflatten(1, (k, m))
    return product.mT
