"""Import of torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessquik.errors import UnsupportedError
from hessquik.importing.capture import capture, example_of
from hessquik.importing.scaling import Scaling
from hessquik.importing.source import BOUNDS, Imported, Source, import_source
from hessquik.importing.torch_reader import read
from hessquik.networks import NN

__all__ = ["from_torch", "import_module"]


def from_torch(
    module: nn.Module,
    example_input: Any = None,
    *,
    allow_kinks: bool = False,
    dtype: torch.dtype | None = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    **scaling: Any,
) -> NN:
    """Return a torch module as a network with exact derivatives.

    The module is captured by ``torch.export`` and is not changed. Its values, and its first derivatives if torch has
    them, are compared with the network's before the network is returned.

    Args:
        module: A module that takes points (n, d), in evaluation mode if it has dropout or batch normalisation.
        example_input: A point (d,) or points (n, d); not needed where the first layer tells d.
        allow_kinks: Whether ReLU, LeakyReLU and other functions whose first derivatives jump are accepted; they are
            named in the metadata of the file that :func:`hessquik.save` writes.
        dtype: Dtype of the weights. If not given, the module's, or float64 where float32 would lose digits.
        bounds: Lower and upper bounds of the inputs, within which values are compared; near 0 if not given.
        scaling: ``input_mean``, ``input_scale``, ``output_mean``, ``output_scale``, or bounds in their place, as
            :class:`hessquik.importing.scaling.Scaling` has them: folded into the weights.

    Raises:
        UnsupportedError: the module cannot be exact here; the message names the node.
        ShapeError: a scaling or the bounds do not fit.

    Examples:
        >>> from torch import nn
        >>> f = from_torch(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), input_scale=[1.0, 10.0])
        >>> value, gradient, hessian = f(torch.zeros(5, 2), do_gradient=True, do_Hessian=True)
        >>> hessian.shape
        torch.Size([5, 2, 2, 1])
    """
    return import_module(module, example_input, Scaling.of(scaling), allow_kinks, dtype, bounds).network


def import_module(
    module: nn.Module,
    example_input: Any,
    scaling: Scaling,
    allow_kinks: bool = False,
    dtype: torch.dtype | None = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Imported:
    """Import a module as :func:`from_torch` does; return the network with the comparison of its values."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):  # whatever is the default around this call
        return import_source(_source(module, example_input), scaling, allow_kinks, dtype, bounds)


def _source(module: nn.Module, example_input: Any) -> Source:
    """Return a module as a source."""
    example = example_of(module, example_input)
    program = capture(module, example, is_guess=example_input is None)

    def evaluate(x: Tensor) -> Tensor:
        try:
            result = module(x.clone().reshape(len(x), *example.shape[1:]))
        except Exception as error:  # such as one of weights of several dtypes, which capture does not notice
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise UnsupportedError(
                f"{type(module).__name__} cannot compute its values ({reason}); call it on {len(x)} points of "
                f"{x.dtype} first: let it take any number of points, and give all weights one dtype by "
                "module.float() or module.double()"
            ) from None
        if not isinstance(result, Tensor):
            kind = type(result).__name__
            raise UnsupportedError(f"the module returns a {kind}; wrap it in a module that returns one tensor")
        return result

    def differentiate(x: Tensor, weights: Tensor) -> Tensor | None:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            try:
                total = (evaluate(x).reshape(len(x), -1) * weights.to(x.dtype)).sum()
                return torch.autograd.grad(total, x)[0] if total.requires_grad else torch.zeros_like(x)
            except Exception:  # any error of a module that has no derivatives by torch
                return None

    return Source(
        program.width,
        program.dtype,
        "torch",
        lambda point: read(program, point),
        evaluate,
        precision=BOUNDS[program.coarsest],
        differentiate=differentiate,
    )
