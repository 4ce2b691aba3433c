"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live import ROOT, LiveServer
from tests.whole import PROPERTY, Note, figures

#: Need the original library, Keras and JAX's exporters, which are not installed beside ours.
collect_ignore = ["fixtures/make_original.py", "fixtures/make_exported.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run each file in one process, so that its servers are started once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def shipped_models() -> Path:
    """The folder of models that ship with the project."""
    return ROOT / "models"


@pytest.fixture(scope="session")
def server(shipped_models: Path) -> Iterator[LiveServer]:
    """A server of the shipped models, for tests that leave it as it was."""
    with LiveServer(shipped_models, workers=1, settings={"admin_keys": "admin"}) as live:
        yield live


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Note a line of figures, which is printed at the end of the run."""
    return lambda line: record_property(PROPERTY, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Close with the figures."""
    figures(terminalreporter)
