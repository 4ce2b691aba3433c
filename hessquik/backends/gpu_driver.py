"""Triton's C module for CUDA, built beforehand for machines without a C compiler, such as the container image.

Triton compiles this module when it meets the first device, from source in its package, and keeps it in its cache. An
image has no compiler, and its cache may be on a file system from which no code may be loaded.

    python -m hessquik.backends.gpu_driver      (with a C compiler and Python's headers; no GPU is needed)
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["build", "main", "use"]

FOLDER = Path(__file__).parent


def build(folder: Path = FOLDER) -> Path:
    """Build the module of the installed Triton, and return its path.

    Args:
        folder: Where to write it.

    Raises:
        subprocess.CalledProcessError: the compiler fails.
    """
    from triton.backends.nvidia import driver

    source = Path(driver.dirname, "driver.c").read_text()
    compiler = os.environ.get("CC", "cc")
    with tempfile.TemporaryDirectory() as work:
        # The driver's own library is on machines with a GPU alone; to link, one of its name without functions will do.
        name = "libcuda.so.1"
        library = [compiler, "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", f"{work}/{name}"]
        subprocess.run(library, check=True)
        path = Path(work, "cuda_utils.c")
        path.write_text(source)
        include = [*driver.include_dirs, sysconfig.get_path("include")]
        module = _path(folder, "cuda_utils", source)
        subprocess.run(
            [compiler, path, "-O3", "-shared", "-fPIC", "-Wno-psabi", *(f"-I{each}" for each in include), f"-L{work}",
             "-Wl,--no-as-needed", f"-l:{name}", "-o", module],
            check=True,
        )  # fmt: skip
    return module


def use(folder: Path = FOLDER) -> None:
    """Let Triton load the module that was built beforehand, if it is of the same source."""
    from triton.backends.nvidia import driver
    from triton.runtime import build as compiling

    def find(src: str, name: str, *arguments: Any, **options: Any) -> Any:
        path = _path(folder, name, src)
        if path.exists():
            return compiling._load_module_from_path(name, str(path))
        return compiling.compile_module_from_src(src, name, *arguments, **options)

    driver.compile_module_from_src = find


def _path(folder: Path, name: str, source: str) -> Path:
    """Return the path of a module for this Python and this source."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return folder / f"_{name}_{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"


def main() -> None:
    """Build the module, if Triton is installed."""
    if find_spec("triton") is None:
        print("Triton is not installed: there is nothing to build")
        return
    print(build())


if __name__ == "__main__":
    main()
