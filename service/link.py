"""The front end's side of a worker: batches become frames, and frames become results.

A link connects one front end with one worker; several front ends may have links to the same worker. A link does not
start, watch or kill processes: it lives until its socket is closed.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import numpy as np

from .scheduler import PREEMPTING_COST, Batch, BatchKey, Reason, Scheduler
from .shared import SHARED_BYTES, Buffer, Buffers, offsets
from .wire import Array, Channel, WireError, cut

__all__ = ["Link", "Links"]

logger = logging.getLogger(__name__)

#: Reasons that a worker may give; any other means that the numbers cannot be had.
REASONS = frozenset({"memory", "late"})
#: Share of the time limit of a batch after which the loss of its worker is put down to that limit.
LATE_SHARE = 0.8


class Links:
    """The links of a front end to its workers; the scheduler's :class:`~service.scheduler.Workers`.

    Args:
        batch_s: Time limit of a batch.
        spin_s: Time for which the event loop does not sleep while the only request is computed.
    """

    def __init__(self, batch_s: float, spin_s: float = 0.0) -> None:
        """Start without links."""
        self.batch_s, self.spin_s = batch_s, spin_s
        self._links: list[Link] = []
        self.scheduler: Scheduler | None = None

    def add(self, sock: socket.socket, on_lost: Callable[[], None] | None = None) -> None:
        """Add a worker, which is used until its socket is closed."""
        assert self.scheduler is not None
        self._links.append(Link(sock, self.scheduler, self, on_lost))
        self.scheduler.dispatch()

    def remove(self, link: Link) -> None:
        """Stop using a worker."""
        self._links.remove(link)

    def idle(self) -> Link | None:
        """Return the worker that has been idle for the longest time, or ``None``."""
        found = None
        for link in self._links:
            if not link.running and (found is None or link.since_s < found.since_s):
                found = link
        return found

    def preemptible(self) -> Link | None:
        """Return a worker whose batches are all preemptible, or ``None``."""
        return next((link for link in self._links if 0 < link.preemptible == len(link.running)), None)

    def unsupplied(self) -> Link | None:
        """Return a worker that computes a preemptible batch and has no next batch, or ``None``."""
        return next((link for link in self._links if 1 == link.preemptible == len(link.running)), None)

    def alive(self) -> Link | None:
        """Return any worker, or ``None`` if there is none."""
        return next(iter(self._links), None)

    def drop_idle_buffers(self) -> None:
        """Free shared memory that has been idle for a while."""
        for link in self._links:
            link.buffers.drop_idle()

    def close(self) -> None:
        """Close all links; jobs in progress are not ended."""
        for link in self._links:
            link.close()
        self._links.clear()


class Link:
    """The connection to one worker, as the scheduler uses it.

    Args:
        sock: The front end's end of a socket pair.
        scheduler: The scheduler whose batches it runs.
        links: The collection that it belongs to while it is alive.
        on_lost: Called when the worker closes the connection.

    Attributes:
        running: Batches that were sent and not answered, by number: one that is computed, perhaps a small one that
            preempts it between tiles, and the next large one.
        preemptible: Number of these that are preemptible.
        since_s: Time when the worker last became busy or idle, on the monotonic clock.
    """

    def __init__(
        self, sock: socket.socket, scheduler: Scheduler, links: Links, on_lost: Callable[[], None] | None
    ) -> None:
        """Start with an idle worker."""
        self.running: dict[int, Batch] = {}
        self.preemptible = 0
        self.since_s = time.monotonic()
        self.buffers = Buffers(self._drop)
        self._arriving: dict[int, Batch] = {}
        self._plans: dict[int, BatchKey] = {}
        self._numbers = count(1)
        self._scheduler, self._links, self._report_loss = scheduler, links, on_lost
        self._channel = Channel(sock, self._on_frame, self._on_lost, self._on_head)

    def run(self, batch: Batch) -> None:
        """Send a batch to the worker."""
        key, number = batch.key, next(self._numbers)
        head: dict[str, Any] = {
            "op": "evaluate",
            "number": number,
            "model": key.model,
            "dtype": key.dtype,
            "quantities": key.quantities,
            "form": key.form,
            "sizes": batch.sizes,
            "is_alone": batch.is_retry,
            "is_small": not batch.is_retry and batch.cost <= PREEMPTING_COST,
        }
        fds: tuple[int, ...] = ()
        if key.form == "arrays" and batch.rows * key.row_bytes >= SHARED_BYTES:
            fds = self._lend(batch, head)
        self.running[number] = batch
        self.preemptible += batch.is_preemptible
        self.since_s = batch.sent_s = time.monotonic()
        self._channel.write(head, _arrays(batch), fds)
        if self._links.spin_s and self._scheduler.queue.requests == 1:
            self._channel.stay_awake(self._links.spin_s)

    def _lend(self, batch: Batch, head: dict[str, Any]) -> tuple[int, ...]:
        """Lend a batch a buffer for its results; return the descriptor if the worker does not have it yet."""
        places, size = offsets(_shapes(batch), np.dtype(batch.key.dtype).itemsize)
        buffer = batch.buffer = self.buffers.lend(size)
        if buffer is None:
            return ()
        head["buffer"] = [buffer.number, buffer.size, *places]
        fds = () if buffer.is_sent else (buffer.fd,)
        buffer.is_sent = True
        return fds

    def plan(self, key: BatchKey) -> None:
        """Ask the worker for the cost of a row."""
        number = next(self._numbers)
        self._plans[number] = key
        head = {"op": "plan", "number": number, "model": key.model, "dtype": key.dtype}
        self._channel.write({**head, "quantities": key.quantities, "is_weighted": key.is_weighted, "k": key.k}, {})

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()
        self.buffers.close()

    def _drop(self, buffer: Buffer) -> None:
        self._channel.write({"op": "drop", "buffer": buffer.number}, {})

    def _on_frame(self, head: dict[str, Any], fields: dict[str, Any]) -> None:
        number, op = head.get("number"), head.get("op")
        if type(number) is not int:
            raise WireError("expected the number of what is answered")
        if op == "done" and (batch := self._arriving.pop(number, None) or self._computed(number)) is not None:
            self._on_done(batch, head, fields)
        elif op == "planned" and number in self._plans:
            self._on_planned(self._plans.pop(number), head)
        else:
            raise WireError("expected an answer to what was asked")

    def _on_head(self, head: dict[str, Any]) -> None:
        """Mark a batch as computed when the head of its results arrives, so that the worker gets the next one."""
        number = head.get("number")
        if head.get("op") == "done" and type(number) is int and (batch := self._computed(number)) is not None:
            self._arriving[number] = batch
            self._scheduler.dispatch()

    def _computed(self, number: int) -> Batch | None:
        """Remove and return the batch with this number, or ``None``."""
        batch = self.running.pop(number, None)
        if batch is not None:
            self.preemptible -= batch.is_preemptible
            self.since_s = time.monotonic()
        return batch

    def _on_done(self, batch: Batch, head: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        parts, buffer = None, batch.buffer
        batch.buffer = None
        if "error" not in head:
            parts = (
                _texts(batch, head, fields) if batch.key.form != "arrays" else _results(batch, buffer, head, fields)
            )
        if buffer is not None and (parts is None or fields):
            buffer.give_back()
        if parts is None:
            self._scheduler.fail(batch, _reason(head))
        else:
            self._scheduler.finish(batch, parts)
        self._scheduler.dispatch()

    def _on_planned(self, key: BatchKey, head: Mapping[str, Any]) -> None:
        row_cost, row_s = head.get("row_cost"), head.get("row_s")
        if isinstance(row_cost, int | float) and isinstance(row_s, int | float):
            self._scheduler.learn_cost(key, row_cost, row_s)
        else:
            self._scheduler.fail_plan(key, _reason(head))

    def _on_lost(self) -> None:
        self._links.remove(self)
        self.buffers.close()
        lost = [*self._arriving.values(), *self.running.values()]
        for batch in lost:
            took_s = time.monotonic() - batch.sent_s
            self._scheduler.fail(batch, "late" if took_s > LATE_SHARE * self._links.batch_s else "lost")
        for key in self._plans.values():
            self._scheduler.fail_plan(key, "lost")
        self.running, self._arriving, self._plans, self.preemptible = {}, {}, {}, 0
        if self._report_loss is not None:
            self._report_loss()


def _reason(head: Mapping[str, Any]) -> Reason:
    reason = head.get("error")
    return reason if isinstance(reason, str) and reason in REASONS else "error"


def _shapes(batch: Batch) -> list[tuple[int, ...]]:
    """Return the shapes of a batch's results, one per quantity."""
    return [(batch.rows, *shape) for shape in batch.key.shapes]


def _texts(batch: Batch, head: Mapping[str, Any], fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the text of each slice's rows by quantity, or ``None`` if the frame does not fit the batch."""
    lengths, text = head.get("lengths"), fields.get("text", b"")
    if not isinstance(lengths, list) or len(lengths) != len(batch.slices) * len(batch.key.quantities):
        return None
    parts: list[dict[str, Any]] = [{} for _ in batch.slices] if len(batch.slices) > 1 else [{}]
    start, sizes = 0, iter(lengths)
    for name in batch.key.quantities:
        for part in parts:
            length = next(sizes)
            if type(length) is not int or length < 0:
                return None
            part[name] = text[start : start + length]
            start += length
    return parts if start == len(text) else None


def _results(
    batch: Batch, buffer: Buffer | None, head: Mapping[str, Any], fields: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """Return each slice's arrays by quantity, from the buffer or the frame; ``None`` if they do not fit the batch."""
    names, shapes, dtype = batch.key.quantities, _shapes(batch), batch.key.dtype
    if buffer is not None and not fields:
        if head.get("shapes") != [list(shape) for shape in shapes]:
            return None
        arrays = buffer.arrays(shapes, dtype)
    else:
        arrays = [fields.get(name) for name in names]
        for array, shape in zip(arrays, shapes, strict=True):
            if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.name != dtype:
                return None
    parts = [cut(array, batch.sizes) for array in arrays]
    return [dict(zip(names, part, strict=True)) for part in zip(*parts, strict=True)]


def _arrays(batch: Batch) -> dict[str, Array]:
    """Return the inputs of a batch."""
    arrays = {}
    (first, start, stop), *others = batch.slices
    for name in ("inputs", "weights", "directions"):
        array = getattr(first, name)
        if array is None:
            continue
        if others:
            array = np.concatenate([_rows(getattr(job, name), *rows) for job, *rows in batch.slices])
        elif len(array) != stop - start:
            array = _rows(array, start, stop)
        arrays[name] = array
    return arrays


def _rows(array: Array, start: int, stop: int) -> Any:
    """Return rows of an array; an array with a single row, shared by all points, is returned whole."""
    if len(array) == 1 < stop - start:
        return np.broadcast_to(array, (stop - start, *array.shape[1:]))
    return array if len(array) == 1 else array[start:stop]
