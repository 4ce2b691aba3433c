"""Simulation of a node: processes, sockets, files, operators and times are drawn from one seed.

Processes die, hang, start slowly or never, send invalid frames, run out of memory, cannot be started or connected, or
cannot be killed. Files are added, changed and removed; two may have the same version, and some kill or hang the
worker that loads them. Operators load and unload models while requests hold versions.

After every event the invariants (the ledger) are checked. No healthy worker is killed, and no faulty one is kept. A
worker that is in use has all models that are served. Nothing waits for a dead worker. A replaced version is served
until its successor is ready. After a while without faults, the table equals the folder, and each worker has exactly
the models that are in the table or held by requests.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
import stat
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from hessquik_client.errors import ModelNotFound, ModelRefused, StartUpError, VersionNotFound
from service import node as node_module
from service import repository as repository_module
from service import workers as workers_module
from service.child import LONGEST_PAUSE_S
from service.wire import WireError
from tests.simulation.folder import Folder
from tests.simulation.loop import SimulatedLoop
from tests.simulation.planted import planted
from tests.simulation.world import expect, play

ROOT = str(Path(__file__).parent)
#: The settings' times.
START_S, LOAD_S, BATCH_S, WATCH_S = 10.0, 5.0, 1.0, 1.0
#: Time that a slow disk takes to list a folder or to read a file.
SLOW_DISK_S = 1.5
#: Room for ticks and for the way of frames.
ROOM_S = 1.0
#: Time after which a quiet world is what it should be.
QUIET_S = 300.0
#: Time in which a dead worker's place is taken again: two waits for its end, the longest pause, and room.
REPLACED_S = 2 * workers_module.END_S + LONGEST_PAUSE_S + ROOM_S
PATHS = ["a", "b", "a/1", "a/2", "a/10", "b/1", "b/3", "c/2", "c/1", "a/01", "two words"]
KINDS = ["good"] * 7 + ["slow"] * 3 + ["bad", "kills", "hangs"]
NONSENSE = [{}, {"op": "pong"}, {"op": "loaded", "model": -1}, {"op": "ready"}, {"op": ["x"]}]
PONG = {"op": "pong", "memory_bytes": 1, "busy_total_s": 0.25, "checked_rows": 0}


def make_modules(part: str = "", old: str = "", new: str = "") -> dict[str, ModuleType]:
    """Return copies of the modules of a node, in one of which a piece of the source is replaced."""
    originals = {"workers": workers_module, "repository": repository_module, "node": node_module}
    made = {name: planted(one, *((old, new) if name == part else ())) for name, one in originals.items()}
    made["repository"].__dict__["LoadError"] = made["workers"].LoadError
    made["node"].__dict__["Repository"] = made["repository"].Repository
    return made


class Process:
    """A worker's process and the socket to it, as :class:`service.child.Child` is.

    Attributes:
        models: Files that it has loaded, by number.
        fault: Its fault, for which it may be killed; empty if it is healthy.
        under_way: Number of frames in transit, in both directions.
    """

    def __init__(self, world: NodeWorld, module: str, arguments: list[str], *calls: Any) -> None:
        if world.is_doomed or world.has_luck(0.05):
            world.deaths += 1
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        self.world, self.pid, self.device = world, next(world.numbers), arguments[0]
        self.on_frame, self.on_lost = calls[0], calls[1]
        self.models: dict[int, bytes] = {}
        self.loads: deque[tuple[int, bytes | None]] = deque()
        self.fault = ""
        self.fault_s = 0.0
        self.is_closed = self.has_ended = self.is_hung = self.is_unkillable = False
        self.under_way = 0
        self.busy_since_s = 0.0
        self.links: list[Link] = []
        self.arrives_s = {"in": 0.0, "out": 0.0}
        self.began_s = world.loop.now
        self.is_up = False
        world.processes.append(self)
        world.open.append(self)
        if world.has_luck(0.04):
            self.fail("it never starts")
        else:
            self.later(world.random.uniform(0.05, 2.0), self.come_up)

    def later(self, delay_s: float, work: Callable[[], None]) -> None:
        self.world.loop.call_later(delay_s, lambda: None if self.has_ended or self.is_hung else work())

    def come_up(self) -> None:
        self.is_up = True
        self.say({"op": "ready"})

    def fail(self, fault: str) -> None:
        """Record a fault, unless the process has one already."""
        if not self.fault:
            self.fault, self.fault_s = fault, self.world.loop.now
            self.world.ends[fault] += 1

    # The supervisor's side.

    def write(self, head: dict[str, Any], fields: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        if not self.is_closed:
            self.send("in", lambda: self.receive(head, fields))

    def connect(self, head: dict[str, Any]) -> Link:
        if self.world.has_luck(0.03):
            self.fail("it cannot be connected")
            raise OSError(errno.EMFILE, "Too many open files")
        self.write(head, {})
        link = Link(self)
        self.links.append(link)
        return link

    def close(self) -> None:
        self.is_closed = True
        if self in self.world.open:
            self.world.open.remove(self)
        self.later(self.world.random.uniform(0, 0.5), self.end)

    def kill(self) -> None:
        expect(bool(self.fault) or self.is_closed, "no worker that is well is killed")
        self.world.ends["killed"] += 1
        self.fault = self.fault or "killed"
        self.world.deaths += 1
        if not self.is_unkillable:
            self.end()

    def wait(self, timeout_s: float) -> int:
        if not self.has_ended:
            if self.is_hung or not self.is_closed:
                raise subprocess.TimeoutExpired("worker", timeout_s)
            self.end()
        return -9

    # The process's side.

    def send(self, way: str, work: Callable[[], None]) -> None:
        """Call a function when a frame arrives: after a random delay, in the order of sending."""
        world = self.world
        self.under_way += 1
        self.arrives_s[way] = max(self.arrives_s[way], world.loop.now + world.random.uniform(0, 0.01))

        def arrive() -> None:
            self.under_way -= 1
            work()

        world.loop.call_at(self.arrives_s[way], arrive)

    def say(self, head: dict[str, Any]) -> None:
        if not self.has_ended and not self.is_hung:
            self.send("out", lambda: self.deliver(head))

    def deliver(self, head: dict[str, Any]) -> None:
        if self.is_closed:
            return
        try:
            self.on_frame(dict(head), {})
            if head.get("busy_s", BATCH_S + 1) <= BATCH_S:
                self.world.deaths = 0
        except WireError:
            expect(bool(self.fault), "no answer of a worker that is well is refused")
            self.lose()

    def lose(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.world.deaths += 1
            self.later(self.world.random.uniform(0, 0.5), self.end)
            self.on_lost()

    def end(self) -> None:
        """End the process."""
        if not self.has_ended:
            self.has_ended = True
            self.world.processes.remove(self)
            if self.loads:
                self.world.load_deaths[self.loads[0][0]] += 1
            for link in self.links:
                self.send("out", link.end)
            self.send("out", self.lose)

    def receive(self, head: dict[str, Any], fields: dict[str, Any]) -> None:
        if head["op"] == "load" and self.fault:  # it is lost while the model is to be loaded
            self.world.spoil(head["model"], fields["file"])
        if self.has_ended or self.is_hung:
            return
        match head["op"]:
            case "load" | "unload":
                self.loads.append((head["model"], fields.get("file")))
                if len(self.loads) == 1:
                    self.load()
            case "ping":
                now, since_s = self.world.loop.now, self.busy_since_s
                is_stuck = self.fault == "its batch is stuck"
                busy_s = now - since_s if since_s else 0.0
                self.say({**PONG, "busy_s": busy_s, "stalled_s": busy_s if is_stuck else 0.0})

    def load(self) -> None:
        """Begin the next load or unload of the loading thread."""
        draw, world = self.world.random, self.world
        if not self.loads:
            return
        model, data = self.loads[0]
        if data is None:
            self.models.pop(model, None)
            self.loads.popleft()
            self.load()
            return
        kind = data.partition(b":")[0].decode()
        expect(model not in self.models, "nothing is loaded twice")
        if kind == "hangs":
            self.fail("its load hangs")
            world.spoil(model, data)
        elif kind == "kills":
            world.spoil(model, data)
            self.later(draw.uniform(0, 0.5), partial(self.die, "its model ends it"))
        elif kind == "bad" or world.has_luck(0.02):
            world.spoil(model, data)
            self.later(draw.uniform(0, 0.5), lambda: self.loaded(model, data, {"error": "expected less"}))
        else:
            took_s = draw.uniform(1, LOAD_S - ROOM_S) if kind == "slow" else draw.uniform(0.01, 0.3)
            facts = {"d": 1, "m": 1, "dtype": "float64"}
            self.later(took_s, lambda: self.loaded(model, data, facts))

    def loaded(self, model: int, data: bytes, facts: dict[str, Any]) -> None:
        self.loads.popleft()
        if "error" in facts:
            self.world.refusals.add(model)
        else:
            self.models[model] = data
        self.say({"op": "loaded", "model": model, **facts})
        self.load()

    # Faults.

    def die(self, fault: str = "it dies") -> None:
        self.spoil()
        self.fail(fault)
        self.end()

    def hang(self) -> None:
        self.fail("it hangs")
        self.is_hung = True
        self.is_unkillable = self.world.has_luck(0.1)
        self.spoil()

    def talk_nonsense(self) -> None:
        self.fail("it talks nonsense")
        self.spoil()
        self.say(dict(self.world.random.choice(NONSENSE)))

    def disagree(self) -> None:
        self.fail("it disagrees with itself")
        self.spoil()
        self.say({"op": "disagreed", "model": 1})

    def break_link(self) -> None:
        if self.links:
            self.fail("its connection ends")
            self.spoil()
            self.send("out", self.links[0].end)

    def spoil(self) -> None:
        """Record that models may be refused because their worker is lost while it loads them."""
        for model, data in self.loads:
            self.world.spoil(model, data)

    def compute(self) -> None:
        if self.busy_since_s or not self.links:
            return
        self.busy_since_s = self.world.loop.now
        if self.world.has_luck(0.1):
            self.fail("its batch is stuck")
            self.spoil()
        else:
            self.later(self.world.random.uniform(0.01, 0.8 * BATCH_S), self.rest)

    def rest(self) -> None:
        if self.fault != "its batch is stuck":
            self.busy_since_s = 0.0


class Link:
    """The front's end of a connection to a worker."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.on_lost: Callable[[], None] | None = None

    def end(self) -> None:
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost()


class NodeWorld:
    """A node with a simulated folder, simulated processes, operators and requests."""

    def __init__(self, seed: int, modules: dict[str, ModuleType]) -> None:
        self.random = random.Random(seed)
        self.modules = modules
        draw = self.random
        self.loop = SimulatedLoop(lambda: draw.uniform(0, 0.05 if draw.random() < 0.8 else SLOW_DISK_S))
        self.folder = Folder(ROOT, draw.shuffle)
        modules["repository"].__dict__.update(os=self.folder, open=lambda opened, _: opened)
        self.numbers = count(1)
        self.processes: list[Process] = []
        self.open: list[Process] = []
        self.events = 0
        self.ends: Counter[str] = Counter()
        self.deaths = 0
        self.load_deaths: Counter[int] = Counter()
        self.spoiled: set[int | bytes] = set()
        self.unloaded: dict[tuple[str, int | None], int] = {}
        self.removed: dict[tuple[str, int], int] = {}
        self.unsure: dict[tuple[str, int | None], int] = {}
        self.refusals: set[int] = set()
        self.operations: set[asyncio.Task[None]] = set()
        self.held: list[Any] = []
        self.dead_since_s: dict[int, float] = {}
        self.ready: dict[tuple[str, int], Any] = {}
        self.is_faulty, self.is_doomed, self.has_given_up, self.has_stopped = True, False, False, False
        self.slots = draw.randint(1, 3)
        self.rate = draw.choice([0.003, 0.01, 0.03])
        times = {"start_timeout_s": START_S, "load_timeout_s": LOAD_S, "batch_timeout_s": BATCH_S}
        settings = SimpleNamespace(threads=1, spin_us=0, self_check=0.0, models=Path(ROOT), watch_s=WATCH_S, **times)
        Workers = modules["workers"].Workers
        modules["node"].__dict__["Workers"] = partial(
            Workers, now=self.loop.time, spawn=lambda *arguments: Process(self, *arguments)
        )
        self.node = modules["node"].Node(settings, ["cpu"] * self.slots)
        for _ in range(draw.randrange(6)):
            self.change_file()
        self.starting = self.loop.create_task(self.node.start(self))

    # The events of the node's users.

    def attach(self, worker: Any) -> None:
        link = worker.connect()
        link.on_lost = partial(worker.kill, "its connection ended")

    def give_up(self) -> None:
        expect(self.deaths >= workers_module.MAX_DEATHS, "only workers that cannot be kept alive are given up")
        self.has_given_up = True

    # Events.

    def has_luck(self, share: float) -> bool:
        """Return whether a fault of this probability happens."""
        return self.is_faulty and self.random.random() < share

    def spoil(self, model: int, data: bytes | None) -> None:
        """Record that a model, and files with the same contents, may be refused."""
        if data is not None:
            self.spoiled |= {model, data}

    def change_file(self) -> None:
        """Write, touch or remove a file, or make a folder unreadable for a while."""
        draw, folder = self.random, self.folder
        path = draw.choice(PATHS) + ".safetensors"
        drawn = draw.random()
        if drawn < 0.15:
            folder.unreadable ^= {draw.choice(["", "a", "b", path])}
            self.ends["unreadable"] += 1
        elif drawn < 0.6 or path not in folder.files:
            kind = draw.choice(KINDS)
            data = b"%s:%d" % (kind.encode(), draw.randrange(4) if draw.random() < 0.3 else next(self.numbers))
            mode = {"mode": stat.S_IFIFO} if draw.random() < 0.03 else {"leads_out": draw.random() < 0.03}
            folder.put(path, data, **mode)
        elif drawn < 0.7:
            folder.touch(path)
        else:
            del folder.files[path]

    def operate(self) -> None:
        """Start to load or unload a model, as an operator does."""
        name, version = self.random.choice("aaabbcd"), self.random.choice([None, 1, 2, 3])
        if self.random.random() < 0.5:
            operation = self.loop.create_task(self.load(name))
            if self.random.random() < 0.1:
                self.loop.call_later(self.random.uniform(0, 1), operation.cancel)
        else:
            operation = self.loop.create_task(self.unload(name, version))
        self.operations.add(operation)
        operation.add_done_callback(self.operations.discard)

    async def load(self, name: str) -> None:
        before = {one for one in self.unloaded.items() if one[0][0] == name}
        settled = {one for one in self.unsure.items() if one[0][0] == name}
        files = self.found()
        try:
            loaded = await self.node.load(name)
        except ModelNotFound:
            self.ends["not found"] += 1
            kept = [key for key, file in self.found().items() if key[0] == name and files.get(key) is file]
            expect(not kept, "a load finds the files that are there all the time")
            return
        except ModelRefused as error:
            refused = [one for one in error.extra["loaded"] if one["state"] == "failed"]
            expect(not refused or bool(refused[0]["reason"]), "a refusal says why")
            self.ends["refused"] += 1
            if not error.extra["loaded"]:
                return  # the folder could not be read
        except asyncio.CancelledError:
            self.ends["cancelled"] += 1
            # The load continues, and may not find the model; only a load that is asked for later settles that.
            self.unsure |= {key: next(self.numbers) for key, _ in before}
            settled, files = set(), {}
        else:
            expect(all(one.state == "ready" for one in loaded), "what was loaded is ready")
            self.ends["loaded"] += 1
        self.unsure = dict(self.unsure.items() - settled)
        self.unloaded = dict(self.unloaded.items() - before)
        self.check_loaded(name, files)

    def check_loaded(self, name: str, files: dict[tuple[str, int], Any]) -> None:
        """Check that a load that has just ended has tried the files that were there from its beginning."""
        table = self.table()
        for key, file in self.wanted().items():
            if key[0] == name and files.get(key) is file and self.is_sure(key):
                is_loaded = key in table and table[key].tried[-1] >= file.number
                expect(is_loaded, "a load takes the files that are there all the time")

    async def unload(self, name: str, version: int | None) -> None:
        try:
            versions = self.node.repository.versions(name)
            is_last = version is not None and set(versions) == {version}
            await self.node.unload(name, version)
        except (ModelNotFound, VersionNotFound):
            self.ends["not unloaded"] += 1
        else:
            self.unloaded[name, None if is_last else version] = next(self.numbers)
            self.ends["unloaded"] += 1

    def hold(self) -> None:
        """Hold a version that is ready, as a request does."""
        repository = self.node.repository
        ready = [one for name in repository.names() for one in repository.versions(name).values()]
        ready = [one for one in ready if one.state == "ready"]
        if ready and len(self.held) < 5:
            served = self.random.choice(ready)
            repository.hold(served)
            self.held.append(served)

    def release(self) -> None:
        if self.held:
            self.node.repository.release(self.held.pop(self.random.randrange(len(self.held))))

    def break_something(self) -> None:
        process = self.random.choice(self.processes)
        if process.is_closed or process.fault or not process.is_up:
            return
        faults = (process.die, process.hang, process.talk_nonsense, process.disagree, process.break_link)
        self.random.choice(faults)()

    # Time.

    def step(self) -> None:
        """Run the next event, and check the invariants."""
        if self.has_stopped or (self.starting.done() and self.starting.exception() is not None):
            self.loop.step()
            return
        drawn = self.random.random() / self.rate
        if drawn < 0.2:
            before = self.found().keys()
            self.change_file()
            # Also of what is unloaded: a load under way may have seen the file, and the next look misses it.
            self.removed |= dict.fromkeys(before - self.found().keys(), self.folder.last_number)
        elif drawn < 0.5 and len(self.operations) < 3:
            self.loop.run(self.operate)
        elif drawn < 0.6:
            self.loop.run(self.hold)
        elif drawn < 0.7:
            self.loop.run(self.release)
        elif drawn < 0.9 and self.processes:
            self.loop.run(self.random.choice(self.processes).compute)
        elif drawn < 1.0 and self.processes:
            self.loop.run(self.break_something)
        elif drawn < 1.005:
            self.settle()
        elif drawn < 1.006:
            self.is_doomed = True
        self.next_event()

    def next_event(self) -> None:
        self.events += 1
        self.loop.step()
        self.check()

    def settle(self) -> None:
        """Stop all faults, and run until the node has the state that it should have."""
        if self.is_doomed:
            return
        self.is_faulty = False
        self.folder.unreadable.clear()
        limit_s = self.loop.now + QUIET_S
        while (complaint := next(self.complaints(), None)) is not None and not self.has_given_up:
            expect(self.loop.now < limit_s, complaint)
            self.next_event()
            if self.starting.done() and self.starting.exception() is not None:
                break
        self.is_faulty = True
        self.ends["quiet"] += 1

    def drain(self) -> None:
        """Stop all faults, then the node, and check that nothing is left."""
        self.settle()
        if self.is_doomed and not self.has_failed_to_start():
            limit_s = self.loop.now + QUIET_S
            while not self.has_given_up and not self.has_failed_to_start():
                for process in list(self.processes):
                    if process.is_up and not process.fault:
                        process.die()
                expect(self.loop.now < limit_s, "workers that cannot be kept alive are given up")
                self.next_event()
        self.ends["given up"] += self.has_given_up
        if self.has_failed_to_start():
            error = self.starting.exception()
            expect(isinstance(error, StartUpError), f"a start fails by a StartUpError, got {error!r}")
            late = self.loop.now >= START_S
            expect(late or self.deaths >= workers_module.MAX_FIRST_DEATHS, "a start fails when no worker comes up")
            self.ends["not started"] += 1
        self.is_faulty = False
        while self.held:
            self.loop.run(self.release)
        stopping = self.loop.create_task(self.node.stop())
        self.has_stopped = True
        limit_s = self.loop.now + 60
        while self.loop.next_s() is not None:
            self.events += 1
            self.loop.step()
            expect(self.loop.now < limit_s, "no timer is left of a node that was stopped")
        expect(stopping.done() and stopping.exception() is None, "a node stops")
        expect(self.starting.done(), "a start ends when the node is stopped")
        expect(not self.operations, "every load and unload ends")
        expect(all(one.is_unkillable for one in self.processes), "no process is left of a node that was stopped")
        expect(not self.open, "no socket is left of a node that was stopped")
        expect(not self.node.workers._models, "no file is kept of a node that was stopped")
        expect(not self.loop.errors, f"every error is caught, got {self.loop.errors}")

    def has_failed_to_start(self) -> bool:
        return self.starting.done() and not self.starting.cancelled() and self.starting.exception() is not None

    # The ledger.

    def check(self) -> None:
        """Check the node's state against what was observed from outside."""
        now, workers = self.loop.now, self.node.workers
        expect(not self.loop.errors, f"every error is caught, got {self.loop.errors}")
        if self.has_given_up:
            return
        served = self.check_table()
        processes = {one.on_lost.__self__: one for one in self.processes}  # by worker
        for slot, worker in enumerate(workers.workers):
            process = processes.get(worker)
            if worker.state == "dead":
                since_s = self.dead_since_s.setdefault(slot, now)
                expect(self.is_doomed or now - since_s < REPLACED_S, "a dead worker is replaced")
                continue
            self.dead_since_s.pop(slot, None)
            if process is None:
                continue  # it ended, which is on its way
            if worker.is_ready:
                expect(served <= worker.loaded, "a worker that is used has all that is served")
                is_wired = any(link.on_lost is not None for link in process.links)
                expect(is_wired or bool(process.fault), "a worker that is ready is used")
            if process.is_up:
                self.check_faults(worker, process)
            else:
                expect(now - process.began_s < START_S + ROOM_S, "a worker that does not start is replaced")
            if not process.under_way and not process.loads and not process.is_hung:
                expect(process.models.keys() == worker.loaded, "a worker has the models that it said it has")
        for process in self.processes:
            is_of_use = process.on_lost.__self__ in workers.workers
            known = is_of_use or process.is_unkillable
            expect(known, "no process is left behind when its place is taken")
        for process in self.open:
            expect(process.on_lost.__self__.state != "dead", "the socket of a dead worker is closed")
        for entry in workers._models.values():
            for worker, future in entry.waiters:
                if worker is not None and not future.done():
                    expect(worker.state != "dead", "nobody waits for a worker that is dead")
        well_s = [worker.well_s for worker in workers.workers if worker.is_ready]
        expect(workers.is_fresh() == any(now - one <= workers_module.FRESH_S for one in well_s), "freshness is true")

    def check_faults(self, worker: Any, process: Process) -> None:
        """Check that faults are noticed in time."""
        late_s = self.loop.now - process.fault_s
        if process.fault == "it hangs":
            limit_s = max(BATCH_S, workers_module.FRESH_S) if worker.is_ready else LOAD_S
            expect(late_s < limit_s + ROOM_S or process.is_closed, "a worker that hangs is replaced")
        elif process.fault == "its load hangs":
            expect(late_s < LOAD_S + ROOM_S or process.is_closed, "a worker whose load hangs is replaced")
        elif process.fault == "its batch is stuck":
            expect(late_s < BATCH_S + ROOM_S or process.is_closed, "a worker whose batch is stuck is replaced")
        elif process.fault:
            expect(late_s < ROOM_S + 0.5 or process.is_closed, f"a worker is replaced, of which {process.fault}")

    def check_table(self) -> set[int]:
        """Check the versions that were ready before; return the numbers of the models that workers must have."""
        table = self.table()
        for key, before in self.ready.items():
            after = table.get(key)
            if after is not before and after is not None and before.reason is None:
                expect(after.state == "ready", "what is replaced is served until its successor is ready")
            if before.reason is not None and before.id not in self.refusals:
                expect(False, "what is served is refused only by a worker's answer")
        for key in self.ready.keys() - table.keys():
            is_unloaded = key in self.unloaded or (key[0], None) in self.unloaded or not self.is_sure(key)
            is_removed = self.removed.get(key, 0) >= self.ready[key].file.stamp[-1]  # since its file was written
            expect(is_unloaded or is_removed, "what is in the folder is served until it is unloaded")
        self.ready = {key: one for key, one in table.items() if one.state == "ready"}
        for one in table.values():
            if one.reason is not None and one.users == 0 and one.id in self.node.workers._models:
                expect(False, "workers keep nothing that was refused")
        needed = {one.id for one in self.ready.values()}
        return needed | {one.id for one in self.held if one.reason is None and one.id not in self.spoiled}

    def table(self) -> dict[tuple[str, int], Any]:
        """Return what the repository has, by name and version."""
        repository = self.node.repository
        return {
            (name, number): one for name in repository.names() for number, one in repository.versions(name).items()
        }

    def complaints(self) -> Iterator[str]:
        """Yield a sentence for each property of a node without faults that does not hold yet."""
        workers = self.node.workers
        if self.operations or not self.starting.done():
            yield "every load, unload and start ends"
        elif not self.has_failed_to_start():
            if not all(worker.is_ready for worker in workers.workers):
                yield "all workers become ready"
            if not workers.is_fresh():
                yield "workers that are well are fresh"
            yield from self.complaints_of_the_table()
            numbers = {one.id for one in self.table().values() if one.reason is None}
            numbers |= {one.id for one in self.held if one.id not in self.spoiled or one.id in workers._models}
            if workers._models.keys() != numbers:
                yield "the workers are to have what is in the table or held, and nothing else"
            if any(worker.loaded != numbers or worker.loading for worker in workers.workers):
                yield "every worker has what is in the table or held, and nothing else"

    def complaints_of_the_table(self) -> Iterator[str]:
        """Yield how the table differs from the folder."""
        table, wanted = self.table(), self.wanted()
        for key in filter(self.is_sure, table.keys() - wanted.keys()):
            yield f"{key} is served although the folder does not have it, or it was unloaded"
        for key in filter(self.is_sure, wanted.keys() - table.keys()):
            yield f"{key} is not served although the folder has it"
        repository = self.node.repository
        for name in filter(repository._differs, repository._files.keys() | set(repository.names())):
            yield f"{name} is loaded at every turn"
        for key in table.keys() & wanted.keys():
            one, data = table[key], wanted[key].data
            if one.state == "loading":
                yield "every load comes to an end"
            is_current = one.state == "ready" and one.digest == hashlib.sha256(data).digest()
            if not is_current and data not in self.spoiled | self.folder.refused:
                yield f"{key} is not what the folder has: {one.reason}"

    def is_sure(self, key: tuple[str, int]) -> bool:
        """Return whether the simulation knows if a version was unloaded."""
        return key not in self.unsure and (key[0], None) not in self.unsure

    def wanted(self) -> dict[tuple[str, int], Any]:
        """Return the files that are to be served, by name and version."""
        found, unloaded = self.found().items(), self.unloaded.keys()
        return {key: file for key, file in found if unloaded.isdisjoint({key, (key[0], None)})}

    def found(self) -> dict[tuple[str, int], Any]:
        """Return the files of models in the folder, by name and version."""
        found: dict[tuple[str, int], Any] = {}
        for path in sorted(self.folder.files, key=lambda path: "/" in path):
            file = self.folder.files[path]
            name, _, version = path.removesuffix(".safetensors").partition("/")
            if " " in name or version.startswith("0") or file.leads_out or file.mode != stat.S_IFREG:
                continue
            found.setdefault((name, int(version or 1)), file)
        return found


def run_node(seed: int, steps: int, modules: dict[str, ModuleType]) -> NodeWorld:
    """Run the simulation of a node with a seed."""
    replays = f"tests.simulation.node_world.run_node({seed}, {steps}, make_modules())"
    world = NodeWorld(seed, modules)
    try:
        return play(world, steps, replays)  # type: ignore[no-any-return]
    except Exception:
        world.loop.abandon()
        raise
