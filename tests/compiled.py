"""Builds the packages with compiled modules, as an operator does, for tests and benchmarks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.live import ROOT

__all__ = ["COMMAND", "build"]

#: Starts the installed command; with ``-P`` the checkout that is the working directory is not imported.
COMMAND = ("-P", "-m", "hessquik_service")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "hessquik", "hessquik_client", "service")


def build(folder: Path) -> Path:
    """Build a wheel from a copy of the checkout, and return the folder in which its packages are."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    environment = {**os.environ, "HESSQUIK_COMPILE": "1", "HESSQUIK_KERNEL": "required"}
    done = subprocess.run(
        [*pip, "--wheel-dir", folder, source], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    packages = folder / "packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return packages
