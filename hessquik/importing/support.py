"""A table of supported operations for the documentation, made from the tables that the readers use."""

from __future__ import annotations

from collections.abc import Iterable

from hessquik.importing import (
    onnx_handlers,
    onnx_operations,
    sklearn_estimator,
    sklearn_kernels,
    sklearn_transformers,
    torch_operations,
    torch_reader,
)
from hessquik.importing.sequential import MODULES

__all__ = ["table"]


def _derived(kind: str, bases: Iterable[str]) -> list[str]:
    """Return the classes of scikit-learn that derive from bases, or the bases where it is not installed."""
    try:
        from sklearn.utils import all_estimators
    except ImportError:
        return [*bases]
    return [name for name, each in all_estimators(kind) if {base.__name__ for base in each.__mro__} & {*bases}]


def table() -> str:
    """Return what each source supports, as Markdown.

    Examples:
        >>> table().splitlines()[0]
        '| source | kind | operations |'
    """
    rows: list[tuple[str, str, Iterable[str]]] = []
    for source, operations, handlers in (
        ("torch", torch_operations, torch_reader.HANDLERS),
        ("ONNX", onnx_operations, onnx_handlers.HANDLERS),
    ):
        by_table = operations.POINTWISE.keys() | operations.ADDITIVE.keys()
        rows += [
            (source, "functions of one variable", operations.POINTWISE),
            (source, "affine operations, some of them products", operations.ADDITIVE),
            (source, "under conditions that a refusal names", handlers.keys() - by_table),
            (source, "refused with a reason", operations.REFUSED.keys() - handlers.keys()),
        ]
    regressors = [*sklearn_estimator.ESTIMATORS, *_derived("regressor", sklearn_estimator.BASES)]
    transformers = [*sklearn_transformers.TRANSFORMERS, *_derived("transformer", sklearn_transformers.BASES)]
    rows += [
        ("state dict", "modules of an architecture", MODULES),
        ("scikit-learn", "estimators", {*regressors}),
        ("scikit-learn", "transformers", {*transformers}),
        ("scikit-learn", "kernels", [*sklearn_kernels.KERNELS, *sklearn_kernels.PROCESSES]),
    ]
    lines = [
        f"| {source} | {kind} | {', '.join(f'`{name}`' for name in sorted(names))} |" for source, kind, names in rows
    ]
    return "\n".join(["| source | kind | operations |", "|---|---|---|", *lines])
