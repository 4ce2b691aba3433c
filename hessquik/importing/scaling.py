"""Scaling of inputs and outputs, folded into the weights so that a network takes and gives physical units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hessquik.errors import ShapeError
from hessquik.importing.graph import Input, Node, affine, diagonal

__all__ = ["Scaling", "scaled_input", "scaled_output"]

Numbers = Any


@dataclass(frozen=True, slots=True)
class Scaling:
    """The scaling of the data that a network was trained on.

    The network g of the source was trained on u = (x − input_mean) / input_scale and on targets
    v = (y − output_mean) / output_scale; the import gives y = output_mean + output_scale · g(u). Instead of mean and
    scale there may be bounds: [lower, upper] was then mapped to [0, 1], or to ``onto``.

    Attributes:
        input_mean: d numbers, or one for all inputs.
        input_scale: d numbers other than 0, or one.
        output_mean: m numbers, or one.
        output_scale: m numbers other than 0, or one.
        input_lower: d numbers, or one; with ``input_upper``.
        input_upper: d numbers, or one.
        output_lower: m numbers, or one; with ``output_upper``.
        output_upper: m numbers, or one.
        onto: The interval that bounds were mapped to.

    Examples:
        >>> Scaling.of({"input_lower": [0.0, 10.0], "input_upper": [1.0, 30.0]}).input(2)
        (tensor([ 0., 10.], dtype=torch.float64), tensor([ 1., 20.], dtype=torch.float64))
    """

    input_mean: Numbers = None
    input_scale: Numbers = None
    output_mean: Numbers = None
    output_scale: Numbers = None
    input_lower: Numbers = None
    input_upper: Numbers = None
    output_lower: Numbers = None
    output_upper: Numbers = None
    onto: Sequence[float] = (0.0, 1.0)

    @staticmethod
    def of(given: Mapping[str, Any]) -> Scaling:
        """Return the scaling that a mapping describes.

        Raises:
            ShapeError: it has another key.
        """
        names = [each.name for each in fields(Scaling)]
        for name in given:
            if name not in names:
                raise ShapeError(f"a scaling must have keys out of {', '.join(names)}, got {name!r:.60}")
        return Scaling(**given)

    def input(self, width: int) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the inputs."""
        return self._mean_and_scale("input", width)

    def output(self, width: int) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the outputs."""
        return self._mean_and_scale("output", width)

    def _mean_and_scale(self, side: str, width: int) -> tuple[Tensor, Tensor]:
        given = {key: getattr(self, f"{side}_{key}") for key in ("mean", "scale", "lower", "upper")}
        is_bounds = given["lower"] is not None or given["upper"] is not None
        if is_bounds and (given["mean"] is not None or given["scale"] is not None):
            raise ShapeError(f"{side}_lower and {side}_upper must not come with {side}_mean or {side}_scale")
        if (given["lower"] is None) != (given["upper"] is None):
            raise ShapeError(f"{side}_lower and {side}_upper must be given together")
        if is_bounds:
            lower, upper = (self._numbers(f"{side}_{key}", width) for key in ("lower", "upper"))
            if not bool((lower < upper).all()):
                raise ShapeError(f"{side}_lower must be below {side}_upper for every {side}")
            onto = _as_numbers(self.onto)
            if onto is None or onto.shape != (2,) or not onto[0] < onto[1]:
                raise ShapeError(f"onto must be an interval such as [0, 1] or [-1, 1], got {self.onto!r:.100}")
            low, high = onto.tolist()
            scale = (upper - lower) / (high - low)
            return lower - low * scale, scale
        mean, scale = (self._numbers(f"{side}_{key}", width) for key in ("mean", "scale"))
        if not bool(torch.isfinite(torch.stack([1 / scale, mean / scale])).all()):
            raise ShapeError(f"{side}_scale must have no zeros, and no numbers that float64 cannot divide by")
        return mean, scale

    def _numbers(self, name: str, width: int) -> Tensor:
        value = getattr(self, name)
        if value is None:
            value = 1.0 if name.endswith("scale") else 0.0
        numbers = _as_numbers(value)
        if numbers is None or numbers.ndim > 1 or numbers.numel() not in {1, width}:
            raise ShapeError(f"{name} must be one finite number or {width}, got {value!r:.100}")
        return numbers.expand(width).clone()


def _as_numbers(value: Any) -> Tensor | None:
    """Return finite real numbers as a float64 tensor, or ``None`` for anything else."""
    try:
        kind = torch.as_tensor(value).dtype
        numbers = torch.as_tensor(value, dtype=torch.float64).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    is_number = kind is not torch.bool and not kind.is_complex
    return numbers if is_number and bool(torch.isfinite(numbers).all()) else None


def scaled_input(scaling: Scaling, width: int) -> tuple[Input, Node]:
    """Return an input in physical units, and what the source's network takes."""
    source = Input("input", width)
    mean, scale = scaling.input(width)
    return source, affine("input_scale", [(source, diagonal(1 / scale))], -mean / scale)


def scaled_output(scaling: Scaling, output: Node) -> Node:
    """Return what the source's network gives, in physical units."""
    mean, scale = scaling.output(output.width)
    return affine("output_scale", [(output, diagonal(scale))], mean)
