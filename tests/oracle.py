"""Derivatives by torch's automatic differentiation in float64: independent of everything that is tested."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessquik.networks import NN


def derivatives(network: NN, x: Tensor) -> dict[str, Tensor]:
    """Value (n, m), gradient (n, d, m), Hessian (n, d, d, m) and Laplacian (n, m) in float64."""
    network = network.double()

    def at_one_point(point: Tensor) -> Tensor:
        value: Tensor = network(point.unsqueeze(0))[0][0]
        return value

    def over_points(function: Callable[[Tensor], Tensor]) -> Tensor:
        result: Tensor = torch.func.vmap(function)(x.double())
        return result.detach()

    hessian = over_points(torch.func.jacfwd(torch.func.jacrev(at_one_point))).movedim(1, -1)
    return {
        "value": over_points(at_one_point),
        "gradient": over_points(torch.func.jacrev(at_one_point)).movedim(1, -1),
        "hessian": hessian,
        "laplacian": hessian.diagonal(dim1=1, dim2=2).sum(-1),
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖, largest entries; absolute where the expected is zero."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((got.double() - expected).abs().max()) if expected.numel() else 0.0
    return error / scale if scale > 0 else error
