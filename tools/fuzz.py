"""Looks for input that is not handled, guided by coverage where atheris is installed, else by chance.

python tools/fuzz.py [--seconds N] [TARGET …]

What is found is written into build/fuzz/TARGET; a test comes first, then its file moves to tests/corpus/TARGET.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def guide(name: str, seconds: int, found: Path) -> None:
    """Run a target under atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["service", "hessquik", "hessquik_client"]):
        from tests.fuzzing.targets import CORPUS, MOST_BYTES, TARGETS
    grown = found / "corpus"
    grown.mkdir(exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}", "-rss_limit_mb=4096", "-timeout=20"]
    places = [f"-artifact_prefix={found}/", str(grown), str(CORPUS / name)]
    atheris.Setup([sys.argv[0], *limits, "-verbosity=0", "-print_final_stats=1", *places], TARGETS[name])
    atheris.Fuzz()


def guess(name: str, seconds: int, found: Path) -> None:
    """Run a target with mutations of its corpus."""
    from tests.fuzzing.targets import TARGETS, corpus, mutated

    seeds, draw, count = corpus(name), random.Random(), 0
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        data, count = mutated(seeds, draw), count + 1
        try:
            TARGETS[name](data)
        except Exception:
            (found / f"crash-{count}").write_bytes(data)
            raise
    sys.stdout.write(f"{count} mutations\n")


def main() -> int:
    """Run each target in a separate process, and return how many failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        warnings.simplefilter("ignore")
        (name,) = options.targets
        found = ROOT / "build" / "fuzz" / name
        found.mkdir(parents=True, exist_ok=True)
        (guide if importlib.util.find_spec("atheris") else guess)(name, options.seconds, found)
        return 0
    from tests.fuzzing.targets import TARGETS

    failed = 0
    for name in options.targets or TARGETS:
        sys.stdout.write(f"{name}:\n")
        sys.stdout.flush()
        command = [sys.executable, __file__, "--here", name, "--seconds", str(options.seconds)]
        failed += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
