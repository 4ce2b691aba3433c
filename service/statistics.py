"""Counts of what one version of a model has answered."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

__all__ = ["ModelStatistics", "Total"]


@dataclass(slots=True)
class Total:
    """A number of events, and their total duration."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """It took place again."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class ModelStatistics:
    """Counts since the version was loaded.

    Attributes:
        rows: Points answered.
        batches: Batches computed.
        last_answer_ms: When the last request was answered, in milliseconds since 1970; 0 if none was.
        success: Requests that got numbers.
        fail: Requests that did not.
        queue: Their time in the queue.
        compute: Their time after it.
    """

    rows: int = 0
    batches: int = 0
    last_answer_ms: int = 0
    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)

    def answered(self, rows: int, queue_s: float, compute_s: float) -> None:
        """A request got its numbers."""
        self.rows += rows
        self.last_answer_ms = time.time_ns() // 1_000_000
        for total, seconds in ((self.success, queue_s + compute_s), (self.queue, queue_s), (self.compute, compute_s)):
            total.count += 1
            total.seconds += seconds
