"""Pointwise primitives: the operations that activations and formulas apply to arrays entry by entry.

Every backend implements exactly these; :mod:`hessquik.trace` reduces an activation to them. Comparisons return 1 or
0. Primitives propagate NaN, except comparisons, which return 0, and ``where``, which returns the selected entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PRIMITIVES", "Primitive"]


@dataclass(frozen=True, slots=True)
class Primitive:
    """One pointwise operation.

    Attributes:
        arity: Number of operands.
        operations: Approximate cost of one entry on a CPU, in floating-point operations.
        on_tensors: The operation on tensors; backends are tested against it.
    """

    arity: int
    operations: int
    on_tensors: Callable[..., Tensor]


def _compared(compare: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: compare(a, b).to(torch.result_type(a, b))


PRIMITIVES: dict[str, Primitive] = {
    "add": Primitive(2, 1, torch.add),
    "sub": Primitive(2, 1, torch.sub),
    "mul": Primitive(2, 1, torch.mul),
    "div": Primitive(2, 4, torch.div),
    "neg": Primitive(1, 1, torch.neg),
    "abs": Primitive(1, 1, torch.abs),
    "sqrt": Primitive(1, 6, torch.sqrt),
    "maximum": Primitive(2, 1, torch.maximum),
    "minimum": Primitive(2, 1, torch.minimum),
    "gt": Primitive(2, 1, _compared(torch.gt)),
    "ge": Primitive(2, 1, _compared(torch.ge)),
    "where": Primitive(3, 1, lambda condition, a, b: torch.where(condition != 0, a, b)),
    "exp": Primitive(1, 12, torch.exp),
    "expm1": Primitive(1, 14, torch.expm1),
    "log": Primitive(1, 12, torch.log),
    "log1p": Primitive(1, 14, torch.log1p),
    "tanh": Primitive(1, 16, torch.tanh),
    "sigmoid": Primitive(1, 16, torch.sigmoid),
    "erf": Primitive(1, 20, torch.erf),
    "ndtr": Primitive(1, 22, torch.special.ndtr),
    "sin": Primitive(1, 16, torch.sin),
    "cos": Primitive(1, 16, torch.cos),
    "atan": Primitive(1, 16, torch.atan),
}
