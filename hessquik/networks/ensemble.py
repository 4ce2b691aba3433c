"""Ensembles: several networks as one surrogate, their mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessquik.errors import CompositionError
from hessquik.layers.base import Triple
from hessquik.networks.network import NN

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """Networks f₁ … f_M of equal inputs and outputs; the ensemble is their mean f = (1/M) Σ fᵢ.

    Networks that were trained on the same data from different initial weights agree where the data determine them.
    Their standard deviation, see :class:`hessquik.EnsembleEvaluator`, estimates the error of the mean; it is not a
    bound. Source: Lakshminarayanan, Pritzel & Blundell 2017, "Simple and Scalable Predictive Uncertainty Estimation
    using Deep Ensembles" (arXiv:1612.01474).

    Args:
        members: The networks, at least two.

    Attributes:
        members: The networks.

    Raises:
        CompositionError: there are fewer than two, one is not a network, or their inputs or outputs differ.

    Examples:
        >>> from hessquik.networks import fullyConnectedNN
        >>> f = Ensemble(fullyConnectedNN([2, 8, 1]), fullyConnectedNN([2, 16, 1]))
        >>> value, gradient, hessian = f(torch.zeros(5, 2), do_gradient=True)
        >>> value.shape, gradient.shape, hessian
        (torch.Size([5, 1]), torch.Size([5, 2, 1]), None)
    """

    def __init__(self, *members: NN) -> None:
        """Check that the networks fit and keep them."""
        super().__init__()
        if len(members) < 2:
            raise CompositionError(f"an ensemble must have at least two members, got {len(members)}")
        for i, member in enumerate(members):
            if not isinstance(member, NN):
                raise CompositionError(f"members[{i}] must be a network, got {type(member).__name__}")
            sizes, expected = ((one.dim_input(), one.dim_output()) for one in (member, members[0]))
            if sizes != expected:
                raise CompositionError(
                    f"members must have equal inputs and outputs: members[0] has {expected[0]} and {expected[1]}, "
                    f"members[{i}] has {sizes[0]} and {sizes[1]}"
                )
        self.members = nn.ModuleList(members)

    def networks(self) -> list[NN]:
        """Return the members."""
        return [member for member in self.members if isinstance(member, NN)]

    def dim_input(self) -> int:
        """Return the number of inputs."""
        return self.networks()[0].dim_input()

    def dim_output(self) -> int:
        """Return the number of outputs."""
        return self.networks()[0].dim_output()

    def forward(self, x: Tensor, **wanted: Any) -> Triple:
        """Return the means of the members' results; the arguments are those of :meth:`NN.forward`."""
        found = zip(*(member(x, **wanted) for member in self.networks()), strict=True)
        value, gradient, hessian = (None if parts[0] is None else torch.stack(parts).mean(0) for parts in found)
        assert value is not None
        return value, gradient, hessian
