"""The logic of the client without input or output ("sans I/O").

Every decision is made here, in generators that yield a step, receive its outcome and return the result.
:class:`~hessquik_client.Client` runs the steps with blocking calls, :class:`~hessquik_client.AsyncClient` with
awaited ones.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from hessquik_client.errors import ClientError, ConnectionLost, DeadlineExceeded, ServiceError, UnexpectedReply
from hessquik_client.messages import (
    Answer,
    Array,
    Facts,
    Question,
    Reply,
    Request,
    build_request,
    error_in,
    file_request,
    parse_answer,
    parse_document,
    parse_facts,
    parse_file,
    unexpected,
)
from hessquik_client.parts import Part, Result, cut

__all__ = [
    "Conversation",
    "Gather",
    "OutsideDomainWarning",
    "Pause",
    "RetryPolicy",
    "Send",
    "Steps",
    "exchange",
    "list_models",
    "post",
]

#: Bytes of the list of all models.
LIST_BYTES = 64 << 20


class OutsideDomainWarning(UserWarning):
    """Points are outside the bounds within which a model was fitted, so that it extrapolates."""


class Send(NamedTuple):
    """Send a request; the outcome is the reply, or the error if none is received within the time limit."""

    request: Request
    within_s: float


class Pause(NamedTuple):
    """Wait; there is no outcome."""

    seconds: float


class Gather(NamedTuple):
    """Run several generators of steps concurrently; there is no outcome.

    Attributes:
        conversations: The generators of steps.
        sizes: Points of each, or points times directions if directions are split.
        unit: The unit of ``sizes``, for the progress bar.
        shows_progress: Whether to show a progress bar.
    """

    conversations: Sequence[Steps[None]]
    sizes: Sequence[int]
    unit: str
    shows_progress: bool


T = TypeVar("T")
Steps = Generator[Send | Pause | Gather, Any, T]


@dataclass
class RetryPolicy:
    """The limits of a call: time and number of tries.

    Lost connections, 503, 504 and a proxy's 5xx are retried, since evaluating twice is safe. Before retry
    k = 0, 1, … the client waits for the time in Retry-After plus a random time up to ``0.05 · 2^k`` seconds, at most
    two ("full jitter", so that clients do not retry in step; M. Brooker, "Exponential Backoff And Jitter", 2015). A
    retry budget limits all retries of a client to ten plus a tenth of its calls, so that retries do not worsen an
    outage.

    Args:
        deadline_s: Time limit of a call, or of each part of a batch that is split.
        retries: Most retries of a request.
    """

    deadline_s: float = 30.0
    retries: int = 3

    def __post_init__(self) -> None:
        """Start with a full retry budget."""
        if not (0 < self.deadline_s < float("inf") and self.retries >= 0):
            given = f"{self.deadline_s} and {self.retries}"
            raise ValueError(f"deadline_s, retries: expected seconds over 0 and a number from 0 on, got {given}")
        self._budget = 10.0
        self._lock = Lock()

    def end_s(self) -> float:
        """Return the deadline of a call that starts now, on the monotonic clock."""
        return time.monotonic() + self.deadline_s

    def earn(self) -> None:
        """Add a tenth of a retry to the retry budget, once per call."""
        with self._lock:
            self._budget = min(10.0, self._budget + 0.1)

    def pause_s(self, attempt: int, error: ClientError) -> float | None:
        """Return the time to wait before the next attempt, or ``None`` if the error is final."""
        can_help = (
            isinstance(error, ConnectionLost)
            or (isinstance(error, ServiceError) and error.status in {503, 504})
            # The status with which a proxy reports a lost server: 500 for Ray Serve, 502 for most others.
            or (isinstance(error, UnexpectedReply) and error.status >= 500)
        )
        with self._lock:
            if not can_help or attempt >= self.retries or self._budget < 1:
                return None
            self._budget -= 1
        asked_s = getattr(error, "retry_after_s", None) or 0.0
        return float(asked_s + random.uniform(0, min(2.0, 0.05 * 2**attempt)))


def exchange(request: Request, policy: RetryPolicy, end_s: float | None = None) -> Steps[Reply]:
    """Send a request, with retries, and return the reply.

    Args:
        request: The request.
        policy: Time limit and number of retries.
        end_s: Deadline on the monotonic clock; by default that of a call that starts now.

    Raises:
        ClientError: no reply is received, or the reply is an error.
    """
    end_s = policy.end_s() if end_s is None else end_s
    policy.earn()
    attempt = 0
    while True:
        outcome: Reply | ClientError = yield Send(request, max(0.001, end_s - time.monotonic()))
        error = error_in(outcome) if isinstance(outcome, Reply) else outcome
        if isinstance(error, ConnectionLost) and time.monotonic() >= end_s:
            # A service that keeps the same deadline may end its reply a moment before the client stops reading.
            error = DeadlineExceeded(f"expected an answer within {policy.deadline_s:.3f} s, there was none", status=0)
        if isinstance(outcome, Reply) and error is None:
            return outcome
        assert error is not None
        pause_s = policy.pause_s(attempt, error)
        if pause_s is None or time.monotonic() + pause_s >= end_s:
            raise error
        yield Pause(pause_s)
        attempt += 1


def list_models(policy: RetryPolicy) -> Steps[list[dict[str, Any]]]:
    """Get the descriptions of all models."""
    reply = yield from exchange(Request("GET", "/v1/models", most_bytes=LIST_BYTES), policy)
    models = parse_document(reply).get("models")
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise unexpected(reply, "a list of models")
    return models


def post(model: str, action: str, policy: RetryPolicy) -> Steps[dict[str, Any]]:
    """Make the service load or unload a model; ``action`` is the last part of the path, with its query."""
    request = Request("POST", f"/v1/models/{quote(model, safe='')}/{action}")
    reply = yield from exchange(request, policy)
    document = parse_document(reply)
    if document.get("name") != model:
        raise unexpected(reply, f"a reply about model {model}")
    return document


class Conversation:
    """The calls to one model, with its cached description.

    Args:
        model: Name of the model.
        version: A version, or ``None`` for the service's default.
        policy: Time limit and number of retries.

    Attributes:
        facts: The last description of the model, if one was received.
    """

    def __init__(self, model: str, version: str | None, policy: RetryPolicy) -> None:
        """Start without a description of the model."""
        self.model = model
        self.version = version
        self.facts: Facts | None = None
        self._policy = policy
        self._has_warned = False

    def describe(self, end_s: float | None = None) -> Steps[dict[str, Any]]:
        """Request the service's description of the model."""
        query = "" if self.version is None else f"?version={quote(self.version)}"
        request = Request("GET", f"/v1/models/{quote(self.model, safe='')}{query}")
        reply = yield from exchange(request, self._policy, end_s)
        document, self.facts = parse_facts(reply, self.model, self.version)
        return document

    def fetch(self) -> Steps[tuple[dict[str, Any], bytes]]:
        """Request the service's description of the model, and the file of that version."""
        end_s = self._policy.end_s()
        document = yield from self.describe(end_s)
        request = file_request(self.model, str(document["version"]))
        return document, parse_file((yield from exchange(request, self._policy, end_s)))

    def quantity(self, question: Question, shows_progress: bool) -> Steps[Array]:
        """Evaluate one quantity."""
        answer = yield from self.evaluate(question, shows_progress)
        return answer[question.quantities[0]]

    def evaluate(self, question: Question, shows_progress: bool) -> Steps[Answer]:
        """Evaluate quantities; a batch that is too large for one request is split, with one version for all parts."""
        end_s = self._policy.end_s()
        if self.facts is None:
            yield from self.describe(end_s)
        facts = self.facts
        self._warn_outside(question)
        try:
            answer = yield from self._evaluate(question, facts, shows_progress, end_s)
        except UnexpectedReply as error:
            # The model may have been replaced by one of another size since it was described.
            if error.status != 200:
                raise
            yield from self.describe(end_s)
            if self.facts == facts:
                raise
            answer = yield from self._evaluate(question, self.facts, shows_progress, end_s)
        if question.is_single:
            return Answer(answer.model, answer.version, {name: array[0] for name, array in answer.arrays.items()})
        return answer

    def _warn_outside(self, question: Question) -> None:
        """Warn once of points outside the model's bounds, unless the service refuses them."""
        domain = None if self.facts is None else self.facts.domain
        d = question.inputs.shape[-1]
        if domain is None or self._has_warned or question.outside == "refuse" or len(domain.lower) != d:
            return
        found = domain.first_outside(question.inputs)
        if found is not None:
            self._has_warned = True
            row, a = found
            warnings.warn(
                f"{self.model}: point {row} is outside the model's bounds: {domain.names[a]} is "
                f"{question.inputs[row, a]:g}, the model was fitted from {domain.lower[a]:g} to {domain.upper[a]:g}",
                OutsideDomainWarning,
                stacklevel=_frames_to_caller(),
            )

    def _evaluate(self, question: Question, facts: Facts | None, shows_progress: bool, end_s: float) -> Steps[Answer]:
        """Evaluate quantities of a model of known sizes, in one or several parts."""
        if facts is None or facts.m is None or len(cut(question, facts)) == 1:
            return (yield from self._ask(self.version, question, facts, end_s))
        yield from self.describe(end_s)
        pinned = self.facts
        assert pinned is not None
        parts, result = cut(question, pinned), Result(question, pinned)
        sizes = [part.question.rows * max(1, part.question.k) for part in parts]
        unit = "points × directions" if question.k else "points"
        yield Gather([self._put(part, pinned, result) for part in parts], sizes, unit, shows_progress)
        return Answer(self.model, pinned.version, result.arrays)

    def _put(self, part: Part, facts: Facts, result: Result) -> Steps[None]:
        """Request a part from the version in ``facts``, and write the answer to the result."""
        end_s = self._policy.end_s()
        result.put(part, (yield from self._ask(facts.version, part.question, facts, end_s)))

    def _ask(self, version: str | None, question: Question, facts: Facts | None, end_s: float) -> Steps[Answer]:
        """Evaluate quantities in one request."""
        request = build_request(self.model, version, question, facts)
        reply = yield from exchange(request, self._policy, end_s)
        return parse_answer(reply, self.model, version, question, facts)


def _frames_to_caller() -> int:
    """Return the ``stacklevel`` at which a warning points to the caller of the client."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("hessquik_client"):
        level, frame = level + 1, frame.f_back
    return level
