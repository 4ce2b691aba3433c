"""The compiled kernel and its structures, as the kernel itself describes them (``program.h``)."""

from __future__ import annotations

import ctypes
import importlib
import warnings
from ctypes import Structure, c_double, c_int64
from types import ModuleType
from typing import Any

from hessquik.backends.cpu.build import fingerprint

__all__ = ["CONSTANTS", "KERNEL", "make"]


def _load() -> ModuleType | None:
    """Return the kernel if it was built from the sources in this folder, else ``None``."""
    try:
        kernel = importlib.import_module("hessquik.backends.cpu._kernel")
    except ImportError:
        warnings.warn(
            "the CPU kernel was not built, so torch evaluates networks, several times more slowly: "
            "install again where there is a C compiler",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if kernel.sources != fingerprint():
        warnings.warn(
            "the CPU kernel was built from other sources and is not used, so torch evaluates networks, several times "
            "more slowly: install again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernel


def _structures(rows: dict[str, tuple[int, tuple[tuple[str, str, int], ...]]]) -> dict[str, type[Structure]]:
    """Return ctypes classes with the kernel's fields, in order of their use."""
    types: dict[str, Any] = {"I": c_int64, "double": c_double}
    for name, (size, fields) in rows.items():
        types[name] = type(name, (Structure,), {"_fields_": [(field, types[kind]) for field, kind, _ in fields]})
        found = [getattr(types[name], field).offset for field, _, _ in fields]
        if ctypes.sizeof(types[name]) != size or found != [offset for _, _, offset in fields]:
            raise ImportError(f"the kernel lays out {name} in another way than ctypes")
    return types


KERNEL = _load()
_INTERFACE = ({}, {}) if KERNEL is None else KERNEL.interface()
CONSTANTS = _INTERFACE[1]
_TYPES = _structures(_INTERFACE[0])


def make(name: str, **values: Any) -> Any:
    """Return a structure with some fields set and the others zero."""
    structure = _TYPES[name]()
    for field, value in values.items():
        getattr(structure, field)  # a field of another name would be a new attribute
        setattr(structure, field, value)
    return structure
