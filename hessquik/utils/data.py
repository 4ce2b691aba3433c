"""Data to fit networks to."""

from __future__ import annotations

import torch
from torch import Tensor

from hessquik.layers.base import Triple

__all__ = ["peaks"]


def peaks(y: Tensor, do_gradient: bool = False, do_Hessian: bool = False, forward_mode: bool | None = None) -> Triple:
    """Evaluate the MATLAB peaks function of two variables (x, y), with its derivatives.

        f = 3(1 − x)² e₁ − 10(x/5 − x³ − y⁵) e₂ − ⅓ e₃
        e₁ = exp(−x² − (y + 1)²)    e₂ = exp(−x² − y²)    e₃ = exp(−(x + 1)² − y²)

    With r the way from the middle of an e, each term p e has
        ∇(pe)  = (∇p − 2pr) e
        ∇²(pe) = (∇²p − 2∇p rᵀ − 2r ∇pᵀ + p(4rrᵀ − 2I)) e

    Args:
        y: Points (n, 2).
        do_gradient: Whether the gradient is wanted.
        do_Hessian: Whether the Hessian is wanted.
        forward_mode: Taken so that the derivative checks may hand it over; it changes nothing.

    Returns:
        f (n, 1), gradient (n, 2, 1) or ``None``, Hessian (n, 2, 2, 1) or ``None``, as a network returns them.
        Flattened from axis 1 they are the columns (n, 2) and (n, 4) that
        :func:`hessquik.utils.train_one_epoch` takes as targets.

    Examples:
        >>> import torch
        >>> f, gradient, hessian = peaks(torch.tensor([[0.0, 0.0]]), do_gradient=True, do_Hessian=True)
        >>> print(f"{f.item():.4f}", gradient.shape, hessian.shape)
        0.9810 torch.Size([1, 2, 1]) torch.Size([1, 2, 2, 1])
        >>> torch.cat([part.flatten(1) for part in (f, gradient, hessian)], dim=1).shape
        torch.Size([1, 7])
    """
    x0, x1 = y[:, 0], y[:, 1]
    none = torch.zeros_like(x0)
    # Per term: the middle of e, then p, ∇p and the diagonal of ∇²p, which is all there is of it.
    terms = (
        ((0.0, -1.0), 3 * (1 - x0) ** 2, (-6 * (1 - x0), none), (none + 6, none)),
        ((0.0, 0.0), -2 * x0 + 10 * x0**3 + 10 * x1**5, (30 * x0**2 - 2, 50 * x1**4), (60 * x0, 200 * x1**3)),
        ((-1.0, 0.0), none - 1 / 3, (none, none), (none, none)),
    )
    f, gradient, hessian = none, y.new_zeros(y.shape), y.new_zeros(*y.shape, 2)
    identity = torch.eye(2, dtype=y.dtype, device=y.device)
    for middle, p, dp, d2p in terms:
        r = y - y.new_tensor(middle)
        e = torch.exp(-(r * r).sum(1))
        f = f + p * e
        slope = torch.stack(dp, dim=1)
        gradient = gradient + (slope - 2 * p[:, None] * r) * e[:, None]
        if do_Hessian:
            crossed = slope[:, :, None] * r[:, None, :]
            bent = p[:, None, None] * (4 * r[:, :, None] * r[:, None, :] - 2 * identity)
            curved = torch.diag_embed(torch.stack(d2p, dim=1)) - 2 * (crossed + crossed.mT) + bent
            hessian = hessian + curved * e[:, None, None]
    return (
        f.unsqueeze(-1),
        gradient.unsqueeze(-1) if do_gradient else None,
        hessian.unsqueeze(-1) if do_Hessian else None,
    )
