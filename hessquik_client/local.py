"""A served model in the caller's own process: the same methods and numbers, without requests.

This module needs torch, ``pip install 'hessquik-service[local]'``; the rest of the client does not.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from hessquik import storage
from hessquik_client.evaluators import Evaluators
from hessquik_client.messages import Answer, Facts, Question
from hessquik_client.models import Model
from hessquik_client.progress import bar
from hessquik_client.question import Shape, make_question
from hessquik_client.steps import Conversation, Gather, RetryPolicy, Steps

__all__ = ["LocalModel"]

T = TypeVar("T")


class LocalModel(Model):
    """A model whose file was fetched from a service, evaluated by the engine in this process.

    Methods, arguments, errors and warnings are those of :class:`~hessquik_client.Model`. Calls are checked and split
    as for the service, and computed as in a worker, so that the results are bitwise equal on a machine of the same
    kind. Threads may share it.

    Args:
        name: Name of the model.
        url: Address of the service that it came from.
        document: The service's description of the model.
        data: Bytes of the model's file.
        device: Device to compute on.
        threads: Threads that share a large call, on a CPU.
    """

    def __init__(
        self, name: str, url: str, document: dict[str, Any], data: bytes, facts: Facts, device: str, threads: int
    ) -> None:
        """Load the file, and check its derivatives."""
        evaluators = Evaluators(storage.parse(data), torch.device(device), threads)
        super().__init__(_run, url, name, facts.version, RetryPolicy())
        self._conversation = _LocalConversation(name, document, facts, evaluators)


class _LocalConversation(Conversation):
    """A conversation whose answers are computed in this process."""

    def __init__(self, name: str, document: dict[str, Any], facts: Facts, evaluators: Evaluators) -> None:
        super().__init__(name, facts.version, RetryPolicy())
        self.facts = facts
        self._document, self._evaluators = document, evaluators
        assert facts.d is not None
        assert facts.m is not None
        assert facts.dtype is not None
        sizes = (facts.d, facts.m, facts.dtype, facts.rows)
        self._shape = Shape(*sizes, facts.domain, members=evaluators.members)

    def describe(self, end_s: float | None = None) -> Steps[dict[str, Any]]:
        """Return the service's description of the model at the time when its file was fetched."""
        yield from ()
        return self._document

    def _ask(self, version: str | None, question: Question, facts: Facts | None, end_s: float) -> Steps[Answer]:
        """Check a call as the service does, and compute the answer."""
        yield from ()
        tensors = {"inputs": question.inputs, "weights": question.weights, "directions": question.directions}
        given = {name: array for name, array in tensors.items() if array is not None}
        checked = make_question(given, list(question.quantities), None, question.dtype, self._shape, question.outside)
        found = self._evaluators.answer(checked)
        assert self.version is not None
        return Answer(self.model, self.version, {name: found[name] for name in question.quantities})


def _run(steps: Steps[T]) -> T:
    """Run steps that send nothing; the parts of a batch run one after the other."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        assert isinstance(step, Gather)
        with bar(step) as advance:
            for conversation, size in zip(step.conversations, step.sizes, strict=True):
                _run(conversation)
                advance(size)
