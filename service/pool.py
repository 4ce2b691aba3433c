"""Supervises the worker processes: one per device slot, started, fed, watched, replaced.

    starting ──ready, models loaded──▶ ready ◀──batch answered── busy
        │                                │  ──────batch sent──▶   │
        └──────────── dead ◀─────────────┴────────────────────────┘      then, after a pause, a new one

A worker that dies, answers nonsense or takes longer than a batch may take is killed and replaced. The pool knows
frames and models' bytes; what is in a batch belongs to its owner.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from itertools import count
from typing import Any, Protocol

from service import wire
from service.errors import StartUpError
from service.settings import Settings

__all__ = ["LoadError", "Owner", "Pool", "State", "Worker"]

logger = logging.getLogger(__name__)

#: The module that worker processes run.
WORKER_MODULE = "service.worker"
#: How often workers are looked at.
TICK_S = 0.25
#: A worker that answered within this time is known to be well.
FRESH_S = 2.0
#: How often an idle worker is asked to compute something.
PROBE_S = 0.5
#: Pause before the first restart after an answer; it doubles with each death in a row.
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
#: Deaths in a row, without one answer in between, after which workers cannot be kept alive.
MAX_DEATHS_IN_A_ROW = 8
#: Deaths of workers while they load a model, after which that model is given up.
MAX_LOAD_STRIKES = 2


class State(StrEnum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    DEAD = "dead"


class LoadError(Exception):
    """A worker refused a model; the message says why."""


class Worker:
    """One worker process and the front's end of the socket pair to it.

    Args:
        pool: Whose it is.
        device: What it computes on.

    Attributes:
        computing: What it computes, by number: a batch, and perhaps a small one between the tiles of a large one.
        arriving: What it has computed, while a large answer is on its way.
    """

    def __init__(self, pool: Pool, device: str) -> None:
        """Describe a worker that is not started yet."""
        self.pool = pool
        self.device = device
        self.state = State.STARTING
        self.computing: dict[int, Any] = {}
        self.arriving: dict[int, Any] = {}
        self.since = pool.now()
        self.last_answer = float("-inf")
        self.memory_bytes = 0
        self.loading: list[int] = []
        self._greeted = False
        self._numbers = count(1)
        self._host = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._protocol: wire.FrameProtocol | None = None

    async def start(self) -> None:
        """Start the process; the worker becomes ready when it has loaded the pool's models."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        settings = self.pool.settings
        arguments = [str(theirs.fileno()), self.device, str(settings.threads), str(settings.spin_us)]
        command = [sys.executable, "-m", WORKER_MODULE, *arguments]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=_environment()
            )
        loop = asyncio.get_running_loop()
        _, self._protocol = await loop.create_connection(
            lambda: wire.FrameProtocol(self._on_frame, self._on_lost, self._on_head), sock=ours
        )

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return None if self._process is None else self._process.pid

    @property
    def can_host(self) -> bool:
        """Whether it computes a large batch, and nothing else."""
        return self._host in self.computing and len(self.computing) == 1

    def run(self, work: Any, head: dict[str, Any], fields: Mapping[str, wire.Field], is_host: bool = False) -> None:
        """Send a batch, on behalf of ``work``, to a worker that is ready or can host it.

        Args:
            work: What the pool's owner is told of when it is done or lost.
            head: What to do; gets a number.
            fields: With what.
            is_host: Whether small batches may be computed meanwhile.
        """
        assert self.state is State.READY or self.can_host, f"expected a ready worker, got a {self.state} one"
        head["number"] = number = next(self._numbers)
        if is_host:
            self._host = number
        self.computing[number] = work
        self.state, self.since = State.BUSY, self.pool.now()
        self.write(head, fields)

    def write(self, head: Mapping[str, Any], fields: Mapping[str, wire.Field]) -> None:
        """Send a frame."""
        if self._protocol is not None and self.state is not State.DEAD:
            self._protocol.write(head, fields)

    def load(self, model: int, data: bytes) -> None:
        """Send a model's file."""
        self.loading.append(model)
        self.write({"op": "load", "model": model}, {"file": data})

    def kill(self, why: str) -> None:
        """End the process at once."""
        if self._process is not None and self._process.poll() is None:
            logger.warning("worker %s on %s is killed: %s", self.pid, self.device, why)
            self._process.kill()
        if self._protocol is not None:
            self._protocol.transport.abort()

    def close(self) -> None:
        """Let the process end by closing our end."""
        self.state = State.DEAD
        if self._protocol is not None:
            self._protocol.transport.close()

    def reap(self, timeout_s: float) -> int | None:
        """Wait for the process to end, kill it if it does not, and return its exit status."""
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _on_frame(self, head: dict[str, Any], fields: dict[str, Any]) -> None:
        now = self.pool.now()
        match head.get("op"):
            case "ready":
                self._greeted = True
                self.pool.on_greeting(self)
            case "loaded" if head.get("model") in self.loading:
                self.loading.remove(head["model"])
                self.pool.on_loaded(head.pop("model"), head)
            case "done":
                self.memory_bytes = head.get("memory_bytes", self.memory_bytes)
                self.last_answer = now
                number = head.get("number", 0)
                work = self.arriving.pop(number) if number in self.arriving else self._computed(number)
                self.pool.on_done(self, work, head, fields)
            case _:
                raise wire.WireError("expected an answer to what was asked")
        if self.state is State.STARTING and self._greeted and not self.loading:
            self.state, self.since, self.last_answer = State.READY, now, now
            self.pool.on_ready(self)

    def _on_head(self, head: dict[str, Any]) -> None:
        """A large answer begins: while it arrives, the worker can compute the next batch."""
        if head.get("op") == "done":
            number = head.get("number", 0)
            self.arriving[number] = self._computed(number)
            self.pool.on_head()

    def _computed(self, number: int) -> Any:
        """It has done this, and takes more once it has done all."""
        if number not in self.computing:
            raise wire.WireError("expected an answer to what was asked")
        work = self.computing.pop(number)
        self.since = self.pool.now()
        if not self.computing:
            self.state = State.READY
        return work

    def _on_lost(self) -> None:
        if self.state is not State.DEAD:
            self.state = State.DEAD
            self.kill("it closed its end")
            self.pool.on_lost(self)


class Owner(Protocol):
    """Who gives work to a pool and gets its answers."""

    def on_idle(self) -> None:
        """A worker can take a batch."""

    def on_answer(self, work: Any, head: dict[str, Any], fields: dict[str, Any]) -> None:
        """A worker answered."""

    def on_lost_work(self, work: Any) -> None:
        """A worker died over this work."""

    def on_given_up(self) -> None:
        """Workers cannot be kept alive."""


class Pool:
    """The workers of one service.

    Args:
        owner: Who gives work and gets answers.
        devices: One per worker.
        settings: Threads and times.
    """

    def __init__(self, owner: Owner, devices: list[str], settings: Settings) -> None:
        """Describe a pool that is not started yet."""
        self.settings = settings
        self.restarts = 0
        self.workers: list[Worker] = []
        self._devices = devices
        self._owner = owner
        self._models: dict[int, bytes] = {}
        self._strikes: dict[int, int] = {}
        self._loads: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._deaths_in_a_row = 0
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._started: asyncio.Future[None] | None = None

    @staticmethod
    def now() -> float:
        """The monotonic clock."""
        return time.monotonic()

    async def start(self) -> None:
        """Start a worker per device and wait until the first is ready.

        Raises:
            StartUpError: none became ready in time.
        """
        self._started = asyncio.get_running_loop().create_future()
        self.workers = [Worker(self, device) for device in self._devices]
        await asyncio.gather(*(worker.start() for worker in self.workers))
        self._spawn(self._watch())
        try:
            await asyncio.wait_for(asyncio.shield(self._started), self.settings.start_timeout_s)
        except TimeoutError:
            raise StartUpError(f"no worker was ready within {self.settings.start_timeout_s:g} s") from None

    async def close(self) -> None:
        """End all workers."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        for worker in self.workers:
            worker.close()
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(None, worker.reap, 2.0) for worker in self.workers))

    def idle_worker(self) -> Worker | None:
        """A worker that can take a batch: the one that waits longest."""
        ready = [worker for worker in self.workers if worker.state is State.READY]
        return min(ready, key=lambda worker: worker.since, default=None)

    def host(self) -> Worker | None:
        """A worker that can compute a small batch between the tiles of a large one."""
        return next((worker for worker in self.workers if worker.can_host), None)

    def is_fresh(self) -> bool:
        """Whether a worker answered lately."""
        return self.now() - max((worker.last_answer for worker in self.workers), default=float("-inf")) <= FRESH_S

    def states(self) -> dict[State, int]:
        """How many workers are in each state."""
        counted = dict.fromkeys(State, 0)
        for worker in self.workers:
            counted[worker.state] += 1
        return counted

    async def load(self, model: int, data: bytes) -> dict[str, Any]:
        """Have every worker load a model's file; return what the first to do so says of it.

        Raises:
            LoadError: it was refused.
        """
        self._models[model] = data
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._loads[model] = future
        for worker in self.workers:
            if worker.state is not State.DEAD:
                worker.load(model, data)
        return await future

    def unload(self, model: int) -> None:
        """Have every worker forget a model, after the batches that it was already sent."""
        self._models.pop(model, None)
        self._strikes.pop(model, None)
        for worker in self.workers:
            worker.write({"op": "unload", "model": model}, {})

    def on_greeting(self, worker: Worker) -> None:
        """A worker is up: it is sent the models that are not on their way to it already."""
        for model, data in self._models.items():
            if model not in worker.loading:
                worker.load(model, data)

    def on_ready(self, worker: Worker) -> None:
        """A worker has loaded everything."""
        logger.info("worker %s on %s is ready", worker.pid, worker.device)
        if self._started is not None and not self._started.done():
            self._started.set_result(None)
        self._owner.on_idle()

    def on_loaded(self, model: int, facts: dict[str, Any]) -> None:
        """A worker has loaded or refused a model."""
        if "error" in facts:
            self._give_up(model, str(facts["error"]))
        else:
            future = self._loads.pop(model, None)
            if future is not None and not future.done():
                future.set_result(facts)

    def on_done(self, worker: Worker, work: Any, head: dict[str, Any], fields: dict[str, Any]) -> None:
        """A worker answered."""
        self._deaths_in_a_row = 0
        if work is not None:
            self._owner.on_answer(work, head, fields)
        self._owner.on_idle()

    def on_head(self) -> None:
        """A worker has computed what it was given, and can compute more while that arrives."""
        self._owner.on_idle()

    def on_lost(self, worker: Worker) -> None:
        """A worker died: its work is handed back and it is replaced."""
        if self._is_closing:
            return
        self._deaths_in_a_row += 1
        self.restarts += 1
        if worker.loading and worker.loading[0] in self._loads:  # no worker has loaded it yet: it may be to blame
            model = worker.loading[0]
            self._strikes[model] = self._strikes.get(model, 0) + 1
            if self._strikes[model] >= MAX_LOAD_STRIKES:
                self._give_up(model, "expected a network that can be loaded, got one that ends its worker")
        self._spawn(self._replace(worker))
        for work in (*worker.arriving.values(), *worker.computing.values()):
            if work is not None:
                self._owner.on_lost_work(work)
        if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
            self._owner.on_given_up()

    def _give_up(self, model: int, why: str) -> None:
        self._models.pop(model, None)
        future = self._loads.pop(model, None)
        if future is not None and not future.done():
            future.set_exception(LoadError(why))

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        status = await loop.run_in_executor(None, worker.reap, 2.0)
        pause_s = min(FIRST_PAUSE_S * 2 ** (self._deaths_in_a_row - 1), LONGEST_PAUSE_S)
        logger.error(
            "worker %s on %s ended with status %s; a new one in %g s", worker.pid, worker.device, status, pause_s
        )
        await asyncio.sleep(pause_s)
        successor = Worker(self, worker.device)
        self.workers[self.workers.index(worker)] = successor
        await successor.start()

    async def _watch(self) -> None:
        """Kill what hangs and ask what is idle, for ever."""
        while True:
            await asyncio.sleep(TICK_S)
            now = self.now()
            for worker in self.workers:
                waited_s = now - worker.since
                if worker.state is State.BUSY and waited_s > self.settings.batch_timeout_s:
                    worker.kill(f"its batch took more than {self.settings.batch_timeout_s:g} s")
                elif worker.state is State.STARTING and waited_s > self.settings.start_timeout_s:
                    worker.kill(f"it was not ready within {self.settings.start_timeout_s:g} s")
                elif worker.state is State.READY and now - worker.last_answer > PROBE_S:
                    worker.run(None, {"op": "ping"}, {})


def _environment() -> dict[str, str]:
    """The worker's environment: ours, with the place that this package was imported from."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path}
