"""hessQuik: exact values, gradients, Hessians and more of networks with respect to their inputs.

Layers and networks are in :mod:`hessquik.layers` and :mod:`hessquik.networks`, activations in
:mod:`hessquik.activations`; :class:`Evaluator` is the fast way to evaluate one, :func:`save` and :func:`load` keep
it in a file.
"""

from hessquik.calculus import Derivatives
from hessquik.errors import (
    ArchitectureError,
    CompositionError,
    DerivativeError,
    FormatError,
    HessQuikError,
    OrderError,
    ShapeError,
)
from hessquik.evaluator import Evaluator
from hessquik.storage import load, save

__all__ = [
    "ArchitectureError",
    "CompositionError",
    "DerivativeError",
    "Derivatives",
    "Evaluator",
    "FormatError",
    "HessQuikError",
    "OrderError",
    "ShapeError",
    "load",
    "save",
]
