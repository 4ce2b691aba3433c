"""The C kernel under AddressSanitizer and UBSan for a few programs; ``make sanitize`` runs all of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layering import ROOT


def has_sanitizers():
    """Return whether gcc and the sanitizers' runtime libraries are installed."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        return False
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=False, capture_output=True, text=True)
        for name in names
    ]
    return all(Path(one.stdout.strip()).is_absolute() for one in found)


@pytest.mark.skipif(not has_sanitizers(), reason="needs gcc with libasan and libubsan")
def test_random_programs_and_networks_leave_no_fault():
    command = [sys.executable, str(ROOT / "tools" / "sanitize.py"), "--short"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "no fault" in done.stdout
