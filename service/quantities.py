"""The words for what can be asked, and their sizes: shared by the service and its client, and free of packages."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

__all__ = ["DIRECTIONAL", "QUANTITIES", "Quantity", "floats_per_row"]

#: Everything that can be asked for, in the order of replies.
Quantity = Literal["value", "gradient", "hessian", "laplacian", "hessian_diagonal", "jvp", "hvp", "curvature"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)
#: What needs directions.
DIRECTIONAL = frozenset({"jvp", "hvp", "curvature"})


@lru_cache(maxsize=1024)
def floats_per_row(quantities: tuple[str, ...], d: int, m: int, k: int, is_weighted: bool) -> int:
    """How many numbers a reply has per point."""
    outputs = 1 if is_weighted else m
    sizes = {
        "value": 1,
        "gradient": d,
        "hessian": d * d,
        "laplacian": 1,
        "hessian_diagonal": d,
        "jvp": k,
        "hvp": k * d,
        "curvature": k,
    }
    return outputs * sum(sizes[quantity] for quantity in quantities)
