"""Models of the service as OpenMDAO components: y = f(x) with exact partial derivatives.

    problem.model.add_subsystem("flow", RemoteComponent(model=client.model("borehole")), promotes=["*"])

``RemoteComponent(model=…, points=100)`` evaluates 100 points at once, in one request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openmdao.api as om

from hessquik_client.last_point import LastPoint

__all__ = ["RemoteComponent"]


class RemoteComponent(om.ExplicitComponent):  # type: ignore[misc]
    """The outputs f(x) of a model; value and partial derivatives at a point are one request.

    Input ``x`` and output ``y`` are (d,) and (m,); with ``points`` (n, d) and (n, m), and the partial derivatives are
    declared sparse: row i of y depends on row i of x.

    Options:
        model: The model; its sizes are requested at setup.
        points: Number n of points that are evaluated at once; ``None`` for one point without an axis n.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.
    """

    def initialize(self) -> None:
        """Declare the options."""
        self.options.declare("model", recordable=False, desc="the model")
        self.options.declare("points", default=None, allow_none=True, types=int, lower=1, desc="points at once")
        self.options.declare(
            "outside", default=None, allow_none=True, values=("allow", "refuse"), desc="points outside"
        )

    def setup(self) -> None:
        """Request the sizes, and declare input, output and partial derivatives."""
        model = self.options["model"].with_options(outside=self.options["outside"])
        facts = model.describe()
        n, d, m = self.options["points"], int(facts["d"]), int(facts["m"])
        leading = () if n is None else (n,)
        self._at = LastPoint(model, ("value", "gradient"))
        self.add_input("x", shape=(*leading, d))
        self.add_output("y", shape=(*leading, m))
        point, row, column = np.indices((n or 1, m, d)).reshape(3, -1)
        self.declare_partials("y", "x", rows=point * m + row, cols=point * d + column)

    def compute(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        """Evaluate f(x)."""
        outputs["y"] = self._at(inputs["x"])["value"]

    def compute_partials(self, inputs: Mapping[str, Any], partials: Any) -> None:
        """Evaluate ∂y_j/∂x_a at each point."""
        partials["y", "x"] = np.swapaxes(self._at(inputs["x"])["gradient"], -1, -2).ravel()
