"""The supervisor tells each front end the table of models and the state of the workers, in an order that holds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service import supervisor as supervisor_module
from service.repository import ModelFile, Served
from service.settings import Settings
from service.supervisor import FrontEnd, Supervisor


class FakeChild:
    """The process of a front end, which records frames and answers none of its own accord."""

    pid = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        self.frames: list[dict[str, Any]] = []

    def write(self, head: dict[str, Any], fields: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self.frames.append(head)


@contextlib.contextmanager
def no_socket(*_: Any) -> Iterator[Any]:
    yield SimpleNamespace(fileno=lambda: 0)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """Return a supervisor of two front ends that have just said hello."""
    monkeypatch.setattr(supervisor_module, "Child", FakeChild)
    monkeypatch.setattr(supervisor_module, "bind", no_socket)
    made = Supervisor(Settings(models=tmp_path, device="cpu", processes=2), ["cpu"])
    for _ in range(2):
        made._start_front()
    return made


def put(supervisor: Supervisor, name: str) -> None:
    """Add a model to the table."""
    repository = supervisor.node.repository
    repository._put(Served(ModelFile(name, 1, Path(name)), next(repository._ids), facts={"d": 1}))


def frames(front: FrontEnd, *kinds: str) -> list[dict[str, Any]]:
    return [head for head in front.child.frames if head["op"] in kinds]  # type: ignore[attr-defined]


def acknowledge(front: FrontEnd) -> None:
    front._on_frame({"op": "told", "number": frames(front, "table")[-1]["number"]}, {})


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(work: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))  # type: ignore[arg-type]


def test_a_new_front_end_gets_the_table_before_it_hears_that_all_is_loaded(supervisor: Supervisor) -> None:
    async def work() -> None:
        put(supervisor, "a")
        supervisor.node.is_loaded = True
        front = supervisor._fronts[0]
        front._on_frame({"op": "hello"}, {})
        await settle()
        acknowledge(front)
        await settle()
        assert [head["op"] for head in frames(front, "table", "health")] == ["table", "health"]
        assert frames(front, "health")[0]["is_loaded"]

    run(work())


def test_all_is_loaded_only_for_a_front_end_that_has_all_of_it(supervisor: Supervisor) -> None:
    """The last model is loaded while a front end applies the table without it."""

    async def work() -> None:
        front = supervisor._fronts[0]
        put(supervisor, "a")
        front._on_frame({"op": "hello"}, {})
        await settle()
        put(supervisor, "b")
        supervisor.node.is_loaded = True
        acknowledge(front)
        await settle()
        assert [head["is_loaded"] for head in frames(front, "health")] == [False]
        telling = asyncio.ensure_future(front.tell())
        await settle()
        assert [one["name"] for one in frames(front, "table")[-1]["served"]] == ["b"]
        acknowledge(front)
        await telling
        assert [head["is_loaded"] for head in frames(front, "health")] == [False, True]

    run(work())


def test_a_load_is_answered_when_a_change_that_is_under_way_is_applied_too(supervisor: Supervisor) -> None:
    async def work() -> None:
        front = supervisor._fronts[0]
        put(supervisor, "a")
        first = asyncio.ensure_future(front.tell())
        await settle()
        second = asyncio.ensure_future(front.tell())
        await settle()
        assert not first.done()
        assert not second.done()
        acknowledge(front)
        await asyncio.gather(first, second)

    run(work())


def test_a_front_end_that_hangs_does_not_keep_news_from_another(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "TICK_S", 0.01)

    async def work() -> None:
        hung, well = supervisor._fronts
        for front in (hung, well):
            front._on_frame({"op": "hello"}, {})
        await settle()
        put(supervisor, "a")
        ticking = asyncio.ensure_future(supervisor._tick())
        while not frames(well, "table"):
            await asyncio.sleep(0.01)
        acknowledge(well)
        count = len(frames(well, "health"))
        while len(frames(well, "health")) < count + 5:
            await asyncio.sleep(0.01)
        assert len(supervisor._tasks) <= 2, "what waits for a front end that hangs does not grow"
        acknowledge(hung)
        ticking.cancel()
        await settle()

    run(asyncio.wait_for(work(), supervisor_module.ANSWER_S / 2))


def test_a_file_that_moved_is_news(supervisor: Supervisor) -> None:
    async def work() -> None:
        front = supervisor._fronts[0]
        put(supervisor, "a")
        for path in ("a", "a/1"):
            supervisor.node.repository._table["a"][1].file = ModelFile("a", 1, Path(path))
            telling = asyncio.ensure_future(front.tell())
            await settle()
            assert frames(front, "table")[-1]["served"][0]["path"] == path
            acknowledge(front)
            await telling

    run(work())
