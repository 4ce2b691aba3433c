"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
import inspect
import os
import re
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.live import ROOT, LiveServer
from tests.whole import IS_WHOLE, PROPERTY, Note, figures

#: Signs of a test that starts processes, or of Triton's interpreter, which is as slow.
PROCESSES = re.compile(r"LiveServer|subprocess|Popen|ray\.init|chaos\.conftest|triton_interpreter|\bzoo\b|\bpage\b")
#: Parts of the names of files that take more than a minute, or half a minute.
LONG = (
    "chaos", "simulation", "browser", "test_docs", "test_triton_backend", "service/test_connection", "test_proof",
    "test_workers.py", "deployment", "test_openapi", "test_processes", "test_hostile_servers", "test_cpu_backend",
    "test_evaluator", "test_batch_invariance", "test_memory", "test_operation", "importing", "clients",
)  # fmt: skip
#: Need the original library, Keras and JAX's exporters, which are not installed beside ours.
collect_ignore = ["fixtures/make_original.py", "fixtures/make_exported.py"]
# The environment changes no test: all servers are on this machine, and what is printed is compared. It is set here
# because some clients are made while tests are collected.
for _name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE"):
    os.environ.pop(_name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of ``make quick``."""
    parser.addoption("--quick", action="store_true", help="the first case of each test that starts no process")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests with the garbage collector off: nothing of what is imported is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file for ``make quick`` in which something starts a process: others' packages take seconds."""
    is_file = collection_path.suffix == ".py" and collection_path.name != "conftest.py"
    return True if is_file and config.getoption("quick") and _starts_processes(collection_path) else None


@cache
def _starts_processes(path: Path) -> bool:
    return PROCESSES.search(path.read_text()) is not None


def _is_quick(item: pytest.Item) -> bool:
    """Return whether a test is not marked slow, and nothing in its file starts a process."""
    return item.get_closest_marker("slow") is None and not _starts_processes(item.path)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run each file in one process, so that its servers are started once; drop what this form leaves out."""
    kept = [item for item in items if IS_WHOLE or item.get_closest_marker("whole") is None]
    if config.getoption("quick"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(kept)}
        kept = [item for item in kept if first[item.nodeid.partition("[")[0]] is item and _is_quick(item)]
    if len(kept) < len(items):
        dropped = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = kept
    # Files that take long first, so that at the end no process waits long for the other.
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in item.nodeid), len(LONG)))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let httpx read no certificates for each of its clients, which takes tens of milliseconds: no test needs one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("certificates")))
        yield


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """Let httpx wait for answers of a busy machine for a minute where a test says nothing, not for five seconds."""
    import httpx

    usual = inspect.signature(httpx.get).parameters["timeout"].default  # one object for all of httpx
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "read", "write", "pool"):
            patch.setattr(usual, name, 60.0)
        yield


@pytest.fixture(scope="session")
def shipped_models() -> Path:
    """Return the folder of models that ship with the project."""
    return ROOT / "models"


@pytest.fixture(scope="session")
def server(shipped_models: Path) -> Iterator[LiveServer]:
    """Yield a server of the shipped models, for tests that do not change it."""
    with LiveServer(shipped_models, workers=1, settings={"admin_keys": "admin"}) as live:
        yield live


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Note a line of figures, which is printed at the end of the run."""
    return lambda line: record_property(PROPERTY, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Close with the figures."""
    figures(terminalreporter)
