"""A table of supported operations for the documentation, made from the tables that the readers use."""

from __future__ import annotations

from hessquik.importing import onnx_operations, sklearn_estimator, torch_operations
from hessquik.importing.sequential import MODULES

__all__ = ["table"]


def table() -> str:
    """Return what each source supports, as Markdown.

    Example:
        >>> table().splitlines()[0]
        '| source | kind | supported |'
    """
    pointwise, affine = "functions of one variable", "affine operations"
    rows = [
        ("torch", pointwise, sorted({*torch_operations.POINTWISE, "maximum", "minimum", "prelu"})),
        ("torch", affine, sorted(torch_operations.ADDITIVE)),
        ("torch", "modules of a state dict's architecture", sorted(MODULES)),
        ("torch", "refused with a reason", sorted(torch_operations.REFUSED)),
        ("ONNX", pointwise, sorted({*onnx_operations.POINTWISE, "Clip", "Max", "Min", "PRelu", "Pow"})),
        ("ONNX", affine, sorted({*onnx_operations.ADDITIVE, "Mul", "Div", "Scaler", "LinearRegressor"})),
        ("ONNX", "refused with a reason", sorted(onnx_operations.REFUSED)),
        ("scikit-learn", "estimators", list(sklearn_estimator.ESTIMATORS)),
        ("scikit-learn", "transformers", list(sklearn_estimator.TRANSFORMERS)),
    ]
    lines = [f"| {source} | {kind} | {', '.join(f'`{name}`' for name in names)} |" for source, kind, names in rows]
    return "\n".join(["| source | kind | supported |", "|---|---|---|", *lines])
