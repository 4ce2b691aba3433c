"""Removes from an environment what the service never uses, and writes the licences of what is left into one file.

    python trim.py /opt/hessquik

Run once in the image's layer of dependencies; ``make image-test`` shows that nothing misses it.
"""

from __future__ import annotations

import sys
from email.parser import HeaderParser
from pathlib import Path

#: torch's tests, headers and tools for building extensions; what plotly has besides the JavaScript that pages load.
UNUSED = ("torch/test", "torch/include", "torch/bin", "torch/share", "plotly")
#: Of these: torch looks for the one when it is imported, the pages load the other.
KEPT = {"torch/bin/torch_shm_manager", "plotly/__init__.py", "plotly/package_data/plotly.min.js"}
LICENCES = "THIRD_PARTY_LICENSES.txt"


def trim(packages: Path) -> int:
    """Remove what is unused, and return how many bytes that were."""
    removed = 0
    for path in (path for name in UNUSED for path in (packages / name).rglob("*") if path.is_file()):
        if path.relative_to(packages).as_posix() not in KEPT:
            removed += path.lstat().st_size
            path.unlink()
    return removed


def gather_licences(packages: Path) -> str:
    """Return name, version and the texts of the licence of every installed package."""
    parts = []
    for folder in sorted(packages.glob("*.dist-info")):
        head = HeaderParser().parsestr((folder / "METADATA").read_text(errors="replace"))
        licence = head["License-Expression"] or head["License"] or "see below"
        texts = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and path.name.upper().startswith(("LICEN", "COPYING", "NOTICE"))
        )
        parts.append(f"{'=' * 100}\n{head['Name']} {head['Version']}: {licence.splitlines()[0]}\n")
        parts += [f"\n--- {path.relative_to(folder)}\n{path.read_text(errors='replace').strip()}\n" for path in texts]
    return "\n".join(parts)


def main(environment: Path) -> None:
    """Trim an environment, and write the licences into it."""
    (packages,) = environment.glob("lib/python3.*/site-packages")
    removed = trim(packages)
    (environment / LICENCES).write_text(gather_licences(packages))
    sys.stdout.write(f"{removed / 1e6:.0f} MB removed\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
