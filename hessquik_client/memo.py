"""The last point's answer, kept: optimizers ask for value, gradient and Hessian at the same point in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hessquik_client.client import Model
from hessquik_client.messages import Answer, Array, ArrayLike

__all__ = ["LastPoint"]


class LastPoint:
    """A model's answers at one point, or one batch, at a time, in float64; asking for the same again costs nothing.

    Args:
        model: The model.
        quantities: What is asked for at each new point.
        weights: (m,): ask for Σ_j weights_j f_j.
    """

    def __init__(self, model: Model, quantities: Sequence[str], weights: ArrayLike | None = None) -> None:
        """Nothing is asked yet."""
        self.model = model
        self.weights = weights
        self._quantities = tuple(quantities)
        # One tuple, replaced as a whole, so that threads never see a point with another one's answer.
        self._last: tuple[Array, Answer] | None = None

    def __call__(self, x: ArrayLike) -> Answer:
        """The answer at a point, (d,), or at a batch, (n, d)."""
        point = np.array(x, dtype=np.float64)
        last = self._last
        if last is None or not np.array_equal(last[0], point):
            answer = self.model.evaluate(point, self._quantities, weights=self.weights, dtype=np.float64)
            self._last = last = (point, answer)
        return last[1]
