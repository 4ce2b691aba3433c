"""Worker processes: starting, watching and replacing them, one per device slot.

    STARTING ──says hello──▶ LOADING ──has all models──▶ READY ◀──▶ BUSY
        └───────────────────────┴──────────┬──────────────┴───────────┘
                                          DEAD, and after a pause a new process

Each state has a time limit; a worker that exceeds it is killed and replaced. A worker that is ready loads further
models in a separate thread and goes on answering; the workers load one after the other, so that the rest keep their
speed. A fault in a file is an error for the caller of the load, and does not end a worker.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from hessquik_client.errors import StartUpError

from .child import Child, pause_s
from .periodic import repeat
from .settings import Settings
from .shared import Sealed
from .wire import WireError

__all__ = ["LoadError", "Owner", "RunningClock", "State", "User", "WorkerProcess", "Workers"]

logger = logging.getLogger(__name__)

#: The module that worker processes run.
WORKER_MODULE = f"{__package__}.run_worker"
#: Intervals at which workers are checked and pinged.
TICK_S = 0.25
#: Most seconds that a :class:`RunningClock` advances between two readings.
MAX_STEP_S = 1.0
#: A sign of life counts as recent for this time.
FRESH_S = 2.0
#: Deaths in a row, without a sign of life in between, after which workers cannot be kept alive; and at start-up.
MAX_DEATHS, MAX_FIRST_DEATHS = 8, 3
#: Deaths of workers while they load a model that none has loaded yet, after which that model is refused.
MAX_LOAD_DEATHS = 2
#: Time for a process to end after its socket was closed.
END_S = 2.0
#: The reason why nothing is loaded any more.
STOPPING = "expected a service that goes on, this one is stopping"
#: Signals that are the supervisor's business, even if the whole process group gets them.
OUR_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class State(StrEnum):
    """The state of a worker."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    DEAD = "dead"


TRANSITIONS = {
    State.STARTING: {State.LOADING, State.DEAD},
    State.LOADING: {State.READY, State.DEAD},
    State.READY: {State.BUSY, State.DEAD},
    State.BUSY: {State.READY, State.DEAD},
    State.DEAD: set[State](),
}


class LoadError(Exception):
    """A model is refused; the message is the reason."""


class User(Protocol):
    """The user of the workers."""

    def attach(self, worker: WorkerProcess) -> None:
        """Connect to a worker that has become ready; if this raises OSError, the worker is replaced."""

    def give_up(self) -> None:
        """Fail all jobs and stop, because workers cannot be kept alive."""


class Owner(User, Protocol):
    """The owner of the workers, which also serves the models that they load."""

    def refuse(self, model: int, why: str) -> None:
        """Stop serving a model that a worker refuses although other workers have loaded it."""


class RunningClock:
    """A monotonic clock that stops while this process is stopped, for the time limits of other processes.

    When a container or a virtual machine is paused, its workers are paused too, and are not late. A pause shows as a
    long time between two readings, so the clock must be read often.

    Args:
        time: A monotonic clock.

    Examples:
        >>> readings = iter([10.0, 10.25, 3610.25, 3610.5])
        >>> clock = RunningClock(lambda: next(readings))
        >>> [clock(), clock(), clock()]
        [0.25, 1.25, 1.5]
    """

    def __init__(self, time: Callable[[], float] = time.monotonic) -> None:
        self._time = time
        self._read_at = time()
        self._running_s = 0.0

    def __call__(self) -> float:
        """Return the seconds for which the process has run since the clock was created."""
        now = self._time()
        self._running_s += min(now - self._read_at, MAX_STEP_S)
        self._read_at = now
        return self._running_s


class WorkerProcess:
    """One worker process and the control socket to it.

    Args:
        workers: The pool that it belongs to.
        device: The device that it computes on.

    Attributes:
        loading: Models that were sent to it and are not answered yet, in order.
        loaded: Models that it has loaded.
        well_s: Time of its last sign of life, on the clock of the pool.
        memory_bytes: Memory that it uses, as it last reported.
        busy_total_s: Time that it has spent on batches since its start, as it last reported.
    """

    def __init__(self, workers: Workers, device: str) -> None:
        """Set up the state of a process that is not started yet."""
        self.device = device
        self.state = State.STARTING
        self.loading: list[int] = []
        self.loaded: set[int] = set()
        self.well_s = float("-inf")
        self.memory_bytes = 0
        self.busy_total_s = 0.0
        self._workers = workers
        self._since_s = self._heard_s = self._load_since_s = workers.now()
        self._is_asked = False
        self._child: Child | None = None

    def start(self) -> None:
        """Start the process.

        Raises:
            OSError: the system does not allow it.
        """
        settings = self._workers.settings
        limits = (settings.threads, settings.spin_us, settings.batch_timeout_s, settings.self_check)
        arguments = [self.device, *map(str, limits)]
        self._child = self._workers.spawn(WORKER_MODULE, arguments, self._on_frame, self.lose, OUR_SIGNALS)

    @property
    def pid(self) -> int | None:
        """Return the process id, or ``None`` before the start."""
        return None if self._child is None else self._child.pid

    @property
    def is_up(self) -> bool:
        """Return whether models can be sent to it."""
        return self.state in (State.LOADING, State.READY, State.BUSY)

    @property
    def is_ready(self) -> bool:
        """Return whether it can compute."""
        return self.state in (State.READY, State.BUSY)

    def become(self, state: State) -> None:
        """Change the state."""
        assert state in TRANSITIONS[self.state], f"a {self.state} worker cannot become {state}"
        self.state, self._since_s = state, self._workers.now()

    def connect(self) -> socket.socket:
        """Return the front end's end of a new socket pair to the worker's computing thread.

        Raises:
            OSError: the system does not allow it.
        """
        assert self._child is not None
        return self._child.connect({"op": "attach"})

    def load(self, model: int, file: bytes | Sealed) -> None:
        """Send a model's file, unless it was sent before."""
        if model not in self.loading and model not in self.loaded:
            if not self.loading:
                self._load_since_s = self._workers.now()
            self.loading.append(model)
            head = {"op": "load", "model": model}
            if isinstance(file, Sealed):
                self._write(head, {}, (file.fd,))
            else:
                self._write(head, {"file": file})

    def unload(self, model: int) -> None:
        """Make the worker drop a model; batches that were sent before are still answered."""
        self.loaded.discard(model)
        self._write({"op": "unload", "model": model})

    def check(self) -> None:
        """Kill the worker if it has exceeded a time limit; send the next ping if the last one is answered."""
        now, settings = self._workers.now(), self._workers.settings
        if self.state is State.STARTING and now - self._since_s > settings.start_timeout_s:
            self.kill(f"it did not start within {settings.start_timeout_s:g} s")
        elif self.loading and now - self._load_since_s > settings.load_timeout_s:
            is_known = self._workers.is_known(self.loading[0])
            if not is_known:
                why = f"expected a network that loads in {settings.load_timeout_s:g} s"
                self._workers.refuse(self.loading[0], why)
            self.kill("loading a model took too long", is_counted=is_known)
        elif self.is_ready and now - self._heard_s > max(settings.batch_timeout_s, FRESH_S):
            self.kill(f"it has not answered for {now - self._heard_s:.1f} s", is_counted=False)
        elif self.is_ready and not self._is_asked:
            self._is_asked = True
            self._write({"op": "ping"})

    def kill(self, why: str, is_counted: bool = True) -> None:
        """Kill the process.

        Args:
            why: The reason, for the log.
            is_counted: Whether this death counts towards giving up.
        """
        if self.state is not State.DEAD and not self._workers.is_closing:  # closed connections end it in its own time
            logger.warning("worker %s on %s is killed: %s", self.pid, self.device, why)
            if self._child is not None:
                self._child.kill()
            self.lose(is_counted)

    def lose(self, is_counted: bool = True) -> None:
        """Mark the worker as dead, and have it replaced."""
        if self.state is not State.DEAD:
            self.become(State.DEAD)
            self.close()
            self._workers.on_lost(self, is_counted)

    def close(self) -> None:
        """Close the control socket, which makes the process exit."""
        if self._child is not None:
            self._child.close()

    def reap(self) -> int | None:
        """Wait for the process to end, kill it if it does not, and return its exit status."""
        if self._child is None:
            return None
        for _ in range(2):
            try:
                return self._child.wait(END_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
        logger.error("worker %s on %s cannot be ended: the device's driver may hang", self.pid, self.device)
        return None

    def _write(self, head: dict[str, Any], fields: dict[str, Any] | None = None, fds: tuple[int, ...] = ()) -> None:
        if self._child is not None:
            self._child.write(head, fields or {}, fds)

    def _on_frame(self, head: dict[str, Any], fields: dict[str, Any]) -> None:
        now = self._workers.now()
        match head.pop("op", None):
            case "ready" if self.state is State.STARTING:
                built = (head.get("torch"), head.get("backend"))
                logger.info("worker %s on %s is up: torch %s, backend %s", self.pid, self.device, *built)
                self.become(State.LOADING)
                self._workers.on_started(self)
            case "loaded" if self.loading and head.get("model") == self.loading[0]:
                self._load_since_s = now
                self._workers.on_loaded(self, self.loading.pop(0), head)
            case "disagreed":
                self._workers.mismatches += 1
                self.kill("a batch's results differ from those of its rows in other company")
                return
            case "pong" if self.is_ready and self._is_asked:
                self._on_pong(now, head)
            case _:
                raise WireError("expected an answer to what was asked")
        if self.state is State.LOADING and not self.loading:
            self.become(State.READY)
            self.well_s = self._heard_s = now
            self._workers.on_ready(self)
            self.check()  # asks for the first sign of life at once

    def _on_pong(self, now: float, head: dict[str, Any]) -> None:
        try:
            busy_s, stalled_s, busy_total_s = (float(head[name]) for name in ("busy_s", "stalled_s", "busy_total_s"))
            memory_bytes, checked_rows = int(head["memory_bytes"]), int(head["checked_rows"])
        except (KeyError, TypeError, ValueError):
            raise WireError("expected five numbers in a pong") from None
        self._workers.checked_rows += checked_rows
        settings, self._is_asked = self._workers.settings, False
        self._heard_s, self.well_s, self.memory_bytes = now, now - stalled_s, memory_bytes
        self.busy_total_s = busy_total_s
        state = State.BUSY if busy_s > 0 else State.READY
        if state is not self.state:
            self.become(state)
        if busy_s > settings.batch_timeout_s:
            self.kill(f"its batch took more than {settings.batch_timeout_s:g} s", is_counted=False)
        else:
            self._workers.on_well()


@dataclass(slots=True, eq=False)
class _Model:
    """A model that all workers must load."""

    file: bytes | Sealed
    facts: dict[str, Any] | None = None
    refusal: str | None = None
    deaths: int = 0
    is_served: bool = False
    waiters: list[tuple[WorkerProcess | None, asyncio.Future[None]]] = field(default_factory=list)

    def settle(self, worker: WorkerProcess | None = None) -> None:
        """Wake the callers that wait for this worker or for any worker; without a worker, wake all."""
        for awaited, future in self.waiters:
            if (worker is None or awaited in (None, worker)) and not future.done():
                future.set_result(None)


class Workers:
    """The workers of one service.

    Args:
        owner: The user of the workers.
        devices: The device of each worker.
        settings: Settings of the service.
        now: The clock of the time limits; by default a :class:`RunningClock`.
        spawn: Starts a process.
    """

    def __init__(
        self,
        owner: Owner,
        devices: list[str],
        settings: Settings,
        now: Callable[[], float] | None = None,
        spawn: Callable[..., Child] = Child,
    ) -> None:
        """Set up workers that are not started yet."""
        self.settings, self.now, self.spawn = settings, now or RunningClock(), spawn
        self.restarts = self.checked_rows = self.mismatches = 0
        self.workers = [WorkerProcess(self, device) for device in devices]
        self._owner = owner
        self._models: dict[int, _Model] = {}
        self._deaths = 0
        self._was_ready = False
        self.is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._started: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Start one worker per device, and wait until the first is up.

        Raises:
            StartUpError: no worker is up within the time limit.
        """
        self._started = asyncio.get_running_loop().create_future()
        for slot, worker in enumerate(self.workers):
            self._start_worker(slot, worker)
        self._spawn(repeat(TICK_S, self._check_all))
        try:
            await asyncio.wait_for(asyncio.shield(self._started), self.settings.start_timeout_s)
        except TimeoutError:
            raise StartUpError(f"no worker was up within {self.settings.start_timeout_s:g} s") from None

    async def close(self) -> None:
        """Stop all workers, and fail the loads that wait for them."""
        self.is_closing = True
        for task in self._tasks:
            task.cancel()
        for worker in self.workers:
            worker.close()
        for model in list(self._models):
            self._forget(model, STOPPING)
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(None, worker.reap) for worker in self.workers))

    def is_fresh(self) -> bool:
        """Return whether a worker has answered within the last :data:`FRESH_S` seconds."""
        well_s = max((worker.well_s for worker in self.workers if worker.is_ready), default=float("-inf"))
        return self.now() - well_s <= FRESH_S

    def states(self) -> dict[State, int]:
        """Count the workers in each state."""
        counted = dict.fromkeys(State, 0)
        for worker in self.workers:
            counted[worker.state] += 1
        return counted

    async def load(self, model: int, file: bytes | Sealed) -> dict[str, Any]:
        """Load a model's file into one worker after the other; return the model's description.

        Workers that are not up load it before they become ready.

        Raises:
            LoadError: the model was refused.
        """
        if self.is_closing:
            raise LoadError(STOPPING)
        entry = self._models[model] = _Model(file)
        for slot in range(len(self.workers)):
            worker = self.workers[slot]
            if worker.is_up and model not in worker.loaded:
                worker.load(model, file)
                await self._wait(entry, worker)
        while entry.facts is None:
            await self._wait(entry, None)
        entry.is_served = True
        return entry.facts

    def unload(self, model: int) -> None:
        """Make every worker drop a model, after the batches that were sent to it."""
        self._forget(model, "expected a model that stays, this one was unloaded while it was loaded")

    def refuse(self, model: int, why: str) -> None:
        """Drop a model from all workers, and fail its load or, if it is served, tell the owner."""
        if self._forget(model, why):
            self._owner.refuse(model, why)

    def is_known(self, model: int) -> bool:
        """Return whether any worker has loaded a model, which shows that the file is good."""
        entry = self._models.get(model)
        return entry is not None and entry.facts is not None

    def on_started(self, worker: WorkerProcess) -> None:
        """Send all models to a worker that is up."""
        for model, entry in self._models.items():
            worker.load(model, entry.file)
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def on_ready(self, worker: WorkerProcess) -> None:
        """Hand a worker that has loaded all models to the owner."""
        logger.info("worker %s on %s is ready", worker.pid, worker.device)
        self._was_ready = True
        try:
            self._owner.attach(worker)
        except OSError as error:
            worker.kill(f"it cannot be connected: {error.strerror}")

    def on_well(self) -> None:
        """Reset the count of deaths in a row, since a worker is alive."""
        self._deaths = 0

    def on_loaded(self, worker: WorkerProcess, model: int, facts: dict[str, Any]) -> None:
        """Handle a worker's answer that it has loaded or refused a model."""
        entry = self._models.get(model)
        if entry is None:
            return
        if "error" in facts:
            self.refuse(model, str(facts["error"]))
        else:
            worker.loaded.add(model)
            facts.pop("model", None)
            entry.facts = entry.facts or facts
            entry.settle(worker)

    def on_lost(self, worker: WorkerProcess, is_counted: bool) -> None:
        """Replace a worker that is dead, after a pause; give up after too many deaths in a row."""
        if self.is_closing:
            return
        self.restarts += 1
        entry = self._models.get(worker.loading[0]) if worker.loading else None
        if entry is not None and entry.facts is None:
            is_counted = False
            entry.deaths += 1
            if entry.deaths >= MAX_LOAD_DEATHS:
                self.refuse(worker.loading[0], "expected a network that can be loaded, got one that ends its worker")
        for entry in self._models.values():
            entry.settle(worker)
        self._count_death(is_counted, "workers end while they start")
        self._spawn(self._replace(self.workers.index(worker), worker))

    def _count_death(self, is_counted: bool, why: str) -> None:
        self._deaths += is_counted
        if not self._was_ready and self._started is not None and not self._started.done():
            if self._deaths >= MAX_FIRST_DEATHS:
                self._started.set_exception(StartUpError(f"no worker can be started: {why}"))
        elif self._deaths >= MAX_DEATHS:
            self._owner.give_up()

    def _forget(self, model: int, why: str) -> bool:
        """Remove a model, and fail the callers that wait for it; return whether it was served."""
        entry = self._models.pop(model, None)
        if entry is None:
            return False
        for worker in self.workers:
            worker.unload(model)
        entry.refusal = why
        entry.settle()
        return entry.is_served

    async def _wait(self, entry: _Model, worker: WorkerProcess | None) -> None:
        """Wait until a worker (``None`` means any) has loaded a model or is dead.

        Raises:
            LoadError: the model was refused.
        """
        waiter = worker, asyncio.get_running_loop().create_future()
        entry.waiters.append(waiter)
        try:
            await waiter[1]
        finally:
            entry.waiters.remove(waiter)
        if entry.refusal is not None:
            raise LoadError(entry.refusal)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start_worker(self, slot: int, worker: WorkerProcess) -> None:
        """Start a process in a slot; if the system refuses, try again later."""
        self.workers[slot] = worker
        try:
            worker.start()
        except OSError as error:
            logger.error("a worker on %s cannot be started: %s", worker.device, error.strerror)
            worker.become(State.DEAD)
            self._count_death(True, error.strerror or type(error).__name__)
            self._spawn(self._replace(slot, worker))

    async def _replace(self, slot: int, worker: WorkerProcess) -> None:
        wait_s, status = pause_s(self._deaths), None
        with suppress(RuntimeError):  # no thread can be started
            status = await asyncio.get_running_loop().run_in_executor(None, worker.reap)
        logger.error(
            "worker %s on %s ended with status %s; a new one in %g s", worker.pid, worker.device, status, wait_s
        )
        await asyncio.sleep(wait_s)
        self._start_worker(slot, WorkerProcess(self, worker.device))

    def _check_all(self) -> None:
        for worker in list(self.workers):
            worker.check()
