"""Bugs to plant into the scheduler: each is one replacement in its source."""

# ruff: noqa: E501

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
