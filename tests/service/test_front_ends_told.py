"""The supervisor tells each front end the table of models and the state of the workers, in an order that holds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from service import child as child_module
from service import supervisor as supervisor_module
from service import wire
from service.repository import ModelFile, Served
from service.settings import Settings
from service.supervisor import FrontEnd, Supervisor


class FakeChild:
    """The process of a front end, which records frames and answers none of its own accord."""

    pid = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        self.frames: list[dict[str, Any]] = []
        self.kills = 0

    def write(self, head: dict[str, Any], fields: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sending = threading.Thread(target=wire.send, args=(ours, head, fields))
            sending.start()
            receiver, received = wire.Receiver(theirs), list[wire.Frame]()
            while not received:
                received = receiver.receive() or []
            sending.join()
        ((head, fields),) = received
        self.frames.append(head | orjson.loads(fields.get("news", b"{}")))

    def kill(self) -> None:
        self.kills += 1

    def wait(self) -> int:
        return 1


@contextlib.contextmanager
def no_socket(*_: Any, **__: Any) -> Iterator[Any]:
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


def put(supervisor: Supervisor, name: str, facts: dict[str, Any] | None = None) -> None:
    """Add a model to the table."""
    repository = supervisor.node.repository
    repository._put(Served(ModelFile(name, 1, Path(name)), next(repository._ids), facts=facts or {"d": 1}))


def frames(front: FrontEnd, *kinds: str) -> list[dict[str, Any]]:
    return [head for head in front.child.frames if head["op"] in kinds]  # type: ignore[attr-defined]


def acknowledge(front: FrontEnd) -> None:
    front._on_frame({"op": "told", "number": frames(front, "state")[-1]["number"]}, {})


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(work: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))  # type: ignore[arg-type]


def test_a_new_front_end_gets_the_table_and_the_state_of_the_same_moment(supervisor: Supervisor) -> None:
    """The last model is loaded while a front end applies the table without it."""

    async def work() -> None:
        front = supervisor._fronts[0]
        put(supervisor, "a")
        front._on_frame({"op": "hello"}, {})
        await settle()
        put(supervisor, "b")
        supervisor.node.is_loaded = True
        telling = asyncio.ensure_future(front.tell())
        for news in ((["a"], False), (["b"], True)):
            await settle()
            state = frames(front, "state")[-1]
            assert ([one["name"] for one in state["served"]], state["health"]["is_loaded"]) == news
            acknowledge(front)
        await telling
        assert len(frames(front, "state")) == 2

    run(work())


def test_a_table_of_thousands_of_models_fits_into_a_frame(supervisor: Supervisor) -> None:
    async def work() -> None:
        front = supervisor._fronts[0]
        for number in range(3000):
            put(supervisor, f"model{number}", {"d": 1, "architecture": "x" * 2000})
        telling = asyncio.ensure_future(front.tell())
        await settle()
        assert len(frames(front, "state")[-1]["served"]) == 3000
        acknowledge(front)
        await telling

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


def test_a_front_end_that_hangs_does_not_keep_news_from_another_and_gets_no_more_frames(
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
        for number in range(5):
            while len(frames(well, "state")) <= number:
                await asyncio.sleep(0.01)
            acknowledge(well)
        assert [one["name"] for frame in frames(well, "state") for one in frame["served"]] == ["a"]
        assert len(frames(hung, "state")) == 1, "frames for a front end that hangs do not pile up"
        assert len(supervisor._tasks) <= 2, "nor does what waits for it"
        ticking.cancel()
        await settle()

    run(asyncio.wait_for(work(), supervisor_module.HANG_S / 2))


@pytest.mark.parametrize("is_there", [False, True])
def test_a_front_end_that_does_not_answer_is_killed(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """But not one whose answer is there, unread, when this process goes on after it was stopped."""
    monkeypatch.setattr(supervisor_module, "HANG_S", 0.05)

    async def work() -> None:
        front = supervisor._fronts[0]
        front.is_up = True
        telling = asyncio.ensure_future(front.tell())
        await settle()
        if is_there:
            asyncio.get_running_loop().call_later(0.06, acknowledge, front)
        await telling
        assert front.child.kills == (not is_there)  # type: ignore[attr-defined]
        assert front.is_told

    run(work())


def test_front_ends_that_die_before_their_first_answer_are_given_up(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say hello, so that only an answer shows that they can be kept alive."""
    monkeypatch.setattr(child_module, "FIRST_PAUSE_S", 0.0)

    async def die(answers_first: bool) -> None:
        front = supervisor._fronts[-1]
        front._on_frame({"op": "hello"}, {})
        await settle()
        if answers_first:
            acknowledge(front)
        front._on_lost()
        while len(supervisor._fronts) < 2 and not supervisor._is_given_up:
            await asyncio.sleep(0.001)

    async def work() -> None:
        for number in range(3 * supervisor_module.MAX_DEATHS):
            await die(answers_first=number % 4 == 3)
        assert not supervisor._is_given_up
        for _ in range(supervisor_module.MAX_DEATHS - 1):  # and the last of those before
            assert not supervisor._is_given_up
            await die(answers_first=False)
        assert supervisor._is_given_up
        assert supervisor._fronts[0].child.kills == 0  # type: ignore[attr-defined]

    run(work())


def test_a_command_that_fails_is_answered(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of a front end would wait for an answer that never comes."""

    async def fail(_: str) -> None:
        raise RuntimeError("not foreseen")

    async def work() -> None:
        front = supervisor._fronts[0]
        monkeypatch.setattr(supervisor.node, "load", fail)
        front._on_frame({"op": "load", "number": 7, "name": "a"}, {})
        await settle()
        (reply,) = frames(front, "replied")
        assert (reply["number"], reply["error"]["code"]) == (7, "internal_error")
        assert "foreseen" not in str(reply)

    run(work())


def test_a_file_that_moved_and_one_that_was_refused_are_news(supervisor: Supervisor) -> None:
    async def work() -> None:
        front = supervisor._fronts[0]
        put(supervisor, "a")
        for path, is_outdated in (("a", False), ("a/1", False), ("a/1", True)):
            one = supervisor.node.repository._table["a"][1]
            one.file, one.is_outdated = ModelFile("a", 1, Path(path)), is_outdated
            telling = asyncio.ensure_future(front.tell())
            await settle()
            (news,) = frames(front, "state")[-1]["served"]
            assert (news["path"], news["is_outdated"]) == (path, is_outdated)
            acknowledge(front)
            await telling

    run(work())


def text(total: float, waiting: float) -> bytes:
    """Return the metrics of a front end that has answered and holds so many requests."""
    return (
        f"# HELP hessquik_requests_total Requests.\n# TYPE hessquik_requests_total counter\n"
        f'hessquik_requests_total{{status="200"}} {total}\n'
        f"# HELP hessquik_queue_requests Requests.\n# TYPE hessquik_queue_requests gauge\n"
        f"hessquik_queue_requests {waiting}\n"
        f"# HELP hessquik_device_busy_seconds_total Time.\n# TYPE hessquik_device_busy_seconds_total counter\n"
        f'hessquik_device_busy_seconds_total{{worker="0"}} {total}\n'
    ).encode()


def test_counters_never_fall_and_gauges_vanish_with_a_front_end_that_hangs_or_dies(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's counters are those of the node, which front ends that are well report."""
    monkeypatch.setattr(supervisor_module, "REPORT_S", 0.05)
    monkeypatch.setattr(supervisor_module, "TICK_S", 0.01)
    monkeypatch.setattr(child_module, "FIRST_PAUSE_S", 0.0)

    async def scrape(*reports: tuple[float, float], dies: FrontEnd | None = None) -> tuple[float, ...]:
        """Scrape while the last front ends answer with their reports, and one may die meanwhile."""
        scraping = asyncio.ensure_future(supervisor._metrics())
        await settle()
        up = [front for front in supervisor._fronts if front.is_up]
        for front, report in zip(reversed(up), reversed(reports), strict=False):
            number = frames(front, "report")[-1]["number"]
            front._on_frame({"op": "reported", "number": number}, {"text": text(*report)})
        if dies is not None:
            dies._on_lost()
        lines = (await scraping).decode().splitlines()
        return tuple(float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#"))

    async def work() -> None:
        for front in supervisor._fronts:
            front.is_up = True
        victim = supervisor._fronts[0]
        assert await scrape((100, 3), (90, 4)) == (190, 7, 100)
        assert await scrape((95, 4)) == (195, 4, 95), "the first one hangs"
        assert await scrape((105, 1), (96, 2)) == (201, 3, 105)
        assert await scrape((97, 2), dies=victim) == (202, 2, 97), "it is counted once"
        assert await scrape((98, 2)) == (203, 2, 98)
        await settle()
        while len(supervisor._fronts) < 2:
            await asyncio.sleep(0.001)
        supervisor._fronts[1].is_up = True
        assert await scrape((99, 0), (5, 1)) == (209, 1, 99)
        telling = asyncio.ensure_future(supervisor._fronts[0].tell())
        await settle()
        assert frames(supervisor._fronts[0], "state")[-1]["health"]["front_restarts"] == 1
        acknowledge(supervisor._fronts[0])
        await telling

    run(work())
