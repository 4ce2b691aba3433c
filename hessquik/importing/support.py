"""A table of supported operations for the documentation, made from the tables that the readers use."""

from __future__ import annotations

from collections.abc import Iterable

from hessquik.importing import onnx_operations, onnx_reader, sklearn_estimator, torch_operations, torch_reader
from hessquik.importing.sequential import MODULES

__all__ = ["table"]


def table() -> str:
    """Return what each source supports, as Markdown.

    Examples:
        >>> table().splitlines()[0]
        '| source | kind | operations |'
    """
    rows: list[tuple[str, str, Iterable[str]]] = []
    for source, operations, handlers in (
        ("torch", torch_operations, torch_reader.HANDLERS),
        ("ONNX", onnx_operations, onnx_reader.HANDLERS),
    ):
        by_table = operations.POINTWISE.keys() | operations.ADDITIVE.keys()
        rows += [
            (source, "functions of one variable", operations.POINTWISE),
            (source, "affine operations", operations.ADDITIVE),
            (source, "under conditions that a refusal names", handlers.keys() - by_table),
            (source, "refused with a reason", operations.REFUSED.keys() - handlers.keys()),
        ]
    rows += [
        ("state dict", "modules of an architecture", MODULES),
        ("scikit-learn", "estimators", sklearn_estimator.ESTIMATORS),
        ("scikit-learn", "transformers", sklearn_estimator.TRANSFORMERS),
    ]
    lines = [
        f"| {source} | {kind} | {', '.join(f'`{name}`' for name in sorted(names))} |" for source, kind, names in rows
    ]
    return "\n".join(["| source | kind | operations |", "|---|---|---|", *lines])
