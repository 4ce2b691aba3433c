"""Proof that a network's derivatives are right, whatever network it is.

Its analytic derivatives are compared at random points with three references that know nothing of them: torch's
automatic differentiation of the value, the orders at which Taylor errors fall, and finite differences. Everything is
done in float64 on a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from hessquik import calculus
from hessquik.errors import DerivativeError
from hessquik.networks import NN
from hessquik.utils import taylor

__all__ = ["Row", "prove", "prove_quickly"]

#: Bound of relative errors against automatic differentiation: rounding, amplified by large weights.
AUTOGRAD_BOUND = 1e-8
#: Steps of finite differences, and bounds of relative errors: ε² of the formula and rounding over ε or ε².
DIFFERENCES = {"gradient": (1e-5, 1e-6), "curvature": (1e-3, 1e-4)}
#: Orders of Taylor errors may be that much lower than 2 and 3.
TAYLOR_SLACK = 0.1
TAYLOR_STEPS = tuple(2.0**-k for k in range(15))
#: Part of the value's size below which a derivative, in units of the value, counts as 0.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        quantity: What was compared, a name out of :data:`hessquik.calculus.QUANTITIES`.
        reference: What it was compared with.
        measure: ``relative error``, to be at most the bound, or ``order``, to be at least the bound.
        found: What was measured.
        bound: What it has to keep.
    """

    quantity: str
    reference: str
    measure: str
    found: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the bound is kept; never if the measure is NaN."""
        return self.found <= self.bound if self.measure == "relative error" else self.found >= self.bound


@dataclass(frozen=True, slots=True)
class _Trial:
    """A network in float64 and what to try it at: points, weights of the outputs, directions in natural units."""

    network: NN
    x: Tensor
    weights: Tensor
    directions: Tensor
    scale: Tensor

    def value(self, x: Tensor) -> Tensor:
        """The weighted value (n,)."""
        value: Tensor = self.network(x)[0]
        return (value * self.weights).sum(-1)

    def row(self, quantity: str, reference: str, bound: float, got: Tensor, expected: Tensor) -> Row:
        """Compare two tensors in units of the value."""
        with torch.no_grad():
            size = torch.stack([expected.abs().max(), NEGLIGIBLE * self.value(self.x).abs().max()]).max()
            error = float((got - expected).abs().max())
            relative = error / float(size) if error else 0.0
        return Row(quantity, reference, "relative error", relative, bound)


@torch.inference_mode(False)
def prove(
    network: NN,
    lower_bounds: Sequence[float] | None = None,
    upper_bounds: Sequence[float] | None = None,
    samples: int = 5,
    seed: int = 0,
) -> list[Row]:
    """Compare all derivatives with automatic differentiation, Taylor tests and finite differences.

    Args:
        network: The network; it is left as it is.
        lower_bounds: Of the inputs, d numbers; points are drawn uniformly between the bounds, and from the standard
            normal distribution if they are not both given.
        upper_bounds: Of the inputs, d numbers.
        samples: Number of points.
        seed: Of the points, weights of the outputs and directions.

    Returns:
        One row per comparison; the network is right if all have passed.

    Example:
        >>> from hessquik.networks import ICNN
        >>> rows = prove(ICNN(3, [None, 8, 2]))
        >>> len(rows), all(row.passed for row in rows)
        (13, True)
    """
    trial = _set_up(network, lower_bounds, upper_bounds, samples, seed)
    return [*_against_autograd(trial), *_against_taylor(trial), *_against_differences(trial)]


@torch.inference_mode(False)
def prove_quickly(
    network: NN,
    lower_bounds: Sequence[float] | None = None,
    upper_bounds: Sequence[float] | None = None,
) -> None:
    """Compare all derivatives with automatic differentiation at two points; the arguments are those of :func:`prove`.

    Raises:
        DerivativeError: some disagree, or are not finite.

    Example:
        >>> from hessquik.networks import ICNN
        >>> prove_quickly(ICNN(3, [None, 8, 2]))
    """
    failed = [
        f"{row.quantity} (relative error {row.found:.1e})"
        for row in _against_autograd(_set_up(network, lower_bounds, upper_bounds, samples=2, seed=0))
        if not row.passed
    ]
    if failed:
        raise DerivativeError(
            f"expected derivatives within {AUTOGRAD_BOUND:.0e} of automatic differentiation, got {', '.join(failed)}"
        )


def _set_up(
    network: NN,
    lower_bounds: Sequence[float] | None,
    upper_bounds: Sequence[float] | None,
    samples: int,
    seed: int,
) -> _Trial:
    """Copy the network and draw what to try it at."""
    generator = torch.Generator().manual_seed(seed)
    d, m = network.dim_input(), network.dim_output()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if lower_bounds is None or upper_bounds is None:
        scale = torch.ones(d, dtype=torch.float64)
        x = normal(samples, d)
    else:
        lower, upper = (torch.as_tensor(bounds, dtype=torch.float64) for bounds in (lower_bounds, upper_bounds))
        scale = (upper - lower) / 2
        x = lower + (upper - lower) * torch.rand(samples, d, dtype=torch.float64, generator=generator)
    directions = torch.nn.functional.normalize(normal(samples, 3, d), dim=-1) * scale
    copy = deepcopy(network).to("cpu", torch.float64).requires_grad_(False)
    return _Trial(copy, x, normal(samples, m), directions, scale)


def _against_autograd(trial: _Trial) -> list[Row]:
    """All quantities of the weighted outputs; the Hessian by its products with the directions."""
    with torch.enable_grad():
        x = trial.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(trial.value(x).sum(), x, create_graph=True)
        products = [
            torch.autograd.grad((gradient * v).sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True)
            if gradient.requires_grad
            else (torch.zeros_like(x),)
            for v in trial.directions.unbind(1)
        ]
    hv = torch.stack([product for (product,) in products], dim=1)
    gradient, v, scale = gradient.detach(), trial.directions, trial.scale
    with torch.no_grad():
        found = calculus.evaluate(
            trial.network.forms(), trial.x, calculus.QUANTITIES, trial.weights, trial.directions
        )
    got = {name: getattr(found, name).squeeze(-1) for name in calculus.QUANTITIES}
    diagonal = got["hessian"].diagonal(dim1=1, dim2=2)
    compared = {
        "gradient": (got["gradient"] * scale, gradient * scale),
        "jvp": (got["jvp"], (v @ gradient.unsqueeze(-1)).squeeze(-1)),
        "hvp": (got["hvp"] * scale, hv * scale),
        "curvature": (got["curvature"], (v * hv).sum(-1)),
        "hessian": (v @ got["hessian"] * scale, hv * scale),
        "hessian_diagonal": (got["hessian_diagonal"] * scale**2, diagonal * scale**2),
        "laplacian": (got["laplacian"].unsqueeze(-1), diagonal.sum(-1, keepdim=True)),
    }
    references = dict.fromkeys(("hessian_diagonal", "laplacian"), "the proven Hessian")
    return [
        trial.row(quantity, references.get(quantity, "autograd"), AUTOGRAD_BOUND, *pair)
        for quantity, pair in compared.items()
    ]


def _against_taylor(trial: _Trial) -> list[Row]:
    """The gradient and the Hessian, carried forward and backward, by the orders at which errors fall."""
    rows = []
    x, v = trial.x, trial.directions[:, 0]
    for mode, forward in (("forward", True), ("backward", False)):
        with torch.no_grad():
            _, gradient, hessian = trial.network(x, do_gradient=True, do_Hessian=True, forward_mode=forward)
            terms = [
                trial.value(x),
                torch.einsum("nam,na,nm->n", gradient, v, trial.weights),
                torch.einsum("nabm,na,nb,nm->n", hessian, v, v, trial.weights),
            ]
            found = taylor.errors(lambda h: trial.value(x + h * v), terms, TAYLOR_STEPS)
        for order, quantity in ((2, "gradient"), (3, "hessian")):
            noise = taylor.rounding(terms[:order])
            seen = taylor.observed_order([row[order - 1] for row in found], order, 2.0, noise)
            rows.append(Row(quantity, f"Taylor, {mode} mode", "order", seen, order - TAYLOR_SLACK))
    return rows


def _against_differences(trial: _Trial) -> list[Row]:
    """The slope and the curvature in a direction, by central differences."""
    x, v = trial.x, trial.directions[:, 1]
    with torch.no_grad():
        found = calculus.evaluate(
            trial.network.forms(), x, ("jvp", "curvature"), trial.weights, trial.directions[:, 1:2]
        )
        assert found.jvp is not None
        assert found.curvature is not None
        eps, bound = DIFFERENCES["gradient"]
        slope = (trial.value(x + eps * v) - trial.value(x - eps * v)) / (2 * eps)
        row = trial.row("jvp", "finite differences", bound, found.jvp.flatten(), slope)
        eps, bound = DIFFERENCES["curvature"]
        bent = (trial.value(x + eps * v) - 2 * trial.value(x) + trial.value(x - eps * v)) / eps**2
        return [row, trial.row("curvature", "finite differences", bound, found.curvature.flatten(), bent)]
