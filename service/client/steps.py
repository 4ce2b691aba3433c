"""What a client does to get an answer, as steps that it only has to carry out.

Everything that takes a decision is written here once, as generators without any input or output: they yield a step,
receive its outcome and return the result. :class:`~service.client.Client` carries the steps out with blocking calls,
:class:`~service.client.AsyncClient` with awaiting ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np

from service.client.errors import ClientError, ConnectionLost, ServiceError, UnexpectedReply
from service.client.messages import (
    Answer,
    Question,
    Reply,
    Request,
    build_request,
    error_in,
    join,
    parse_answer,
    parse_document,
    split,
)
from service.quantities import floats_per_row

__all__ = ["Conversation", "Pause", "Persistence", "Send", "Steps", "Together", "post"]

#: Bytes of points and answers in one part of a split batch: several workers share a batch, a lost part costs little.
PART_BYTES = 8 << 20
#: Bytes of a body that are not points: the safetensors header.
MARGIN_BYTES = 4096


class Send(NamedTuple):
    """Send a request; the outcome is the reply, or the error that kept it from coming within the time."""

    request: Request
    within_s: float


class Pause(NamedTuple):
    """Wait; there is no outcome."""

    seconds: float


class Together(NamedTuple):
    """Carry out several conversations at once; the outcome is the list of their results.

    Attributes:
        conversations: Steps each.
        rows: Points in each.
        shows_progress: Whether to draw a bar.
    """

    conversations: Sequence[Steps[Any]]
    rows: Sequence[int]
    shows_progress: bool


T = TypeVar("T")
Steps = Generator[Send | Pause | Together, Any, T]


@dataclass
class Persistence:
    """How long and how often a client tries.

    What is tried again: a lost connection, 503 and 504, and a proxy's own 5xx, since evaluating twice does no harm.
    Before retry k = 0, 1, … the client waits a random time up to ``0.05 · 2^k`` seconds, two at most ("full jitter",
    so that clients do not come back in step; M. Brooker, "Exponential Backoff And Jitter", 2015), on top of what
    Retry-After asks for. All retries of a client together are at most ten, plus a tenth of its calls: an outage is
    not made worse.

    Args:
        deadline_s: Time for a call, or for each part of a batch that is split.
        retries: Most retries of a request.
    """

    deadline_s: float = 30.0
    retries: int = 3

    def __post_init__(self) -> None:
        """Start with a full budget."""
        self._budget = 10.0
        self._lock = Lock()

    def earn(self) -> None:
        """A call earns a tenth of a retry."""
        with self._lock:
            self._budget = min(10.0, self._budget + 0.1)

    def pause_s(self, attempt: int, error: ClientError) -> float | None:
        """How long to wait before the next attempt; ``None`` to give up."""
        can_help = (
            isinstance(error, ConnectionLost)
            or (isinstance(error, ServiceError) and error.status in {503, 504})
            # A proxy's own word that it lost the server behind it: Ray Serve says 500, most others 502.
            or (isinstance(error, UnexpectedReply) and error.status >= 500)
        )
        with self._lock:
            if not can_help or attempt >= self.retries or self._budget < 1:
                return None
            self._budget -= 1
        asked_s = getattr(error, "retry_after_s", None) or 0.0
        return float(asked_s + random.uniform(0, min(2.0, 0.05 * 2**attempt)))


def exchange(request: Request, persistence: Persistence) -> Steps[Reply]:
    """Get the reply to a request.

    Raises:
        ClientError: there is none, or it is an error.
    """
    end = time.monotonic() + persistence.deadline_s
    persistence.earn()
    attempt = 0
    while True:
        outcome: Reply | ClientError = yield Send(request, max(0.001, end - time.monotonic()))
        error = error_in(outcome) if isinstance(outcome, Reply) else outcome
        if isinstance(outcome, Reply) and error is None:
            return outcome
        assert error is not None
        pause_s = persistence.pause_s(attempt, error)
        if pause_s is None or time.monotonic() + pause_s >= end:
            raise error
        yield Pause(pause_s)
        attempt += 1


def post(target: str, persistence: Persistence) -> Steps[dict[str, Any]]:
    """Ask for an action."""
    return parse_document((yield from exchange(Request("POST", target), persistence)))


class Conversation:
    """What is said about one model.

    Args:
        model: Its name.
        version: A version, or ``None`` for the service's default.
        persistence: How long and how often to try.
    """

    def __init__(self, model: str, version: str | None, persistence: Persistence) -> None:
        """Nothing is known of the model yet."""
        self.model = model
        self.version = version
        self._persistence = persistence
        self._facts: dict[str, Any] | None = None

    def describe(self) -> Steps[dict[str, Any]]:
        """What the service says of the model now."""
        query = "" if self.version is None else f"?version={quote(self.version)}"
        request = Request("GET", f"/v1/models/{quote(self.model, safe='')}{query}")
        self._facts = parse_document((yield from exchange(request, self._persistence)))
        return self._facts

    def evaluate(self, question: Question, shows_progress: bool) -> Steps[Answer]:
        """Answer a question; a batch that is too large for one request in parts, all by the same version."""
        if question.rows <= 1:
            return (yield from self._evaluate(self.version, question))
        facts = self._facts or (yield from self.describe())
        if question.rows <= _rows_in_part(question, facts):
            return (yield from self._evaluate(self.version, question))
        facts = yield from self.describe()
        parts = split(question, _rows_in_part(question, facts))
        evaluations = [self._evaluate(str(facts["version"]), part) for part in parts]
        answers: list[Answer] = yield Together(evaluations, [part.rows for part in parts], shows_progress)
        return join(answers)

    def _evaluate(self, version: str | None, question: Question) -> Steps[Answer]:
        request = build_request(self.model, version, question)
        return parse_answer((yield from exchange(request, self._persistence)), question)


def _rows_in_part(question: Question, facts: Mapping[str, Any]) -> int:
    """How many rows of a batch fit into one request by the service's limits and :data:`PART_BYTES`; one at least."""
    limits, (d, m) = facts["limits"], (question.inputs.shape[-1], facts["m"] or 1)
    per_row = question.arrays_per_row()
    body_bytes = max(1, sum(array[:1].nbytes for array in per_row))
    # One set of weights or directions for all points goes along with every part.
    rest_bytes = MARGIN_BYTES + question.nbytes - sum(array.nbytes for array in per_row)
    k = 0 if question.directions is None else question.directions.shape[-2]
    floats = floats_per_row(question.quantities, d, m, k, question.weights is not None)
    reply_bytes = floats * np.dtype(question.dtype or facts["dtype"]).itemsize
    rows: int = min(
        limits["rows"],
        (limits["body_bytes"] - rest_bytes) // body_bytes,
        limits["reply_bytes"] // reply_bytes,
        PART_BYTES // (body_bytes + reply_bytes),
    )
    return max(1, rows)
