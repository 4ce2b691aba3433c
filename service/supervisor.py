"""Several front ends of one service: ``hessquik serve --processes N``.

The supervisor owns the workers, the folder of models and the port; each front end is a process that listens on the
same port (SO_REUSEPORT: the system distributes the connections) and has a connection to each worker. A load, unload
or metrics request to one front end applies to all; a front end that dies is replaced. :mod:`service.frontend`
documents the frames between them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import subprocess
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from itertools import count
from typing import Any

import orjson

from hessquik_client.errors import InternalError, ServiceError

from .child import Child, pause_s
from .devices import resolve_devices
from .keys import Keys
from .node import Node
from .periodic import repeat
from .repository import Served
from .server import EXIT_DRAINED, EXIT_FORCED, EXIT_GIVEN_UP, bind, listen, url
from .settings import Settings
from .tracing import expect_opentelemetry
from .wire import WireError
from .workers import WorkerProcess

__all__ = ["Supervisor", "add_up", "supervise"]

logger = logging.getLogger(__name__)

#: The module that front ends run.
FRONT_MODULE = f"{__package__}.frontend"
#: Interval at which front ends are told the state of the workers and changes of the table.
TICK_S = 0.25
#: Time limit for a front end to apply a change, after which it is killed.
HANG_S = 10.0
#: Time limit for a front end to report its metrics, also those of many models; well within that of a scrape.
REPORT_S = 3.0
#: Time beyond that to drain after which a front end is killed.
GRACE_S = 5.0
#: Deaths of front ends in a row, without a new one that answers in between, after which none can be kept alive.
MAX_DEATHS = 8
#: Metrics that are not added up, since all front ends report them alike or the largest counts.
SHARED_METRICS = (
    "hessquik_workers", "hessquik_device", "hessquik_worker_restarts", "hessquik_build_info", "hessquik_ready",
    "hessquik_models", "hessquik_model_ready", "hessquik_queue_age", "process_start_time", "process_max_fds",
    "hessquik_self_check", "hessquik_model_outdated", "hessquik_start_time", "hessquik_front_restarts",
)  # fmt: skip


class FrontEnd:
    """The process of a front end, and the state that was sent to it.

    Args:
        supervisor: The supervisor that it belongs to.
        port: The port that it listens on.

    Attributes:
        is_up: Whether it has said hello, and has not died.
        may_serve: Whether it was told that the models are loaded, after which it listens.
        metrics: Its last report; if it did not answer the last request for one, only what it has counted.

    Raises:
        OSError: the system does not allow it.
    """

    def __init__(self, supervisor: Supervisor, port: int) -> None:
        """Start the process."""
        self.is_up = self.may_serve = self._has_answered = False
        self.metrics = b""
        self._told: dict[tuple[str, int], tuple[Any, ...]] = {}
        self._held: dict[int, Served] = {}
        self._supervisor = supervisor
        self._numbers = count(1)
        self._awaited: dict[int, asyncio.Future[dict[str, Any] | None]] = {}
        self._telling = asyncio.Lock()
        # The supervisor reads the files of keys, and says when they change.
        settings = supervisor.settings.model_dump(mode="json", exclude={"api_keys", "admin_keys", "secrets"})
        with bind(supervisor.settings.host, port, is_shared=True) as listening:
            # SIGHUP is for the supervisor only; in a group of its own, signals that reach ours are our business.
            self.child = Child(FRONT_MODULE, (), self._on_frame, self._on_lost, {signal.SIGHUP}, has_own_group=True)
            start = {"op": "start", "settings": settings | supervisor.keys.shown()}
            self.child.write(start, {}, (listening.fileno(),))

    def attach(self, worker: WorkerProcess) -> None:
        """Send it a connection to a worker; kill it, so that it is replaced, if the system refuses."""
        try:
            with worker.connect() as sock:
                self.child.write({"op": "worker"}, {}, (sock.fileno(),))
        except OSError as error:
            logger.error("front end %d could not be connected to a worker: %s", self.child.pid, error.strerror)
            self.child.kill()

    async def tell(self) -> None:
        """Send it the state of the workers and the changes of the table; return when it has applied them.

        One that does not answer is killed, so that it is replaced. One call follows the other, so that changes which
        another call has sent are applied, too.
        """
        async with self._telling:
            answer = await self._ask("state", HANG_S, {"news": orjson.dumps(self._news())})
            if answer is None and self.is_up:
                logger.error("front end %d has not answered for %g s and is killed", self.child.pid, HANG_S)
                self.child.kill()

    def _news(self) -> dict[str, Any]:
        """Return the state of the workers and the changes of the table, which are those of the same moment."""
        node = self._supervisor.node
        now: dict[tuple[str, int], tuple[Any, ...]] = {}
        changed = []
        for name in node.repository.names():
            for version, served in node.repository.versions(name).items():
                known = served.id, served.file, served.reason, served.is_outdated, bool(served.facts)
                now[name, version] = known
                if self._told.get((name, version)) != known:
                    changed.append(served)
        gone = [{"name": name, "version": version} for name, version in self._told.keys() - now.keys()]
        self._told = now
        for served in changed:
            if served.id not in self._held:
                node.repository.hold(served)
                self._held[served.id] = served
        members = [
            {
                "name": served.file.name,
                "version": served.file.version,
                "id": served.id,
                "path": str(served.file.path),
                "stamp": served.file.stamp,
                "facts": served.facts,
                "reason": served.reason,
                "is_outdated": served.is_outdated,
            }
            for served in changed
        ]
        health = node.health()
        self.may_serve |= health.is_loaded
        return {"health": health._asdict(), "served": members, "gone": gone}

    @property
    def is_told(self) -> bool:
        """Return whether it has answered all that it was told."""
        return not self._telling.locked()

    async def report(self) -> None:
        """Ask for its metrics."""
        answer = await self._ask("report", REPORT_S)
        self.metrics = counted(self.metrics) if answer is None else bytes(answer["text"])

    async def _ask(self, op: str, limit_s: float, fields: Mapping[str, bytes] = {}) -> dict[str, Any] | None:
        """Send a frame and return the fields of the answer; ``None`` if none comes in time, or it has died."""
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._awaited[number] = answer
        self.child.write({"op": op, "number": number}, fields)
        try:
            # The second wait is for what came while this process was stopped: its timers are first when it goes on.
            for wait_s in (limit_s, TICK_S):
                await asyncio.wait([answer], timeout=wait_s)
            return answer.result() if answer.done() else None
        finally:
            del self._awaited[number]

    def _on_frame(self, head: dict[str, Any], fields: dict[str, Any]) -> None:
        match head.get("op"):
            case "hello" if not self.is_up:
                self.is_up = True
                self._supervisor.on_up(self)
            case "told" | "reported" if type(head.get("number")) is int:
                if not self._has_answered:
                    self._has_answered = True
                    self._supervisor.on_answer()
                answer = self._awaited.get(head["number"])
                if answer is not None and not answer.done():
                    answer.set_result(fields)
            case "released":
                served = self._held.pop(head["id"], None)
                if served is not None:
                    self._supervisor.node.repository.release(served)
            case "load" | "unload" | "metrics":
                self._supervisor.spawn(self._supervisor.answer(self, head))
            case _:
                raise WireError("expected a frame of a front end")

    def _on_lost(self) -> None:
        self.is_up = False
        for answer in self._awaited.values():
            if not answer.done():
                answer.set_result(None)
        for served in self._held.values():
            self._supervisor.node.repository.release(served)
        self._held.clear()
        self._supervisor.on_lost(self)


class Supervisor:
    """Runs one service in several processes.

    Args:
        settings: Settings of the service.
        devices: The device of each worker.
    """

    def __init__(self, settings: Settings, devices: list[str]) -> None:
        """Set up the parts; :meth:`run` starts them."""
        self.settings = settings
        self.node = Node(settings, devices)
        self.keys = Keys(settings)
        self.keys.on_change.append(self._say_keys)
        self._fronts: list[FrontEnd] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0
        self._deaths = 0
        self._counted = b""
        self._is_stopping = self._is_given_up = False
        self._stop: asyncio.Event = asyncio.Event()

    async def run(self) -> int:
        """Serve until told to stop, and return the exit status.

        Raises:
            StartUpError: the service cannot start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        signal.signal(signal.SIGHUP, self.keys.ask)
        with reserve(self.settings.host, self.settings.port) as reserved:
            self._port = reserved.getsockname()[1]
            for _ in range(self.settings.processes):
                self._start_front()
            starting = loop.create_task(self.node.start(self))
            self.spawn(self._tick())
            stopping = loop.create_task(self._stop.wait())
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            try:
                if starting.done():
                    starting.result()
                    logger.info("running on %s, %d front ends", url(reserved), len(self._fronts))
                    await stopping
            finally:
                for task in (starting, stopping):
                    task.cancel()
                is_drained = await self._drain()
                for task in self._tasks:
                    task.cancel()
                await self.node.stop()
        if self._is_given_up:
            return EXIT_GIVEN_UP
        return EXIT_DRAINED if is_drained else EXIT_FORCED

    def attach(self, worker: WorkerProcess) -> None:
        """Connect every front end to a worker that has become ready."""
        for front in self._fronts:
            if front.is_up:
                front.attach(worker)

    def give_up(self) -> None:
        """Fail all jobs and stop, because workers or front ends cannot be kept alive."""
        self._is_given_up = True
        for front in self._fronts:
            front.child.write({"op": "give_up"}, {})
        self._stop.set()

    def on_up(self, front: FrontEnd) -> None:
        """Send a new front end the table of models, connections to the workers, and their state."""
        self.spawn(front.tell())
        for worker in self.node.workers.workers:
            if worker.is_ready:
                front.attach(worker)

    def on_answer(self) -> None:
        """Reset the count of deaths in a row, since a new front end has answered for the first time."""
        self._deaths = 0

    def on_lost(self, front: FrontEnd) -> None:
        """Replace a front end that has died, and keep what it has counted, so that no counter falls."""
        self._fronts.remove(front)
        self._counted = add_up([self._counted, counted(front.metrics)])
        self.spawn(self._replace(front))

    async def answer(self, front: FrontEnd, head: dict[str, Any]) -> None:
        """Execute a front end's frame to load, unload or report metrics, on behalf of all front ends."""
        reply: dict[str, Any] = {"op": "replied", "number": head["number"]}
        fields = {}
        try:
            match head["op"]:
                case "load":
                    loaded = await self.node.load(head["name"])
                    reply["versions"] = [served.file.version for served in loaded]
                case "unload":
                    await self.node.unload(head["name"], head["version"])
                case _:
                    fields["text"] = await self._metrics()
        except Exception as fault:
            error = (
                fault if isinstance(fault, ServiceError) else InternalError("something went wrong; the log has it")
            )
            if error is not fault:
                logger.exception("a front end's %s failed", head["op"])
            reply["error"] = {"code": error.code, "detail": error.detail, "extra": error.extra}
        if head["op"] != "metrics":
            await self._tell_all()
        front.child.write(reply, fields)

    async def _tell_all(self) -> None:
        await asyncio.gather(*(front.tell() for front in self._fronts if front.is_up))

    async def _metrics(self) -> bytes:
        await asyncio.gather(*(front.report() for front in self._fronts if front.is_up))
        texts = [self._counted, *(front.metrics for front in self._fronts)]
        return await asyncio.get_running_loop().run_in_executor(None, add_up, texts)

    def _say_keys(self) -> None:
        for front in self._fronts:
            front.child.write({"op": "keys", **self.keys.shown()}, {})

    def _start_front(self) -> None:
        try:
            self._fronts.append(FrontEnd(self, self._port))
        except OSError as error:
            logger.error("a front end cannot be started: %s", error.strerror)
            self.spawn(self._replace(None))

    async def _replace(self, front: FrontEnd | None) -> None:
        if self._is_stopping:
            return
        status = None
        if front is not None:
            front.child.kill()
            with suppress(RuntimeError):  # no thread can be started
                status = await asyncio.get_running_loop().run_in_executor(None, front.child.wait)
        self._deaths += 1
        self.node.front_restarts += 1
        if self._deaths >= MAX_DEATHS:
            self.give_up()
            return
        wait_s = pause_s(self._deaths)
        logger.error("a front end ended with status %s; a new one in %g s", status, wait_s)
        await asyncio.sleep(wait_s)
        if not self._is_stopping:
            self._start_front()

    async def _tick(self) -> None:
        """Tell all front ends what is new, periodically until cancelled; none waits for one that hangs."""
        await repeat(TICK_S, self.keys.follow, self._tell_idle)

    def _tell_idle(self) -> None:
        for front in self._fronts:
            if front.is_up and front.is_told:
                self.spawn(front.tell())

    def _on_signal(self) -> None:
        """Drain at the first signal; exit immediately at the second."""
        if self._is_stopping:
            for front in self._fronts:
                front.child.kill()
        self._stop.set()

    async def _drain(self) -> bool:
        """Stop all front ends; return whether all of them drained in time, those that still start at once."""
        self._is_stopping = True
        loop, fronts = asyncio.get_running_loop(), list(self._fronts)
        for front in fronts:
            front.child.send_signal(signal.SIGTERM if front.may_serve else signal.SIGKILL)
        deadline_s = time.monotonic() + self.settings.drain_s + GRACE_S

        def wait(front: FrontEnd) -> int:
            try:
                return front.child.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                front.child.kill()
                return front.child.wait()

        statuses = await asyncio.gather(*(loop.run_in_executor(None, wait, front) for front in fronts))
        return all(status == EXIT_DRAINED for front, status in zip(fronts, statuses, strict=True) if front.may_serve)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine until the end, or until this service stops."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def reserve(host: str, port: int) -> socket.socket:
    """Return a socket that keeps an address for the front ends, and never listens.

    SO_REUSEPORT alone would let another service of the same user have the port, too. So one that shares with nobody
    comes first, and from then on the other is there, which refuses all that would not share.

    Raises:
        StartUpError: the address is invalid or in use.
    """
    with listen(host, port) as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept = bind(host, first.getsockname()[1], is_shared=True)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        return kept


def add_up(texts: list[bytes]) -> bytes:
    r"""Return the sum of several processes' metrics, in Prometheus' text format.

    Examples:
        >>> print(add_up([b"# TYPE a counter\na 1\n", b"# TYPE a counter\na 2\na{b=\"c\"} 3\n"]).decode(), end="")
        # TYPE a counter
        a 3.0
        a{b="c"} 3.0
    """
    comments: dict[str, dict[str, None]] = {}
    samples: dict[str, dict[str, float]] = {}
    family = ""
    for text in texts:
        for line in text.decode().splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                comments.setdefault(family, {})[line] = None
                continue
            sample, _, value = line.rpartition(" ")
            sums = samples.setdefault(family, {})
            known = sums.get(sample, 0.0)
            sums[sample] = max(known, float(value)) if family.startswith(SHARED_METRICS) else known + float(value)
    written: list[str] = []
    for family, lines in comments.items():
        written += [*lines, *(f"{sample} {value}" for sample, value in samples.get(family, {}).items())]
    return "".join(f"{line}\n" for line in written).encode()


def counted(text: bytes) -> bytes:
    r"""Return what stays true of a process's metrics when it is gone: its own counters and histograms.

    Examples:
        >>> counted(b"# HELP a A.\n# TYPE a counter\na 1\n# HELP b B.\n# TYPE b gauge\nb 2\n")
        b'# HELP a A.\n# TYPE a counter\na 1\n'
    """
    families = re.split(rb"^(?=# HELP )", text, flags=re.MULTILINE)
    shared = tuple(b"# HELP " + name.encode() for name in SHARED_METRICS)
    is_count = re.compile(rb"^# TYPE \S+ (counter|histogram)$", re.MULTILINE)
    return b"".join(one for one in families if is_count.search(one) and not one.startswith(shared))


def supervise(settings: Settings) -> int:
    """Serve with several front ends until told to stop, and return the exit status.

    Raises:
        StartUpError: the service cannot start.
    """
    import uvloop

    if settings.tracing:  # the front ends need it
        expect_opentelemetry()

    async def run() -> int:
        return await Supervisor(settings, resolve_devices(settings.device, settings.workers)).run()

    try:
        return uvloop.run(run())
    finally:  # or Python would set the default action before it ends, and SIGHUP kill
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
