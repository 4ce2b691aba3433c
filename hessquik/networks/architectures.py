"""The documented families of networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch

from hessquik.activations import hessQuikActivationFunction, softplusActivation
from hessquik.layers import ICNNLayer, resnetLayer, singleLayer
from hessquik.networks.network import NN

__all__ = ["ICNN", "fullyConnectedNN", "resnetNN"]


class fullyConnectedNN(NN):
    """Single layers one after the other: u_l = σ(u_{l−1} K_l + b_l), u_0 = x.

    Args:
        widths: (d, w_1, …, m).
        act: σ of every layer; softplus if not given.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Examples:
        >>> fullyConnectedNN([4, 8, 2]).dim_output()
        2
    """

    parameter_names = ("widths", "act")

    def __init__(
        self,
        widths: Sequence[int],
        act: hessQuikActivationFunction | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layers."""
        act = softplusActivation() if act is None else act
        super().__init__(*(singleLayer(p, q, act, device=device, dtype=dtype) for p, q in pairwise(widths)))

    @property
    def widths(self) -> list[int]:
        """(d, w_1, …, m)."""
        return [self.dim_input(), *(layer.dim_output() for layer in self.layers())]

    @property
    def act(self) -> hessQuikActivationFunction:
        """σ of the first layer."""
        return cast(singleLayer, self[0]).act


class resnetNN(NN):
    """Residual layers one after the other: u_l = u_{l−1} + hσ(u_{l−1} K_l + b_l), u_0 = x.

    Source: He et al. 2016 (arXiv:1512.03385).

    Args:
        width: Width of every layer, d and m.
        depth: Number of layers.
        h: Step size.
        act: σ of every layer; softplus if not given.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Examples:
        >>> len(resnetNN(8, depth=3, h=0.5))
        3
    """

    parameter_names = ("width", "depth", "h", "act")

    def __init__(
        self,
        width: int,
        depth: int,
        h: float = 1.0,
        act: hessQuikActivationFunction | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layers."""
        act = softplusActivation() if act is None else act
        super().__init__(*(resnetLayer(width, h, act, device=device, dtype=dtype) for _ in range(depth)))

    @property
    def width(self) -> int:
        """Width of every layer."""
        return self.dim_input()

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self)

    @property
    def h(self) -> float:
        """Step size of the first layer."""
        return cast(resnetLayer, self[0]).h

    @property
    def act(self) -> hessQuikActivationFunction:
        """σ of the first layer."""
        return cast(resnetLayer, self[0]).act


class ICNN(NN):
    """Convex layers one after the other: u_l = σ(u_{l−1} L_l⁺ + x K_l + b_l), convex in x.

    σ has to be convex and must not decrease. Source: Amos, Xu & Kolter 2017 (arXiv:1609.07152).

    Args:
        input_dim: Width d of x.
        widths: (None, w_1, …, m): the first layer has no u.
        act: σ of every layer; softplus if not given.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Examples:
        >>> import torch
        >>> ICNN(3, [None, 8, 5])(torch.zeros(2, 3))[0].shape
        torch.Size([2, 5])
    """

    parameter_names = ("input_dim", "widths", "act")

    def __init__(
        self,
        input_dim: int,
        widths: Sequence[int | None],
        act: hessQuikActivationFunction | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layers."""
        act = softplusActivation() if act is None else act
        layers = []
        for p, q in pairwise(widths):
            if q is None:
                raise ValueError(f"only the first of the widths may be None, got {list(widths)}")
            layers.append(ICNNLayer(input_dim, p, q, act, device=device, dtype=dtype))
        super().__init__(*layers)

    @property
    def input_dim(self) -> int:
        """Width d of x."""
        return cast(ICNNLayer, self[0]).input_dim

    @property
    def widths(self) -> list[int | None]:
        """(None, w_1, …, m)."""
        convex = [cast(ICNNLayer, layer) for layer in self]
        return [convex[0].in_features, *(layer.out_features for layer in convex)]

    @property
    def act(self) -> hessQuikActivationFunction:
        """σ of the first layer."""
        return cast(ICNNLayer, self[0]).act
