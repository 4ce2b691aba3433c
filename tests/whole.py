"""The size of long tests, short or whole, and the figures that they report."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")
#: ``CHAOS=whole`` runs every count in full, as ``make chaos`` does.
IS_WHOLE = os.environ.get("CHAOS") == "whole"
PROPERTY = "figures"
Note = Callable[[str], None]


def choose(short: T, whole: T) -> T:
    """Return ``whole`` in ``make chaos``, else ``short``."""
    return whole if IS_WHOLE else short


def figures(reporter: pytest.TerminalReporter) -> None:
    """Print what tests noted, one line each, at the end of the run."""
    lines = [
        f"{report.head_line}: {value}"
        for outcome in ("passed", "failed")
        for report in reporter.getreports(outcome)
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if lines:
        reporter.section(f"figures, {'whole' if IS_WHOLE else 'short'} form")
        for line in lines:
            reporter.line(line)
