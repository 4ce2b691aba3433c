"""Servers and questions for chaos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.traffic import Question, questions
from tests.live import LiveServer

FOLDER = Path(__file__).parent
#: A stopped or hanging worker is replaced after this time.
BATCH_TIMEOUT_S = 3
Start = Callable[..., LiveServer]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run chaos in one process: two kinds of chaos at once would measure each other."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("chaos"))


@pytest.fixture(scope="session")
def asked(shipped_models: Path) -> list[Question]:
    """Return requests to all shipped models, with their right answers."""
    return questions(shipped_models, 96, seed=1)


@pytest.fixture(scope="module")
def start(shipped_models: Path) -> Iterator[Start]:
    """Start servers, also of the faulty kind, which are stopped at the end."""
    started: list[LiveServer] = []

    def start(fault: str = "", workers: int = 1, folder: Path = shipped_models, **settings: object) -> LiveServer:
        command = ("-m", "tests.chaos.faulty_serve", fault) if fault else ("-m", "service")
        settings = {"batch_timeout_s": BATCH_TIMEOUT_S, **settings}
        live = LiveServer(folder, workers=workers, settings=settings, command=command)
        started.append(live)
        return live.wait_until_ready()

    yield start
    for live in started:
        live.stop()


@pytest.fixture(scope="session")
def busy(shipped_models: Path) -> Iterator[LiveServer]:
    """Yield a server with two workers, which some tests kill; its users wait until all are ready again."""
    with LiveServer(shipped_models, workers=2, settings={"batch_timeout_s": BATCH_TIMEOUT_S}) as live:
        yield live


def all_ready(server: LiveServer) -> bool:
    """Return whether every worker computes: none is being started, loads its first models, or was lost."""
    states = ("starting", "loading", "dead")
    return not any(server.metric(f'hessquik_workers{{state="{state}"}}') for state in states)
