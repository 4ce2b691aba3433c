"""The compiled kernel and its structures, as the kernel itself describes them (``program.h``)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from struct import Struct
from types import ModuleType
from typing import Any

from hessquik.backends.cpu.build import fingerprint

__all__ = ["CONSTANTS", "KERNEL", "Fields", "pack", "pack_sized"]

#: Fields of a structure by name; those that are missing are zero. A field that is a structure is such a dictionary.
Fields = dict[str, Any]
#: A structure's packer, its fields set to zero, in order, and the structures among them.
_Layout = tuple[Struct, Fields, dict[str, str]]


def _load() -> ModuleType | None:
    """Return the kernel if it was built from the sources in this folder, else ``None``."""
    try:
        kernel = importlib.import_module("hessquik.backends.cpu._kernel")
    except ImportError:
        problem = "was not built"
    else:
        if kernel.sources == fingerprint():
            return kernel
        problem = "was built from other sources and is not used"
    warnings.warn(
        f"the CPU kernel {problem}, so torch evaluates networks, several times more slowly: "
        "install again where there is a C compiler",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _constants(kernel: ModuleType) -> dict[str, int]:
    """Return the kernel's constants: numbered names, a list in each line, and sizes, one in each line."""
    numbered = [(name, i) for line in kernel.numbered.splitlines() for i, name in enumerate(line.split())]
    return dict(numbered) | {name: int(size) for name, size in map(str.split, kernel.sizes.splitlines())}


def _structures(kernel: ModuleType) -> dict[str, _Layout]:
    """Return how each of the kernel's structures is packed: a line has its name, then types and names of fields."""
    formats, zeros = {"I": "q", "double": "d"}, {"I": 0, "double": 0.0}
    found: dict[str, _Layout] = {}
    for line in kernel.structures.splitlines():
        name, *words = line.split()
        fields = dict(zip(words[1::2], words[::2], strict=True))
        packer = Struct("=" + "".join(formats[kind] for kind in fields.values()))
        nested = {field: kind for field, kind in fields.items() if kind not in zeros}
        found[name] = packer, {field: zeros.get(kind, {}) for field, kind in fields.items()}, nested
        formats[name] = f"{packer.size}s"
    return found


KERNEL = _load()
CONSTANTS = {} if KERNEL is None else _constants(KERNEL)
_STRUCTURES = {} if KERNEL is None else _structures(KERNEL)
_WORD_BYTES = 8


def pack(name: str, fields: Fields) -> bytes:
    """Return a structure's bytes.

    Raises:
        AttributeError: the structure has no such field.
    """
    packer, zeros, nested = _STRUCTURES[name]
    values = zeros | fields
    if len(values) != len(zeros):
        raise AttributeError(f"{name} has the fields {', '.join(zeros)}, got {', '.join(fields)}")
    for field, kind in nested.items():
        values[field] = pack(kind, values[field])
    return packer.pack(*values.values())


def pack_sized(name: str, fields: Fields, behind: Iterable[bytes]) -> bytes:
    """Return the bytes of a structure that says its size in words, and of what is behind it."""
    rest = b"".join(behind)
    return pack(name, fields | {"size": (_STRUCTURES[name][0].size + len(rest)) // _WORD_BYTES}) + rest
