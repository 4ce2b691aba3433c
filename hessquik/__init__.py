"""hessQuik: exact values, gradients, Hessians and more of networks with respect to their inputs.

Layers and networks are in :mod:`hessquik.layers` and :mod:`hessquik.networks`, activations in
:mod:`hessquik.activations`; :class:`Evaluator` is the fast way to evaluate one, :func:`save` and :func:`load` keep
it in a file; :func:`from_torch`, :func:`from_onnx` and :func:`from_sklearn` bring networks of other libraries. The
names below are imported when they are first used, so that ``hessquik.quantities``, which needs the standard library
alone, can be imported where there is no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessquik.calculus import Derivatives
    from hessquik.ensemble import EnsembleEvaluator
    from hessquik.errors import (
        ArchitectureError,
        CompositionError,
        DerivativeError,
        FormatError,
        HessQuikError,
        OrderError,
        ShapeError,
        UnsupportedError,
    )
    from hessquik.evaluator import Evaluator
    from hessquik.importing import from_onnx, from_sklearn, from_torch
    from hessquik.storage import load, save

__all__ = [
    "ArchitectureError",
    "CompositionError",
    "DerivativeError",
    "Derivatives",
    "EnsembleEvaluator",
    "Evaluator",
    "FormatError",
    "HessQuikError",
    "OrderError",
    "ShapeError",
    "UnsupportedError",
    "from_onnx",
    "from_sklearn",
    "from_torch",
    "load",
    "save",
]

_MODULES = {
    "Derivatives": "calculus",
    "EnsembleEvaluator": "ensemble",
    "Evaluator": "evaluator",
    "from_onnx": "importing",
    "from_sklearn": "importing",
    "from_torch": "importing",
    "load": "storage",
    "save": "storage",
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'hessquik' has no attribute {name!r}")
    value = getattr(import_module(f"hessquik.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
