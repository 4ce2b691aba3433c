"""Bugs to plant into the scheduler and the connection: each is one replacement in their source."""

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
    "the timer is not set again": ("        self._look_within(min(next_s, due_s - now_s))", "        pass"),
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
