"""Minimise the served borehole surrogate within its bounds by SciPy's ``trust-constr`` with remote Hessians.

Start a server (``make serve``), then run ``python examples/minimise_borehole.py --url http://127.0.0.1:8000``.

The optimizer moves in the box scaled to [−1, 1]ᵈ, s = (x − centre) / half width: in physical units one input counts
in hundredths and another in tens of thousands, and no trust region is round in both.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize

from service.client import Client, Model

Array = NDArray[np.float64]


class Remote:
    """Value, gradient and Hessian of a served model with one output, in the scaled box.

    SciPy asks for the three one after the other at the same point: the first of them asks the service for all.

    Args:
        model: The model.
        centre: Of its box (d,).
        half_width: Of its box (d,).
    """

    def __init__(self, model: Model, centre: Array, half_width: Array) -> None:
        self.model, self.centre, self.half_width = model, centre, half_width
        self.requests = 0
        self._last: tuple[Array, Any] | None = None

    def _at(self, s: Array) -> Any:
        if self._last is None or not np.array_equal(s, self._last[0]):
            x = self.centre + self.half_width * s
            self._last = s.copy(), self.model.evaluate(x, ["value", "gradient", "hessian"])
            self.requests += 1
        return self._last[1]

    def value(self, s: Array) -> float:
        """The value f, a number."""
        return float(self._at(s)["value"][0])

    def gradient(self, s: Array) -> Array:
        """The gradient ∂f/∂s (d,)."""
        gradient: Array = self.half_width * self._at(s)["gradient"][:, 0]
        return gradient

    def hessian(self, s: Array) -> Array:
        """The Hessian ∂²f/∂s² (d, d)."""
        hessian: Array = np.outer(self.half_width, self.half_width) * self._at(s)["hessian"][:, :, 0]
        return hessian


def main() -> None:
    parser = argparse.ArgumentParser(description="Minimise the served borehole surrogate within its bounds.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is")
    arguments = parser.parse_args()
    with Client(arguments.url) as client:
        model = client.model("borehole")
        metadata = model.describe()["metadata"]
        lower, upper = np.array(metadata["lower_bounds"]), np.array(metadata["upper_bounds"])
        remote = Remote(model, (lower + upper) / 2, (upper - lower) / 2)
        start = np.zeros_like(lower)
        print(f"at the centre of the box: {remote.value(start):.4f} {metadata['output_names'][0]}")
        found = minimize(
            remote.value,
            start,
            jac=remote.gradient,
            hess=remote.hessian,
            bounds=Bounds(-np.ones_like(lower), np.ones_like(lower)),
            method="trust-constr",
        )
    print(f"at the minimum:           {found.fun:.4f}, {found.nit} iterations, {remote.requests} requests")
    for name, s, low, high in zip(metadata["input_names"], found.x, lower, upper, strict=True):
        x = (low + high) / 2 + (high - low) / 2 * s
        print(f"  {name:<58} {x:>12.5g}   of {low:g} to {high:g}")


if __name__ == "__main__":
    main()
