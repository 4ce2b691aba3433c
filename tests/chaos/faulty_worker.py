"""A worker with a fault that strikes at random. Only tests run it.

mixed     now and then two rows of a batch change places
untiled   rows are computed as they come, without the fixed tiles
oom       memory runs out in every tenth batch
spoiled   when the supervisor has heard that it is well, a batch spoils the device's context, after which all numbers
          would be wrong
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hessquik import calculus, evaluator
from hessquik.layers.form import Form
from service import wire, worker
from service.workers import TICK_S
from tests.service.faulty_worker import FaultyWorker


class RandomlyFaultyWorker(FaultyWorker):
    """Fails in the way that the environment names."""

    fault = os.environ.get("CHAOS_FAULT", "")
    batches = 0
    began_s = 0.0
    is_spoiled = False

    def _evaluate(self, head: dict[str, Any], fields: dict[str, Any], places: Any = None) -> wire.Frame:
        self.batches += 1
        if self.fault == "oom" and self.batches % 10 == 0:
            return self._out_of_memory(head, fields)
        self.began_s = self.began_s or time.monotonic()
        is_due = time.monotonic() - self.began_s > 2 * TICK_S
        # A row that fails alone twice is refused; one that is computed alone failed in company.
        if self.fault == "spoiled" and is_due and not head["is_alone"]:
            self.is_spoiled = True
            raise torch.AcceleratorError("an illegal memory access was encountered")
        reply, answers = super()._evaluate(head, fields, places)
        is_mixed = self.fault == "mixed" and random.random() < 0.1
        for array in answers.values():  # in place: they may lie in memory that the front reads
            if self.is_spoiled:
                array[...] = array + 1
            if is_mixed:
                array[...] = array[::-1].copy()
        return reply, answers

    def _out_of_memory(self, head: dict[str, Any], fields: dict[str, Any]) -> wire.Frame:
        """Go the way of the real error: raised by the evaluator."""
        sys.stderr.write("out of memory\n")
        model = self.models[head["model"]]
        evaluators, model._evaluators = model._evaluators, {}

        def out_of_memory(*_: object) -> object:
            raise torch.OutOfMemoryError("tried to allocate more than there is")

        model.evaluator = lambda _: out_of_memory  # type: ignore[method-assign, assignment, return-value]
        try:
            return super()._evaluate(head, fields)
        finally:
            del model.evaluator
            model._evaluators = evaluators


def as_they_come(
    self: evaluator.Evaluator,
    x: torch.Tensor,
    quantities: Sequence[str],
    weights: torch.Tensor | None = None,
    directions: torch.Tensor | None = None,
    between: object = None,
    out: Mapping[str, torch.Tensor] | None = None,
) -> calculus.Derivatives:
    """Compute all rows at once, by whatever kernels torch takes for that many."""
    forms = [_converted(form, self.dtype) for form in self._forms]
    given = [None if array is None else array.to(self.dtype) for array in (weights, directions)]
    found = calculus.evaluate(forms, x.to(self.dtype), quantities, *given)
    for name, place in (out or {}).items():
        place.copy_(getattr(found, name))
    return found


def _converted(form: Form, dtype: torch.dtype) -> Form:
    """Return a layer in another dtype."""

    def moved(linear: object) -> object:
        return linear.to(dtype) if isinstance(linear, torch.Tensor) else linear

    return replace(
        form,
        into=tuple(map(moved, form.into)),
        skip=tuple(map(moved, form.skip)),
        **{name: moved(getattr(form, name)) for name in ("bias", "out", "offset")},
    )


if __name__ == "__main__":
    if RandomlyFaultyWorker.fault == "untiled":
        evaluator.Evaluator.__call__ = as_they_come  # type: ignore[method-assign, assignment]
    worker.Worker = RandomlyFaultyWorker  # type: ignore[misc]
    worker.main(sys.argv[1:])
