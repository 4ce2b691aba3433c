"""Versions of what runs, without importing it."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from platform import python_version

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Return the versions of the service, Python and torch, and whether :mod:`service.build` compiled the modules.

    Examples:
        >>> list(versions())
        ['version', 'python', 'torch', 'modules']
    """
    spec = find_spec(f"{__package__}.scheduler")
    is_compiled = spec is not None and (spec.origin or "").endswith(tuple(EXTENSION_SUFFIXES))
    return {
        "version": _version("hessquik-service"),
        "python": python_version(),
        "torch": _version("torch"),
        "modules": "compiled" if is_compiled else "interpreted",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
