"""Who is computed next, and with whom: queues, costs and deadlines. It sees rows and costs, never tensors.

Batch while busy: an idle worker takes what is waiting at once; while all are busy, rows gather. Entries with the
same key may share a batch; a batch is cut where its cost or bytes reach their limits, so that a bulk request holds a
worker for one batch at a time. Between batches, what has received least goes first: every entry has a virtual start
time, which moves on by the cost that it receives, while the virtual clock moves on by that cost divided among all
who wait (start-time fair queueing; P. Goyal, H. M. Vin and H. Cheng, doi:10.1109/90.649569). A small request beside
a bulk one is next in line; the bulk one still moves on at its share.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

from service.errors import Overloaded

__all__ = ["Batch", "Batcher", "Entry", "Slice"]

#: Where an entry stands in its queue: by virtual start, then what was not served yet, then as they came.
Place = tuple[float, int, int]


@dataclass(slots=True, eq=False)
class Entry:
    """A request that waits.

    Attributes:
        key: Entries with equal keys may share a batch; hashable.
        rows: Points.
        row_cost: What one of them costs to compute.
        row_bytes: What one of them brings back.
        payload_bytes: What the request holds in memory while it waits.
    """

    key: Any
    rows: int
    row_cost: float
    row_bytes: int
    payload_bytes: int
    taken: int = field(default=0, init=False)
    start: float = field(default=0.0, init=False)
    is_closed: bool = field(default=False, init=False)


class Slice(NamedTuple):
    """Rows ``start`` to ``stop`` of an entry."""

    entry: Entry
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class Batch:
    """What one worker computes at once: slices of entries with one key, and how often it failed before."""

    key: Any
    slices: list[Slice]
    failures: int = 0

    @property
    def sizes(self) -> list[int]:
        """Points of each slice."""
        return [stop - start for _, start, stop in self.slices]

    @property
    def rows(self) -> int:
        """Points."""
        return sum(self.sizes)


class Batcher:
    """The waiting entries.

    Args:
        max_requests: Most entries at once.
        max_rows: Most rows at once.
        max_bytes: Most payload bytes at once.
        batch_cost: Cost at which a batch is cut; it holds one row at least.
        batch_bytes: Bytes to bring back at which a batch is cut.
    """

    def __init__(self, max_requests: int, max_rows: int, max_bytes: int, batch_cost: float, batch_bytes: int) -> None:
        """Start empty."""
        self.limits = (max_requests, max_rows, max_bytes)
        self.batch_cost = batch_cost
        self.batch_bytes = batch_bytes
        self.requests = 0
        self.rows = 0
        self.payload_bytes = 0
        self._clock = 0.0
        self._order = count()
        self._queues: dict[Hashable, list[tuple[Place, Entry]]] = {}
        self._again: list[Batch] = []

    def expect_room(self) -> None:
        """Refuse a request before it is read, if not even the smallest would find a place.

        Raises:
            Overloaded: as many requests wait as may.
        """
        limit, *_ = self.limits
        if self.requests >= limit:
            raise Overloaded(f"expected at most {limit} requests waiting, got one more; try again later")

    def put(self, entry: Entry) -> None:
        """Let an entry wait.

        Raises:
            Overloaded: a limit would be passed.
        """
        most_requests, most_rows, most_bytes = self.limits
        requests, rows, held = self.requests + 1, self.rows + entry.rows, self.payload_bytes + entry.payload_bytes
        if requests > most_requests:
            raise _overloaded("requests", requests, most_requests)
        if rows > most_rows:
            raise _overloaded("rows", rows, most_rows)
        if held > most_bytes:
            raise _overloaded("bytes", held, most_bytes)
        self.requests, self.rows, self.payload_bytes = requests, rows, held
        entry.start = self._clock
        self._push(entry)

    def put_again(self, batch: Batch) -> None:
        """Let a batch whose worker was lost go next."""
        self._again.append(batch)

    def close(self, entry: Entry) -> None:
        """Forget an entry that was answered, refused or given up; closing it again does nothing."""
        if not entry.is_closed:
            entry.is_closed = True
            self.requests -= 1
            self.rows -= entry.rows - entry.taken
            self.payload_bytes -= entry.payload_bytes

    def take(self) -> Batch | None:
        """Cut the next batch, or return ``None`` if nothing waits."""
        while self._again:
            batch = self._again.pop()
            batch.slices = [part for part in batch.slices if not part.entry.is_closed]
            if batch.slices:
                return batch
        key = self._next_key()
        if key is None:
            return None
        queue, cost, reply_bytes = self._queues[key], 0.0, 0
        slices: list[Slice] = []
        while queue and (not slices or (cost < self.batch_cost and reply_bytes < self.batch_bytes)):
            _, entry = heappop(queue)
            if entry.is_closed:
                continue
            rows = self._fitting_rows(entry, cost, reply_bytes, is_first=not slices)
            if rows == 0:
                self._push(entry)
                break
            slices.append(Slice(entry, entry.taken, entry.taken + rows))
            self._charge(entry, rows)
            cost += rows * entry.row_cost
            reply_bytes += rows * entry.row_bytes
            if entry.taken < entry.rows:
                self._push(entry)
                break
        if not queue:
            del self._queues[key]
        return Batch(key, slices) if slices else self.take()

    def _fitting_rows(self, entry: Entry, cost: float, reply_bytes: int, is_first: bool) -> int:
        """How many of the entry's rows the batch still has room for; one at least in an empty batch."""
        room = min((self.batch_cost - cost) / entry.row_cost, (self.batch_bytes - reply_bytes) / entry.row_bytes)
        return min(entry.rows - entry.taken, max(int(room), int(is_first)))

    def _charge(self, entry: Entry, rows: int) -> None:
        """Move the entry's start and the clock on by what it receives."""
        received = rows * entry.row_cost
        entry.taken += rows
        entry.start += received
        self.rows -= rows
        self._clock += received / max(1, self.requests)

    def _push(self, entry: Entry) -> None:
        place = (entry.start, entry.taken, next(self._order))
        heappush(self._queues.setdefault(entry.key, []), (place, entry))

    def _next_key(self) -> Hashable | None:
        """The key whose first open entry starts earliest."""
        best: tuple[Place, Hashable] | None = None
        for key, queue in list(self._queues.items()):
            while queue and queue[0][1].is_closed:
                heappop(queue)
            if not queue:
                del self._queues[key]
            elif best is None or queue[0][0] < best[0]:
                best = queue[0][0], key
        return None if best is None else best[1]


def _overloaded(what: str, now: int, limit: int) -> Overloaded:
    return Overloaded(f"expected at most {limit} {what} waiting, got {now}; try again later")
