"""The service with compiled modules answers as the same source does, and keeps nothing of requests either."""

from __future__ import annotations

import asyncio
import importlib.machinery
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from service.build import COMPILED
from tests import compiled
from tests.chaos.test_endings import GROWTH_BYTES, growth
from tests.chaos.traffic import Ledger, Traffic, questions, run
from tests.live import LiveServer
from tests.raw import Reply
from tests.service.random_requests import draw
from tests.service.test_same_replies import comparable, make_models, over_a_connection
from tests.whole import Note, choose

pytestmark = pytest.mark.xdist_group("compiled")

REQUESTS, ASKED = choose((300, 2_000), (4_000, 50_000))
#: What differs between two replies to the same request: the id that the service made.
ID = re.compile(rb'"request_id": ?"[^"]*"')


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.build(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def folder(shipped_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(shutil.copytree(shipped_models, tmp_path_factory.mktemp("models"), dirs_exist_ok=True))


@pytest.fixture(scope="module")
def server(packages: Path, folder: Path) -> Iterator[LiveServer]:
    with LiveServer(folder, command=compiled.COMMAND, packages=packages) as live:
        yield live


def test_the_modules_are_compiled_and_the_wheel_says_for_which_python(packages: Path, server: LiveServer) -> None:
    code = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *COMPILED],
        env={"PYTHONPATH": str(packages)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = done.stdout.split()
    assert len(files) == len(COMPILED)
    assert all(file.startswith(str(packages)) for file in files)
    assert all(file.endswith(importlib.machinery.EXTENSION_SUFFIXES[0]) for file in files)
    assert "compiled modules" in server.log[0]
    (wheel,) = packages.parent.glob("*.whl")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name


def steady(reply: Reply) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return what has to be the same in the replies of two servers."""
    status, fields, body = comparable(reply)
    return status, [field for field in fields if field[0] != "x-request-id"], ID.sub(b"", body)


@pytest.mark.slow
def test_both_give_the_same_replies(server: LiveServer, folder: Path, note: Note) -> None:
    statuses: Counter[int] = Counter()
    random = Random(21)

    async def compare(other: LiveServer) -> None:
        for number in range(REQUESTS):
            request = draw(random, number)
            one, two = [await over_a_connection(port, request) for port in (server.port, other.port)]
            assert steady(one) == steady(two), request
            statuses[one.status] += 1

    with LiveServer(folder) as other:
        asyncio.run(compare(other))
    note(f"{REQUESTS} requests, by status: {dict(sorted(statuses.items()))}")
    assert statuses[200] > REQUESTS / 3
    assert {400, 404, 405, 406, 415, 422} <= statuses.keys()


def test_every_answer_is_right_among_malformed_and_abandoned_requests(
    server: LiveServer, shipped_models: Path, note: Note
) -> None:
    ledger = Ledger()
    asked = questions(shipped_models, 48, seed=3)
    traffic = Traffic(server.port, asked, ledger, disconnects=0.2, malformed=0.05, retries=6, seed=4)
    run(traffic.run(clients=16, requests=ASKED))
    note(str(ledger))
    assert ledger.sent >= ASKED
    assert (ledger.wrong, ledger.lost, ledger.failed, ledger.closed, ledger.refused) == (0, 0, 0, 0, 0), ledger


def test_requests_leave_no_memory_behind_however_they_end(server: LiveServer, note: Note) -> None:
    assert growth(server, note) <= GROWTH_BYTES
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line], "\n".join(server.log)
