"""Versions of the installed packages, from their metadata, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from platform import python_version

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Return the versions of the service, Python and torch.

    Examples:
        >>> list(versions())
        ['version', 'python', 'torch']
    """
    return {"version": _version("hessquik-service"), "python": python_version(), "torch": _version("torch")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
