"""Names, arrays and refusals that all readers of scikit-learn share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessquik.errors import UnsupportedError
from hessquik.importing.graph import Map, Node, affine, as_map, identity, refuse

__all__ = [
    "child",
    "constant",
    "diagonal",
    "expect_fitted",
    "found_for",
    "inherited",
    "is_own",
    "numbers",
    "select",
    "stacked",
    "tensor",
    "unsupported",
]

_Reader = TypeVar("_Reader")


def child(place: str, name: str, part: Any) -> str:
    """Return the place of a part.

    Examples:
        >>> child("Pipeline.inner (Pipeline)", "last", None)
        'Pipeline.inner.last (NoneType)'
    """
    return f"{place.split(' (', maxsplit=1)[0]}.{name} ({type(part).__name__})"


def is_own(part: Any) -> bool:
    """Return True if the class of a part is one of scikit-learn's own."""
    return type(part).__module__.split(".")[0] == "sklearn"


def found_for(part: Any, table: Mapping[str, _Reader]) -> _Reader | None:
    """Return the entry of a table for the class of a part."""
    return table.get(type(part).__name__) if is_own(part) else None


def inherited(part: Any, table: Mapping[str, _Reader]) -> _Reader | None:
    """Return the entry of a table for a base of the class of a part."""
    bases = [base.__name__ for base in type(part).__mro__ if base.__name__ in table]
    return table[bases[0]] if bases and is_own(part) else None


def expect_fitted(part: Any, place: str) -> None:
    """Refuse a part that has not been fitted; the steps of a pipeline are asked one by one.

    Raises:
        UnsupportedError: it has not, or it is no estimator.
    """
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    if hasattr(part, "steps"):
        return
    try:
        check_is_fitted(part)
    except NotFittedError:
        raise refuse(place, "has not been fitted to data", "call fit before") from None
    except TypeError:
        raise refuse(place, "is no estimator of scikit-learn", "give a fitted estimator") from None


def tensor(array: Any) -> Tensor:
    """Return numbers as a float64 tensor; a sparse matrix becomes dense."""
    return torch.as_tensor(array.toarray() if hasattr(array, "toarray") else array, dtype=torch.float64)


def numbers(array: Any, width: int) -> Tensor:
    """Return one number for each of some features, from as many or from one."""
    return tensor(array).reshape(-1).expand(width).clone()


def diagonal(values: Tensor) -> Map:
    """Return the map that multiplies each feature by a number."""
    return as_map(torch.diag(values))


def select(place: str, value: Node, columns: Any) -> Node:
    """Return some features of a value, by their positions or by a mask."""
    return affine(place, [(value, as_map(identity(value.width)[:, torch.as_tensor(columns)]))])


def constant(place: str, value: Node, result: Tensor) -> Node:
    """Return numbers that do not depend on a value."""
    return affine(place, [(value, torch.zeros(value.width, len(result), dtype=torch.float64))], result)


def stacked(place: str, values: Sequence[Node]) -> Node:
    """Return the features of some values in a row."""
    places = identity(sum(value.width for value in values)).split([value.width for value in values])
    return affine(place, [(value, as_map(part.clone())) for value, part in zip(values, places, strict=True)])


def unsupported(place: str, part: Any, reasons: Mapping[str, tuple[str, str]], instead: str) -> UnsupportedError:
    """Return the error for a part that cannot be imported, with the reason of its class or of its module."""
    kind = type(part)
    if not is_own(part):
        return refuse(place, "is of a class that is not scikit-learn's own", instead)
    names = [kind.__name__, ".".join(kind.__module__.split(".")[:2])]
    found = next((reasons[name] for name in names if name in reasons), None)
    return refuse(place, *(found or ("is not among what can be imported", instead)))
