"""Builds the kernel with a fingerprint of its sources, by which it is recognised when it is loaded.

setuptools runs this file alone, before the package can be imported.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

try:
    from setuptools.command.build_ext import build_ext
except ImportError:  # an installed kernel needs no setuptools
    build_ext = object

__all__ = ["BuildKernel", "fingerprint"]

FOLDER = Path(__file__).parent


def fingerprint() -> str:
    """Return a digest of the C sources beside this file."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class BuildKernel(build_ext):  # type: ignore[misc]
    """Compiles the kernel's sources with their fingerprint."""

    def build_extension(self, ext: Any) -> None:
        """Define HESSQUIK_SOURCES, which the module shows as ``sources``.

        With ``HESSQUIK_KERNEL=required`` in the environment a kernel that does not build is an error.
        """
        if ext.name.endswith("_kernel"):
            ext.optional = os.environ.get("HESSQUIK_KERNEL") != "required"
            ext.define_macros.append(("HESSQUIK_SOURCES", f'"{fingerprint()}"'))
        super().build_extension(ext)
