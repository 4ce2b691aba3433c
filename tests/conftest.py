"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import ROOT, LiveServer


@pytest.fixture(scope="session")
def shipped_models() -> Path:
    """The folder of models that ship with the project."""
    return ROOT / "models"


@pytest.fixture(scope="session")
def server(shipped_models: Path) -> Iterator[LiveServer]:
    """A server of the shipped models, for tests that leave it as it was."""
    with LiveServer(shipped_models, workers=1, settings={"admin_keys": "admin"}) as live:
        yield live
