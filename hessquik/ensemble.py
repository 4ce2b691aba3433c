"""Means and standard deviations of the quantities of several networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessquik.calculus import Derivatives
from hessquik.errors import ShapeError
from hessquik.evaluator import Evaluator, Given
from hessquik.networks import NN, Ensemble
from hessquik.quantities import QUANTITIES, SPREADS

__all__ = ["EnsembleEvaluator", "evaluator_of"]


class EnsembleEvaluator:
    """An evaluator of an ensemble on one device and in one dtype, with an Evaluator for each member.

    Every quantity q is the mean over the members; the quantities of :data:`hessquik.quantities.SPREADS` are standard
    deviations:

        mean = (1/M) Σ qᵢ        std = √(Σ (qᵢ − mean)² / (M − 1))

    Each member makes one pass over the points. Mean and squares are updated after each pass, entry by entry, so that
    the bits of a row do not depend on the other rows. Source: Welford 1962 (doi:10.1080/00401706.1962.10490022).

    Args:
        network: The ensemble; the other arguments are those of :class:`hessquik.Evaluator`.
        device: Device to compute on.
        dtype: ``torch.float32`` or ``torch.float64``; the members' own if not given.
        threads: Threads that share a large call.
        backend: A name out of :func:`hessquik.backends.names`.
        compiled: Sets of quantities for which kernels are compiled.

    Attributes:
        members: The members' evaluators.

    Raises:
        ShapeError: see :class:`hessquik.Evaluator`.
        ValueError: see :class:`hessquik.Evaluator`.

    Examples:
        >>> from hessquik.networks import fullyConnectedNN
        >>> f = Ensemble(fullyConnectedNN([2, 8, 1]), fullyConnectedNN([2, 16, 1]))
        >>> out = EnsembleEvaluator(f)(torch.zeros(5, 2), ("value", "value_std", "gradient_std"))
        >>> out.value.shape, out.value_std.shape, out.gradient_std.shape
        (torch.Size([5, 1]), torch.Size([5, 1]), torch.Size([5, 2, 1]))
    """

    def __init__(
        self,
        network: Ensemble,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        threads: int = 1,
        backend: str | None = None,
        compiled: Sequence[Sequence[str]] = (),
        owned: bool = False,
    ) -> None:
        """Create an Evaluator for each member."""
        self.members = [
            Evaluator(member, device, dtype, threads, backend, compiled, owned) for member in network.networks()
        ]
        first = self.members[0]
        self.d, self.m, self.dtype, self.device = first.d, first.m, first.dtype, first.device
        self.backend, self.compiled = first.backend, first.compiled

    @property
    def tile_rows(self) -> tuple[int, ...]:
        """Row counts of the tiles of all members, ascending."""
        return tuple(sorted({rows for member in self.members for rows in member.tile_rows}))

    def operations(
        self, quantities: Sequence[str] = ("value",), weights: Given = None, directions: Given = None
    ) -> int:
        """Return the operations per row, by all members, as :meth:`hessquik.Evaluator.operations` does."""
        return sum(member.operations(_of_members(quantities), weights, directions) for member in self.members)

    def __call__(
        self,
        x: Tensor,
        quantities: Sequence[str] = ("value",),
        weights: Tensor | None = None,
        directions: Tensor | None = None,
        between: Callable[[], None] | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> Derivatives:
        """Compute the wanted quantities at the points.

        Arguments, result and errors are those of :meth:`hessquik.Evaluator.__call__`; ``quantities`` may have names
        out of :data:`hessquik.quantities.SPREADS`. With weights, a standard deviation is that of the weighted sums.
        """
        names = _of_members(quantities)
        if not names or not set(names) <= QUANTITIES.keys():
            raise ShapeError(
                f"expected quantities out of {', '.join((*QUANTITIES, *SPREADS))}, got {list(quantities)}"
            )
        spread = {SPREADS[name] for name in quantities if name in SPREADS}
        means: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        for count, member in enumerate(self.members, 1):
            found = member(x, names, weights, directions, between)
            for name in names:
                new = getattr(found, name)
                if count == 1:
                    means[name], squares[name] = new, torch.zeros_like(new)
                    continue
                difference = new - means[name]
                means[name] += difference / count
                if name in spread:
                    squares[name] += difference * (new - means[name])
        results = {
            name: (squares[SPREADS[name]] / (len(self.members) - 1)).sqrt_() if name in SPREADS else means[name]
            for name in quantities
        }
        if out is not None:
            results = {name: place.copy_(results[name]) for name, place in out.items()}
        return Derivatives(**results)


def evaluator_of(network: NN | Ensemble, *args: Any, **options: Any) -> Evaluator | EnsembleEvaluator:
    """Return an Evaluator or EnsembleEvaluator for a network or ensemble; the other arguments are passed on.

    Examples:
        >>> from hessquik.networks import fullyConnectedNN
        >>> f = fullyConnectedNN([2, 8, 1])
        >>> type(evaluator_of(f)).__name__, type(evaluator_of(Ensemble(f, f))).__name__
        ('Evaluator', 'EnsembleEvaluator')
    """
    if isinstance(network, Ensemble):
        return EnsembleEvaluator(network, *args, **options)
    return Evaluator(network, *args, **options)


def _of_members(quantities: Sequence[str]) -> tuple[str, ...]:
    """Return the quantities that the members must evaluate, each once."""
    return tuple(dict.fromkeys(SPREADS.get(name, name) for name in quantities))
