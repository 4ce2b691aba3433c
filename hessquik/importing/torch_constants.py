"""Computation of what a program makes of constants alone, such as normalised weights.

Programs may come from files, so that not every operator of torch may run. An operator is first rehearsed on the meta
device, where tensors have shapes but no numbers: each primitive operator that it dispatches to must compute a
function of its arguments, without random numbers and without other effects, and no result may be too large. Only then
it runs on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hessquik.errors import UnsupportedError
from hessquik.importing.graph import refuse

__all__ = ["MAX_NUMBERS", "compute", "expect_bounded", "find", "rehearse"]

#: Numbers of one tensor, as many as the largest file has in float32.
MAX_NUMBERS = 1 << 28
#: Operators that return memory as it is found or need it in a certain order, and those that run in their place.
_INSTEAD = {
    "empty": "zeros",
    "empty_like": "zeros_like",
    "new_empty": "new_zeros",
    "view": "reshape",
    "_unsafe_view": "reshape",
}


def find(target: str) -> Callable[..., Any] | None:
    """Return an ATen operator by its name such as ``aten.add.Tensor``, or ``None`` if there is none.

    Examples:
        >>> find("aten.add.Tensor")(torch.ones(1), 1)
        tensor([2.])
        >>> find("prim.print")
    """
    package, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if package != "aten":
        return None
    found: Any = getattr(torch.ops.aten, _INSTEAD.get(name, name), None)
    found = getattr(found, overload, None) if overload and name not in _INSTEAD else found
    return found if isinstance(found, torch._ops.OpOverload | torch._ops.OpOverloadPacket) else None


def compute(place: str, target: str, args: Sequence[Any], kwargs: Mapping[str, Any], known: Collection[str]) -> Any:
    """Return the result of an operator on constants.

    Args:
        place: The node's name.
        target: The operator.
        args: Its arguments.
        kwargs: Its arguments by name.
        known: Names of primitive operators that may run although torch does not mark them.

    Raises:
        UnsupportedError: the operator does not exist, does more than to compute a function, or makes too large an
            array.
    """
    function = find(target)
    if function is None:
        raise _not_a_function(place, target)
    if target.split(".")[1] in {"item", "_local_scalar_dense"}:
        return args[0].item()
    rehearse(place, function, args, kwargs, known)
    return function(*args, **kwargs)


def rehearse(
    place: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    known: Collection[str] | None = None,
) -> Any:
    """Return the result of an operator on the meta device, or ``None`` if its shape is not known.

    Args:
        place: The node's name.
        function: The operator.
        args: Its arguments.
        kwargs: Its arguments by name.
        known: Names of primitive operators that may run although torch does not mark them; if ``None``, all may, and
            operators that have no shape without numbers are let through.

    Raises:
        UnsupportedError: a primitive operator does more than to compute a function, or makes too large an array.
    """
    try:
        with _Rehearsal(place, known):
            return function(*_on_meta(args), **_on_meta(kwargs))
    except NotImplementedError as error:
        if known is not None:
            raise refuse(
                place,
                "makes an array of constants whose size is not known before their numbers",
                "compute it once, and keep it in a buffer",
            ) from error
    return None


def expect_bounded(place: str, numbers: int) -> None:
    """Refuse too large an array, before it is made."""
    if numbers > MAX_NUMBERS:
        raise refuse(place, f"makes an array of {numbers} numbers", f"keep every array below {MAX_NUMBERS} numbers")


def _on_meta(arguments: Any) -> Any:
    return tree_map(lambda part: part.to("meta") if isinstance(part, Tensor) else part, arguments)


class _Rehearsal(TorchDispatchMode):
    """Checks of every primitive operator: of its kind before it runs, and of the sizes of what it returns.

    Operators that make tensors of their own make them on the meta device.
    """

    def __init__(self, place: str, known: Collection[str] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place, self.known = place, known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.known is not None and not _is_function(func, self.known):
            raise _not_a_function(self.place, str(func))
        makes = any(argument.name == "device" for argument in func._schema.arguments)
        result = func(*args, **(kwargs or {}) | ({"device": "meta"} if makes else {}))
        for part in tree_leaves(result):
            expect_bounded(self.place, part.numel() if isinstance(part, Tensor) else 0)
        return result


def _is_function(operator: Any, known: Collection[str]) -> bool:
    """Return True if a primitive operator computes a function of its arguments, and does nothing else.

    torch marks those of its core set, and functions of single numbers; linear algebra is marked by its names.
    """
    name = operator._schema.name.removeprefix("aten::")
    if operator.namespace != "aten" or torch.Tag.nondeterministic_seeded in operator.tags:
        return False
    is_marked = torch.Tag.core in operator.tags or torch.Tag.pointwise in operator.tags
    return not operator._schema.is_mutable and (is_marked or "linalg" in name or name in known)


def _not_a_function(place: str, target: str) -> UnsupportedError:
    return refuse(
        place,
        f"is computed from constants by {target}, which is not known to be a function of them alone",
        "compute it once, and keep the result in a buffer",
    )
