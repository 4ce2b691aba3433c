"""Bugs to plant into the modules that are simulated: each is one replacement in their source."""

# ruff: noqa: E501

from __future__ import annotations

import inspect
import sys
from types import ModuleType


def planted(original: ModuleType, old: str = "", new: str = "") -> ModuleType:
    """Return a copy of a module with a piece of its source replaced."""
    source = inspect.getsource(original)
    assert not old or source.count(old) == 1, f"{source.count(old)} places have {old!r}"
    module = ModuleType("planted")
    module.__package__ = original.__package__  # its imports are relative
    sys.modules["planted"] = module  # where dataclasses look for it
    try:
        exec(compile(source.replace(old, new) if old else source, "planted", "exec"), module.__dict__)
    finally:
        del sys.modules["planted"]
    return module


#: By name: a piece of ``service/scheduler.py`` that occurs once, and its replacement.
BUGS = {
    "the timer is not set again": ("        if self._open:\n            self._set_alarm(min", "        if not self._open:\n            self._set_alarm(min"),
    "the timer is not set for an earlier deadline": ("if job.deadline_s < self._alarm_s:", "if self._alarm is None:"),
    "answers go to the wrong jobs": ("zip(batch.slices, parts, strict=True)", "zip(batch.slices, parts[::-1], strict=True)"),
    "nobody wakes up after a failure": ("            self._give_up_row(rest, reason)\n        self._clock.call_soon(self.dispatch)", "            self._give_up_row(rest, reason)"),
    "nobody wakes up after a request": ("if self._submitted == 1:", "if self._submitted == 2:"),
    "nobody wakes up after a plan": ("_too_expensive(limit_s, row_s))\n        self.dispatch()", "_too_expensive(limit_s, row_s))"),
    "rows that were taken are counted off again": ("self.rows -= job.rows - job.taken", "self.rows -= job.rows"),
    "rows that are taken are not counted off": ("            job.taken += rows\n            self.rows -= rows", "            job.taken += rows"),
    "bytes are not counted off": ("        self.payload_bytes -= job.payload_bytes\n", ""),
    "a closed job stays in line": ("            line.remove(job)\n", ""),
    "an empty line is kept": ("            if not line.fresh and not line.begun:\n                del self._lines[job.key]\n", ""),
    "a closed job stays among the retries": ("        if self._retries:\n            self._retries = [rest", "        if not self._retries:\n            self._retries = [rest"),
    "one request too many": ("if requests > limits.requests:", "if requests > limits.requests + 1:"),
    "one row too few": ("if rows > limits.rows:", "if rows >= limits.rows:"),
    "the second half loses a row": ("second += [(job, cut, stop)] if cut < stop", "second += [(job, cut + 1, stop)] if cut < stop"),
    "results are put together as they came": ("            parts.sort(key=itemgetter(0))\n            for name", "            for name"),
    "results are handed on as they came": ("while parts and parts[0][0] == self.next_row:", "while parts:"),
    "a row fails at its first failure": ("elif rest.failures + 1 < MAX_FAILURES:", "elif rest.failures + 2 < MAX_FAILURES:"),
    "a row fails for a failure in company": ("if batch.rows > 1:  #", "if rest.rows > 1:  #"),
    "a closed job keeps its arrays": ("job.inputs = job.weights = job.directions = None", "pass"),
    "a closed job keeps its callback": ("end, job.end, job.on_rows = job.end, None, None", "end, job.end = job.end, None"),
    "a closed job keeps its results": ("        end(job)\n        job.answers = {}", "        end(job)"),
    "late results reach a closed job": ("if not job.is_closed and job.receive(", "if job.receive("),
    "a batch is not cut at its bytes": ("room = min((most_cost - cost) / row_cost, (most_bytes - reply_bytes) / row_bytes)", "room = (most_cost - cost) / row_cost"),
    "jobs wait for a plan that nobody makes": ("        if key.plan_failures < MAX_FAILURES:\n            self._unplanned[key] = None", "        if key.plan_failures < MAX_FAILURES:\n            pass"),
}  # fmt: skip

#: The same for ``service/http/connection.py``.
CONNECTION_BUGS = {
    "a closed connection keeps its timer": ("self._timer = self._transport = self._parser = None", "self._transport = self._parser = None"),
    "a closed connection keeps its queue": ("        self._queue.clear()\n", ""),
    "queued requests are not abandoned": ("(self._current, *self._queue, self._incoming)", "(self._current, self._incoming)"),
    "a request that is answered is not abandoned": ("(self._current, *self._queue, self._incoming)", "(*self._queue, self._incoming)"),
    "the timer is not set again": ("        self._check_within(min(next_s, due_s - now_s))", "        pass"),
    "bytes of a request are kept": ("        self._application.budget.give(request.held_bytes)\n", ""),
    "bytes of a reply are kept": ("        self._release()\n        waiting", "        waiting"),
    "bytes of a chunked body are counted again": ("budget.take(size - request.held_bytes)", "budget.take(size)"),
    "the last request is answered first": ("self._queue.popleft()", "self._queue.pop()"),
    "reading is not resumed": ("            self._transport.resume_reading()", "            pass"),
    "nobody goes on when the client has taken its reply": ("            self._release()\n            self._idle_since_s = self._loop.time()\n            self._advance()", "            self._release()\n            self._idle_since_s = self._loop.time()"),
    "nobody goes on after a reply": ("        elif self._queue or self._incoming is not None:\n            self._advance()", "        elif False:\n            pass"),
    "a body may be one byte too long": ("if size > most:", "if size > most + 1:"),
    "a body may not be as long as allowed": ("if size > most:", "if size >= most:"),
    "requests are answered after the last reply": (" or self._linger_until_s < math.inf:\n            return None", ":\n            return None"),
    "a fault after an offer to upgrade is not answered": ("            rest_at = upgrade.args[0]\n", "            self._parse_without_upgrade(data[upgrade.args[0] :])\n            return\n"),
    "a client that may not send is waited for": ("            self._receive_by_s = math.inf  # what the client may not send is not waited for\n", ""),
    "a reply to HEAD has a body": ('if head.method == "HEAD":', 'if head.method == "TRACE":'),
    "clients that take nothing are kept": ("            due_s = min(due_s, self._progress_s + limits.send_timeout_s)\n", ""),
    "idle connections are kept": ("due_s = self._idle_since_s + limits.keep_alive_s", "due_s = self._idle_since_s + 1e6"),
    "half a request is waited for": ("due_s = min(self._receive_by_s, self._linger_until_s)", "due_s = self._linger_until_s"),
    "lingering does not end": ("due_s = min(self._receive_by_s, self._linger_until_s)", "due_s = self._receive_by_s"),
    "a remembered head takes what follows its body": ("len(data) - end == head.length:", "len(data) - end >= head.length:"),
    "a remembered head overtakes": ("is_free = self._current is None and not self._queue and self._is_between", "is_free = self._is_between"),
    "the last reply is not said to be the last": ('            more += b"connection: close\\r\\n"', '            more += b""'),
    "a connection that ended is not forgotten": ("        self._server_state.connections.discard(self)\n", ""),
}  # fmt: skip

#: The same for the modules of a node: the module, a piece of its source, and the replacement.
NODE_BUGS = {
    "nobody is asked how it is": ("workers", '            self._write({"op": "ping"})', "            pass"),
    "a worker is asked only once": ("workers", "settings, self._is_asked = self._workers.settings, False", "settings = self._workers.settings"),
    "workers that load are not asked": ("workers", "elif self.is_ready and not self._is_asked:", "elif self.is_ready and not self._is_asked and not self.loading and not self.loaded:"),
    "a worker that loads is killed at the limit of a batch": ("workers", "elif self.is_ready and now - self._heard_s", "elif self.is_up and now - self._heard_s"),
    "a start that hangs is waited for": ("workers", "if self.state is State.STARTING and now - self._since_s > settings.start_timeout_s:", "if self.state is State.STARTING and now - self._since_s > 10 * settings.start_timeout_s:"),
    "a load that hangs is waited for": ("workers", "now - self._load_since_s > settings.load_timeout_s", "now - self._load_since_s > 10 * settings.load_timeout_s"),
    "the time of a load begins with the first of them": ("workers", "                self._load_since_s = now\n", ""),
    "a load that hangs for one worker refuses the model": ("workers", "            if not is_known:\n", "            if True:\n"),
    "a batch that is stuck is waited for": ("workers", "if busy_s > settings.batch_timeout_s:", "if busy_s > 10 * settings.batch_timeout_s:"),
    "a death is not noticed by those who wait": ("workers", "        for entry in self._models.values():\n            entry.settle(worker)\n", ""),
    "a worker whose process cannot be started is not replaced": ("workers", "            self._count_death(True, error.strerror or type(error).__name__)\n            self._spawn(self._replace(slot, worker))", "            self._count_death(True, error.strerror or type(error).__name__)"),
    "a worker that cannot be connected is kept": ("workers", '            worker.kill(f"it cannot be connected: {error.strerror}")', "            pass"),
    "a worker is used before it has everything": ("workers", "if self.state is State.LOADING and not self.loading:", "if self.state is State.LOADING:"),
    "a successor gets no models": ("workers", "            worker.load(model, entry.file)\n        if self._started", "            pass\n        if self._started"),
    "a model is sent again to a worker that has it": ("workers", "if model not in self.loading and model not in self.loaded:", "if model not in self.loaded:"),
    "a model that ends its worker is loaded for ever": ("workers", "            entry.deaths += 1\n", ""),
    "a model that others have is blamed for a death": ("workers", "if entry is not None and entry.facts is None:\n            is_counted", "if entry is not None:\n            is_counted"),
    "signs of life do not forget deaths": ("workers", "            self._workers.on_well()", "            pass"),
    "deaths are not counted": ("workers", "        self._deaths += is_counted\n", ""),
    "what was unloaded stays in the workers": ("workers", "        for worker in self.workers:\n            worker.unload(model)\n        entry.refusal", "        entry.refusal"),
    "what is refused is not told to the owner": ("workers", "        if self._forget(model, why):\n            self._owner.refuse(model, why)", "        self._forget(model, why)"),
    "a stop leaves loads waiting": ("workers", "            self._forget(model, STOPPING)", "            pass"),
    "a stop leaves tasks": ("workers", "        for task in self._tasks:\n            task.cancel()\n", ""),
    "the socket of a dead worker stays open": ("workers", "            self.become(State.DEAD)\n            self.close()\n", "            self.become(State.DEAD)\n"),
    "a replaced version is not freed": ("repository", "            self.retire(replaced)\n", "            pass\n"),
    "a held version is freed": ("repository", "        served.is_retired = True\n        if served.users == 0:", "        served.is_retired = True\n        if True:"),
    "the last release does not free": ("repository", "if served.is_retired and served.users == 0:", "if served.is_retired and served.users < 0:"),
    "a replacement that is refused takes the place": ("repository", '        elif new.reason is None or old is None or old.state != "ready":', "        else:"),
    "what is gone from the folder is served on": ("repository", "for name in self._files.keys() | self._table.keys() if", "for name in self._files if"),
    "a version that is gone is served on": ("repository", "self._keep(name, {file.version for file in wanted})", "self._keep(name, self._tried(name).keys())"),
    "an unload while it is loaded is forgotten": ("repository", "        if self._is_unloaded(file):\n            self.retire(new)\n        elif", "        if"),
    "what was unloaded comes back": ("repository", "return (file.name, None) in self._unloaded or ", "return "),
    "a version that was unloaded comes back": ("repository", " or (file.name, file.version) in self._unloaded", ""),
    "what was unloaded stays so when it is loaded": ("repository", "if key[0] != name or when > asked}", "}"),
    "an unload after a load is undone by it": ("repository", "if key[0] != name or when > asked}", "if key[0] != name}"),
    "a version without files leaves an empty model": ("repository", "        if not versions:\n            self._table.pop(name, None)\n        return dropped", "        return dropped"),
    "what was refused is tried at every turn": ("repository", "            old.tried = file.stamp\n", "            pass\n"),
    "two loads of a model race": ("repository", "self._locks.setdefault(name, asyncio.Lock())", "asyncio.Lock()"),
    "a command does not look at the folder": ("repository", "            await self._scan()\n            if self._is_hidden", "            if self._is_hidden"),
    "a folder that cannot be read is an empty one": ("repository", 'return not {".", name}.isdisjoint(self._look.unreadable)', "return False"),
    "two files of one version replace each other": ("repository", "        elif key in found:", "        elif key in found and False:"),
    "the folder is followed once": ("node", "        while True:\n            await asyncio.sleep(self.settings.watch_s)", "        if True:\n            await asyncio.sleep(self.settings.watch_s)"),
}  # fmt: skip

#: The seed with which the search begins in `make test`, for bugs that need many worlds; `make chaos` begins with 0.
FIRST_SEEDS = {
    "bytes of a reply are kept": 42,
    "nobody goes on when the client has taken its reply": 0,
    "nobody goes on after a reply": 0,
    "requests are answered after the last reply": 20,
    "a client that may not send is waited for": 313,
    "half a request is waited for": 261,
    "lingering does not end": 26,
    "a load that hangs for one worker refuses the model": 74,
    "a worker whose process cannot be started is not replaced": 8,
    "a worker that cannot be connected is kept": 11,
    "a model is sent again to a worker that has it": 35,
    "a model that ends its worker is loaded for ever": 3,
    "a model that others have is blamed for a death": 21,
    "signs of life do not forget deaths": 20,
    "deaths are not counted": 37,
    "what was unloaded stays in the workers": 1,
    "what is refused is not told to the owner": 3,
    "a replaced version is not freed": 1,
    "a held version is freed": 9,
    "the last release does not free": 1,
    "a replacement that is refused takes the place": 3,
    "what is gone from the folder is served on": 3,
    "a version that is gone is served on": 1,
    "an unload while it is loaded is forgotten": 71,
    "what was unloaded comes back": 1,
    "a version that was unloaded comes back": 4,
    "an unload after a load is undone by it": 157,
    "what was refused is tried at every turn": 3,
    "two loads of a model race": 102,
    "a command does not look at the folder": 20,
    "a folder that cannot be read is an empty one": 8,
    "two files of one version replace each other": 1,
    "the folder is followed once": 0,
    "one row too few": 13,
    "a row fails for a failure in company": 16,
}
