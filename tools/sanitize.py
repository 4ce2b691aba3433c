"""Builds the C kernel with sanitizers and runs random programs and networks with it; the first fault ends it.

python tools/sanitize.py [--short]

Bounds and undefined behaviour are watched on one thread, data races on eight. In the short form only the vectors that
every processor has are compiled, and without optimisation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hessquik.backends.cpu.build import fingerprint  # noqa: E402


@dataclass(frozen=True)
class Sanitizer:
    """A way to build and run.

    Attributes:
        flags: Of the compiler.
        libraries: The runtimes that are loaded before Python.
        cases, threads: How much is run.
        before: What the command begins with.
    """

    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    cases: int
    threads: int
    before: tuple[str, ...] = ()


BOUNDS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
SHORT = (Sanitizer(("-O0", "-DHESSQUIK_GENERIC", *BOUNDS), ("asan", "ubsan"), 12, 1),)
WHOLE = (
    Sanitizer(("-O1", *BOUNDS), ("asan", "ubsan"), 400, 1),
    # Its memory has fixed places, which a randomised address space may take.
    Sanitizer(("-O1", "-fsanitize=thread"), ("tsan",), 40, 8, ("setarch", "-R")),
)


def run(sanitizer: Sanitizer, compiler: str, folder: Path) -> None:
    """Build the kernel and run the cases.

    Raises:
        subprocess.CalledProcessError: the compiler or the sanitizer found a fault.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (module,) = project["tool"]["setuptools"]["ext-modules"]
    flags = [flag for flag in module["extra-compile-args"] if not flag.startswith(("-O", "-g"))]
    kernel = folder / "kernel.so"
    subprocess.run(
        [
            compiler, *flags, "-g1", *sanitizer.flags, "-fPIC", "-shared", f"-I{sysconfig.get_path('include')}",
            f'-DHESSQUIK_SOURCES="{fingerprint()}"', *(str(ROOT / source) for source in module["sources"]),
            "-o", str(kernel), "-lm",
        ],
        check=True,
    )  # fmt: skip
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(_runtime(compiler, library) for library in sanitizer.libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    script = str(ROOT / "tests" / "engine" / "sanitized.py")
    command = [sys.executable, "-W", "ignore", script, str(kernel), str(sanitizer.cases), str(sanitizer.threads)]
    subprocess.run([*sanitizer.before, *command], env=environment, check=True)


def _runtime(compiler: str, library: str) -> str:
    """Return the path of a sanitizer's runtime."""
    command = [compiler, f"-print-file-name=lib{library}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Run the requested checks."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--short", action="store_true")
    compiler = shutil.which("gcc")
    if compiler is None:
        sys.exit("expected gcc and its sanitizers, found none")
    for sanitizer in SHORT if arguments.parse_args().short else WHOLE:
        with tempfile.TemporaryDirectory() as folder:
            run(sanitizer, compiler, Path(folder))


if __name__ == "__main__":
    main()
