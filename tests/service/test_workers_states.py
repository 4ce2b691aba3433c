"""Workers that die, hang, refuse or cannot be started: simulated processes, a clock that is set."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hessquik_client.errors import StartUpError
from service import child
from service import workers as module
from service.settings import Settings
from service.wire import Channel
from service.workers import (
    MAX_DEATHS,
    MAX_FIRST_DEATHS,
    TRANSITIONS,
    LoadError,
    RunningClock,
    State,
    WorkerProcess,
    Workers,
)

FACTS = {"d": 2, "m": 1, "dtype": "float64"}


class Process:
    """A stand-in for a worker's process, with prepared answers.

    Attributes:
        mute: Operations that are not answered.
        refuses: Models that are refused, and why.
        dies_of: Models whose loading ends it.
    """

    mute: set[str]
    pid = 12345

    def __init__(self, test: Supervised, on_frame: Callable[..., None], on_lost: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair()
        self.test, self.mute = test, set(test.mute)
        self.heard: list[dict[str, Any]] = []
        self.busy_s = self.stalled_s = 0.0
        self.is_killed = False
        self.channel = Channel(ours, self.hear, self.end, most_fds=1)
        self.other_end = Channel(theirs, on_frame, on_lost)
        test.processes.append(self)
        self.say({"op": "ready"})

    def say(self, head: dict[str, Any]) -> None:
        if head["op"] not in self.mute:
            self.channel.write(head, {})

    def hear(self, head: dict[str, Any], fields: dict[str, Any]) -> None:
        self.heard.append(head)
        match head["op"]:
            case "load" if head["model"] in self.test.dies_of:
                self.end()
            case "load" if head["model"] in self.test.refuses:
                self.say({"op": "loaded", "model": head["model"], "error": self.test.refuses[head["model"]]})
            case "load":
                self.say({"op": "loaded", "model": head["model"], **FACTS})
            case "ping":
                self.say(
                    {
                        "op": "pong",
                        "memory_bytes": 7,
                        "checked_rows": 3,
                        "busy_s": self.busy_s,
                        "busy_total_s": 0.25,
                        "stalled_s": self.stalled_s,
                    }
                )
            case "attach":
                os.close(head["fds"][0])

    def end(self) -> None:
        self.channel.close()

    def kill(self) -> None:
        self.is_killed = True
        self.channel.close()

    def write(self, *frame: Any) -> None:
        self.other_end.write(*frame)

    def close(self) -> None:
        self.other_end.close()

    def connect(self, head: dict[str, Any]) -> socket.socket:
        if self.test.fails_to_connect:
            self.test.fails_to_connect -= 1
            raise OSError(24, "Too many open files")
        ours, theirs = socket.socketpair()
        with theirs:
            self.write(head, {}, (theirs.fileno(),))
        return ours

    def wait(self, timeout_s: float) -> int:
        self.channel.close()
        return -9

    def loads(self) -> list[int]:
        return [head["model"] for head in self.heard if head["op"] == "load"]


class Supervised:
    """Workers of simulated processes, and what they tell their owner."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 1, **settings: Any) -> None:
        self.now = 100.0
        self.mute: set[str] = set()
        self.refuses: dict[int, str] = {}
        self.dies_of: set[int] = set()
        self.fails_to_start = self.fails_to_connect = 0
        self.processes: list[Process] = []
        self.attached: list[WorkerProcess] = []
        self.refused: list[tuple[int, str]] = []
        self.is_given_up = False
        monkeypatch.setattr(child, "FIRST_PAUSE_S", 0.0)
        monkeypatch.setattr(module, "TICK_S", 0.005)
        self.checks, check_all = 0, Workers._check_all

        def counted(workers: Workers) -> None:
            check_all(workers)
            self.checks += 1

        monkeypatch.setattr(Workers, "_check_all", counted)
        self.workers = Workers(self, ["cpu"] * count, Settings(**settings), lambda: self.now, self.spawn)

    def spawn(self, module: str, arguments: list[str], on_frame: Any, on_lost: Any, blocked: Any) -> Any:
        if self.fails_to_start:
            self.fails_to_start -= 1
            raise OSError(11, "Resource temporarily unavailable")
        return Process(self, on_frame, on_lost)

    def attach(self, worker: WorkerProcess) -> None:
        self.attached.append(worker)
        worker.connect().close()

    def refuse(self, model: int, why: str) -> None:
        self.refused.append((model, why))

    def give_up(self) -> None:
        self.is_given_up = True

    def run(self, work: Callable[[], Awaitable[None]]) -> None:
        async def whole() -> None:
            try:
                await asyncio.wait_for(work(), 20)
            finally:
                await self.workers.close()
                for process in self.processes:
                    process.channel.close()

        asyncio.run(whole())

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await asyncio.sleep(0.005)

    async def pass_time(self, seconds: float) -> None:
        """Move the clock on while workers are checked, and pings go to and fro."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.3)
            for checks in (self.checks + 1, self.checks + 2):
                await self.until(lambda checks=checks: self.checks >= checks)
                for _ in range(10):  # turns of the loop in which a ping is answered
                    await asyncio.sleep(0)

    def states(self) -> list[State]:
        return [worker.state for worker in self.workers.workers]


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Supervised]:
    return lambda *arguments, **settings: Supervised(monkeypatch, *arguments, **settings)


def test_every_state_leads_to_death_and_nothing_leads_back() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(State.DEAD in targets for state, targets in TRANSITIONS.items() if state is not State.DEAD)
    assert TRANSITIONS[State.DEAD] == set()


def test_a_worker_is_used_when_it_has_all_models(supervised: Callable[..., Supervised]) -> None:
    sim = supervised()

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: sim.attached)
        assert await sim.workers.load(7, b"file") == FACTS
        sim.mute = {"loaded"}
        sim.processes[0].end()
        await sim.until(lambda: len(sim.processes) == 2 and sim.processes[1].loads() == [7])
        assert sim.states() == [State.LOADING]
        assert not sim.workers.is_fresh()
        assert len(sim.attached) == 1
        sim.processes[1].mute = set()
        sim.processes[1].say({"op": "loaded", "model": 7, **FACTS})
        await sim.until(lambda: len(sim.attached) == 2)
        assert sim.states() == [State.READY]
        assert sim.workers.is_fresh()

    sim.run(work)


def test_one_worker_after_the_other_loads(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(3)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: len(sim.attached) == 3)
        for process in sim.processes:
            process.mute = {"loaded"}
        loading = asyncio.ensure_future(sim.workers.load(7, b"file"))
        for number, process in enumerate(sim.processes):
            await sim.until(process.loads)
            await asyncio.sleep(0.03)
            assert [len(one.loads()) for one in sim.processes] == [1] * (number + 1) + [0] * (2 - number)
            assert not loading.done()
            assert set(sim.states()) == {State.READY}, "a worker that loads is ready all the while"
            process.mute = set()
            process.say({"op": "loaded", "model": 7, **FACTS})
        assert await loading == FACTS

    sim.run(work)


def test_a_second_workers_refusal_refuses_the_model(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(2)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: len(sim.attached) == 2)
        sim.processes[1].test = other = supervised(1)
        other.refuses = {7: "too large for this device"}
        with pytest.raises(LoadError, match="too large for this device"):
            await sim.workers.load(7, b"file")
        await sim.until(lambda: any(head["op"] == "unload" for head in sim.processes[0].heard))
        assert sim.refused == [], "whoever loads it is told, nobody else"

    sim.run(work)


def test_a_successors_refusal_ends_a_model_that_is_served(supervised: Callable[..., Supervised]) -> None:
    """It cannot go on to be called ready while no worker is there that has it."""
    sim = supervised(2)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: len(sim.attached) == 2)
        await sim.workers.load(7, b"file")
        sim.refuses = {7: "out of memory"}
        sim.processes[0].end()
        await sim.until(lambda: sim.refused)
        assert sim.refused == [(7, "out of memory")]
        await sim.until(lambda: len(sim.attached) == 3)
        assert sim.states() == [State.READY, State.READY]

    sim.run(work)


def test_a_load_while_a_successor_starts_reaches_it(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(2)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: len(sim.attached) == 2)
        sim.mute = {"ready"}
        sim.processes[0].end()
        await sim.until(lambda: len(sim.processes) == 3)
        assert sim.states()[0] is State.STARTING
        assert await sim.workers.load(7, b"file") == FACTS  # does not wait for the one that starts
        sim.processes[2].mute = set()
        sim.processes[2].say({"op": "ready"})
        await sim.until(lambda: len(sim.attached) == 3)
        assert sim.processes[2].loads() == [7]

    sim.run(work)


def test_a_model_unloaded_while_it_is_loaded_leaves_nothing(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(2)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: len(sim.attached) == 2)
        sim.processes[0].mute = {"loaded"}
        loading = asyncio.ensure_future(sim.workers.load(7, b"file"))
        await sim.until(sim.processes[0].loads)
        sim.workers.unload(7)
        with pytest.raises(LoadError, match="unloaded"):
            await loading
        sim.processes[0].mute = set()
        sim.processes[0].say({"op": "loaded", "model": 7, **FACTS})
        await sim.until(lambda: any(head["op"] == "unload" for head in sim.processes[0].heard))
        assert [head["op"] for head in sim.processes[0].heard if head["op"] != "ping"] == ["attach", "load", "unload"]
        assert sim.workers._models == {}
        assert all(not worker.loaded for worker in sim.workers.workers)
        assert sim.states() == [State.READY, State.READY]

    sim.run(work)


def test_a_stop_ends_what_is_loaded(supervised: Callable[..., Supervised]) -> None:
    sim = supervised()

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: sim.attached)
        sim.processes[0].mute = {"loaded"}
        loading = asyncio.ensure_future(sim.workers.load(7, b"file"))
        await sim.until(sim.processes[0].loads)
        await sim.workers.close()
        for load in (loading, sim.workers.load(8, b"file")):
            with pytest.raises(LoadError, match="stopping"):
                await load
        assert sim.workers._models == {}

    sim.run(work)


def test_a_model_that_others_have_is_not_blamed_for_a_load_that_hangs(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(2, load_timeout_s=2)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: len(sim.attached) == 2)
        await sim.workers.load(7, b"file")
        sim.mute = {"loaded"}
        sim.processes[0].end()
        await sim.until(lambda: len(sim.processes) == 3 and sim.processes[2].loads() == [7])
        sim.mute = set()
        await sim.pass_time(3)
        await sim.until(lambda: len(sim.attached) == 3)
        assert sim.processes[2].is_killed
        assert sim.refused == []
        assert sim.states() == [State.READY, State.READY]

    sim.run(work)


# Deaths.


def test_a_model_that_ends_whoever_loads_it_is_refused_and_the_service_goes_on(
    supervised: Callable[..., Supervised],
) -> None:
    """Files that end a worker never count as workers' deaths, however many there are of them."""
    sim = supervised()
    sim.dies_of = set(range(10, 30))

    async def work() -> None:
        await sim.workers.start()
        for model in sorted(sim.dies_of):
            with pytest.raises(LoadError, match="ends its worker"):
                await sim.workers.load(model, b"file")
        assert await sim.workers.load(7, b"file") == FACTS
        assert not sim.is_given_up

    sim.run(work)


def test_a_model_that_was_loaded_is_not_blamed_for_deaths(supervised: Callable[..., Supervised]) -> None:
    """Otherwise two workers that are killed at a bad moment would take a model away from all later ones."""
    sim = supervised()

    async def work() -> None:
        await sim.workers.start()
        await sim.workers.load(7, b"file")
        for number in range(4):
            sim.mute = {"loaded"}
            sim.processes[-1].end()
            await sim.until(lambda number=number: len(sim.processes) == number + 2 and sim.processes[-1].loads())
        sim.mute = set()
        sim.processes[-1].end()
        await sim.until(lambda: sim.states() == [State.READY])
        assert sim.refused == []
        assert sim.processes[-1].loads() == [7]

    sim.run(work)


def test_workers_that_die_again_and_again_cannot_be_kept_alive(supervised: Callable[..., Supervised]) -> None:
    sim = supervised()

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: sim.attached)
        sim.mute = {"ready"}
        for number in range(MAX_DEATHS):
            assert not sim.is_given_up
            await sim.until(lambda number=number: len(sim.processes) == number + 1)
            sim.processes[-1].end()
        await sim.until(lambda: sim.is_given_up)

    sim.run(work)


def test_a_sign_of_life_forgets_deaths(supervised: Callable[..., Supervised]) -> None:
    sim = supervised()

    async def work() -> None:
        await sim.workers.start()
        for number in range(2 * MAX_DEATHS):
            await sim.until(lambda number=number: len(sim.attached) == number + 1)
            await sim.until(lambda: sim.workers.workers[0].memory_bytes == 7)
            assert sim.workers.workers[0].busy_total_s == 0.25
            sim.processes[-1].end()
        assert not sim.is_given_up

    sim.run(work)


def test_a_worker_is_asked_for_a_sign_of_life_as_soon_as_it_is_ready(
    supervised: Callable[..., Supervised], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its readiness and the first check it would count as one that never lived."""
    sim = supervised()
    monkeypatch.setattr(module, "TICK_S", 60.0)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: sim.workers.workers[0].memory_bytes == 7)

    sim.run(work)


def test_a_pause_of_this_process_counts_as_little_time() -> None:
    readings = iter([5.0, 5.25, 5.5, 8.0, 90_000.0, 90_000.25])
    clock = RunningClock(lambda: next(readings))
    assert [clock() for _ in range(5)] == [0.25, 0.5, 1.5, 2.5, 2.75]


def test_a_process_that_cannot_be_started_is_tried_again(supervised: Callable[..., Supervised]) -> None:
    sim = supervised()

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: sim.attached)
        sim.fails_to_start = MAX_DEATHS - 2
        sim.processes[0].end()
        await sim.until(lambda: len(sim.attached) == 2)
        assert not sim.is_given_up

    sim.run(work)


def test_a_start_that_fails_says_why_at_once(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(start_timeout_s=3600)
    sim.fails_to_start = MAX_FIRST_DEATHS

    async def work() -> None:
        with pytest.raises(StartUpError, match="Resource temporarily unavailable"):
            await sim.workers.start()

    sim.run(work)


def test_workers_that_end_while_they_start_fail_the_start_at_once(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(start_timeout_s=3600)
    sim.mute = {"ready"}

    async def work() -> None:
        starting = asyncio.ensure_future(sim.workers.start())
        for number in range(MAX_FIRST_DEATHS):
            await sim.until(lambda number=number: len(sim.processes) == number + 1)
            sim.processes[-1].end()
        with pytest.raises(StartUpError, match="end while they start"):
            await starting

    sim.run(work)


# Limits.


@pytest.mark.parametrize(
    ("state", "limit"),
    [
        (State.STARTING, {"start_timeout_s": 5}),
        (State.LOADING, {"load_timeout_s": 5}),
        (State.READY, {"batch_timeout_s": 5}),
        (State.BUSY, {"batch_timeout_s": 5}),
    ],
)
def test_each_state_has_its_limit(
    supervised: Callable[..., Supervised], state: State, limit: dict[str, float]
) -> None:
    """And none of the others' limits ends a worker that is in it."""
    limits = {"start_timeout_s": 1000, "load_timeout_s": 1000, "batch_timeout_s": 1000} | limit
    sim = supervised(2, **limits)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: len(sim.attached) == 2)
        match state:
            case State.STARTING:
                sim.mute = {"ready"}
                sim.processes[0].end()
            case State.LOADING:
                sim.processes[0].mute = {"loaded"}
                loading = asyncio.ensure_future(sim.workers.load(7, b"file"))
                await sim.until(sim.processes[0].loads)
            case State.READY:
                sim.processes[0].mute = {"pong"}
            case State.BUSY:
                sim.processes[0].busy_s = 1.0
                await sim.until(lambda: State.BUSY in sim.states())
        await sim.until(lambda: len(sim.processes) == 2 + (state is State.STARTING))
        sim.mute = set()
        victim = sim.processes[-1] if state is State.STARTING else sim.processes[0]
        await sim.pass_time(4.5)
        assert not victim.is_killed
        sim.processes[0].busy_s = 5.1 if state is State.BUSY else 0.0
        await sim.pass_time(1.5)
        assert victim.is_killed
        if state is State.LOADING:
            with pytest.raises(LoadError, match="loads in 5 s"):
                await loading
        await sim.until(lambda: sim.states() == [State.READY, State.READY])
        assert not sim.is_given_up

    sim.run(work)


def test_kills_at_the_limit_of_a_batch_never_end_the_service(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(batch_timeout_s=1)

    async def work() -> None:
        await sim.workers.start()
        for number in range(2 * MAX_DEATHS):
            await sim.until(lambda number=number: len(sim.attached) == number + 1)
            sim.processes[-1].busy_s = 1.5
        assert not sim.is_given_up

    sim.run(work)


def test_a_worker_that_cannot_be_connected_is_replaced(supervised: Callable[..., Supervised]) -> None:
    sim = supervised()
    sim.fails_to_connect = 2

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: len(sim.attached) == 3 and sim.states() == [State.READY])
        assert sim.workers.restarts == 2
        assert [process.is_killed for process in sim.processes] == [True, True, False]

    sim.run(work)


def test_a_worker_is_replaced_when_no_thread_can_be_started(
    supervised: Callable[..., Supervised], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of processes, which threads count towards, is met."""
    sim = supervised()

    async def work() -> None:
        def refuse(*_: Any) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", refuse)
        sim.fails_to_start = 1
        await sim.workers.start()
        await sim.until(lambda: sim.states() == [State.READY])
        sim.processes[0].end()
        await sim.until(lambda: len(sim.processes) == 2 and sim.states() == [State.READY])
        monkeypatch.undo()

    sim.run(work)


def test_loading_is_never_timed_as_a_batch(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(batch_timeout_s=1, load_timeout_s=100)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: sim.attached)
        sim.processes[0].mute = {"loaded"}
        loading = asyncio.ensure_future(sim.workers.load(7, b"file"))
        await sim.pass_time(20)
        assert sim.workers.is_fresh()
        assert not sim.processes[0].is_killed
        sim.processes[0].mute = set()
        sim.processes[0].say({"op": "loaded", "model": 7, **FACTS})
        await loading

    sim.run(work)


def test_a_long_batch_that_moves_on_is_fresh_and_one_that_hangs_is_not(supervised: Callable[..., Supervised]) -> None:
    sim = supervised(batch_timeout_s=100)

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: sim.attached)
        process = sim.processes[0]
        process.busy_s, process.stalled_s = 50.0, 0.1
        await sim.pass_time(5)
        assert sim.workers.is_fresh()
        process.stalled_s = 2.5
        await sim.pass_time(0.5)
        assert not sim.workers.is_fresh()

    sim.run(work)


@pytest.mark.parametrize("head", [{"op": "pong"}, {"op": "loaded", "model": 9}, {"op": "nonsense"}, {"op": ["x"]}])
def test_an_answer_to_nothing_ends_a_worker(supervised: Callable[..., Supervised], head: dict[str, Any]) -> None:
    sim = supervised()

    async def work() -> None:
        await sim.workers.start()
        await sim.until(lambda: sim.attached)
        sim.processes[0].channel.write(head, {})
        await sim.until(lambda: len(sim.attached) == 2)

    sim.run(work)


# The process itself.


def test_a_workers_environment_has_no_keys_and_no_relative_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESSQUIK_API_KEYS", "secret")
    monkeypatch.setenv("hessquik_admin_keys", "secret")
    monkeypatch.setenv("HESSQUIK_SECRETS", "/run/secrets")
    monkeypatch.setenv("PYTHONPATH", ":.:relative:/absolute")
    environment = child.environment()
    assert "secret" not in "".join(environment.values())
    places = environment["PYTHONPATH"].split(":")
    assert places[-1] == "/absolute"
    assert all(os.path.isabs(place) for place in places)
    assert len(places) == 2


def test_the_current_folder_does_not_shadow_modules_and_signals_do_not_reach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A module of ours in the current folder is not run; what is run sees neither SIGTERM nor SIGINT."""
    for package in ("service", "tests"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "service" / "worker.py").write_text("open('shadowed', 'w')")
    (tmp_path / "torch.py").write_text("open('shadowed', 'w')")
    monkeypatch.chdir(tmp_path)
    started: list[subprocess.Popen[bytes]] = []

    async def work() -> None:
        owner = Supervised.__new__(Supervised)
        owner.attached = []
        owner.attach = owner.attached.append  # type: ignore[method-assign]
        workers = Workers(owner, ["cpu"], Settings())
        starting = asyncio.ensure_future(workers.start())
        await asyncio.sleep(0)
        running = workers.workers[0]._child
        assert running is not None
        process = running.process
        started.append(process)
        for number in (signal.SIGTERM, signal.SIGINT) * 2:
            process.send_signal(number)  # also while it imports
            await asyncio.sleep(0.2)
        await starting
        for _ in range(500):
            if owner.attached:
                break
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert process.poll() is None
        assert workers.restarts == 0
        await workers.close()

    asyncio.run(work())
    assert not (tmp_path / "shadowed").exists()
    assert started[0].poll() is not None
