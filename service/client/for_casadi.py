"""Models of the service as CasADi functions, with exact Jacobians and exact weighted Hessians, as Ipopt wants them.

    f = RemoteFunction("borehole", client.model("borehole"))
    x = casadi.MX.sym("x", 8)
    solver = casadi.nlpsol("solver", "ipopt", {"x": x, "f": f(x)})

CasADi keeps no reference to a callback: keep the object as long as anything built from it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import casadi
import numpy as np

from service.client.client import Model
from service.client.memo import LastPoint
from service.domain import Outside

__all__ = ["RemoteFunction"]


class _Callback(casadi.Callback):
    """A function of vectors by a table of shapes.

    Args:
        name: What CasADi calls it.
        inputs: Shapes by names.
        outputs: Shapes by names.
    """

    def __init__(self, name: str, inputs: dict[str, tuple[int, int]], outputs: dict[str, tuple[int, int]]) -> None:
        """Construct the function in CasADi."""
        casadi.Callback.__init__(self)
        self._inputs = list(inputs.items())
        self._outputs = list(outputs.items())
        self._parts: list[casadi.Callback] = []
        self.construct(name, {})

    def get_n_in(self) -> int:
        """Number of inputs."""
        return len(self._inputs)

    def get_n_out(self) -> int:
        """Number of outputs."""
        return len(self._outputs)

    def get_name_in(self, i: int) -> str:
        """Name of an input."""
        return self._inputs[i][0]

    def get_name_out(self, i: int) -> str:
        """Name of an output."""
        return self._outputs[i][0]

    def get_sparsity_in(self, i: int) -> casadi.Sparsity:
        """Shape of an input."""
        return casadi.Sparsity.dense(*self._inputs[i][1])

    def get_sparsity_out(self, i: int) -> casadi.Sparsity:
        """Shape of an output; what is zero has no entries."""
        name, shape = self._outputs[i]
        return casadi.Sparsity(*shape) if name in self.zeros() else casadi.Sparsity.dense(*shape)

    def zeros(self) -> frozenset[str]:
        """Outputs that are zero everywhere."""
        return frozenset()

    def keep(self, part: casadi.Callback) -> casadi.Callback:
        """Hold a derivative function as long as this one lives."""
        self._parts.append(part)
        return part


class RemoteFunction(_Callback):
    """f: (d) → (m), computed by the service in float64.

    Args:
        name: What CasADi calls it.
        model: The model, which is asked for its sizes at once.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.
    """

    def __init__(self, name: str, model: Model, outside: Outside | None = None) -> None:
        """Ask for the sizes and construct the function."""
        model = model.with_options(outside=outside)
        facts = model.describe()
        self.model = model
        self.d, self.m = int(facts["d"]), int(facts["m"])
        self.at = LastPoint(model, ("value", "gradient"))
        super().__init__(name, {"x": (self.d, 1)}, {"y": (self.m, 1)})

    def eval(self, arguments: Sequence[casadi.DM]) -> list[casadi.DM]:
        """f(x)."""
        return [casadi.DM(self.at(_vector(arguments[0]))["value"])]

    def has_jacobian(self) -> bool:
        """Always."""
        return True

    def get_jacobian(self, name: str, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> casadi.Function:
        """J, (m, d), of x and the value there."""
        return self.keep(_Jacobian(name, inputs, outputs, self))

    def has_reverse(self, count: int) -> bool:
        """One adjoint at a time."""
        return count == 1

    def get_reverse(
        self, count: int, name: str, inputs: Sequence[str], outputs: Sequence[str], options: Any
    ) -> casadi.Function:
        """Jᵀȳ, of x, the value there and ȳ."""
        return self.keep(_Reverse(name, inputs, outputs, self))


class _Jacobian(_Callback):
    """J = ∂f/∂x."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], function: RemoteFunction) -> None:
        self._function = function
        shapes = ((function.d, 1), (function.m, 1))
        super().__init__(
            name, dict(zip(inputs, shapes, strict=True)), dict.fromkeys(outputs, (function.m, function.d))
        )

    def eval(self, arguments: Sequence[casadi.DM]) -> list[casadi.DM]:
        return [casadi.DM(self._function.at(_vector(arguments[0]))["gradient"].T)]


class _Reverse(_Callback):
    """x̄ = Jᵀȳ."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], function: RemoteFunction) -> None:
        self._function = function
        shapes = ((function.d, 1), (function.m, 1), (function.m, 1))
        super().__init__(name, dict(zip(inputs, shapes, strict=True)), dict.fromkeys(outputs, (function.d, 1)))

    def eval(self, arguments: Sequence[casadi.DM]) -> list[casadi.DM]:
        gradient = self._function.at(_vector(arguments[0]))["gradient"]
        return [casadi.DM(gradient @ _vector(arguments[2]))]

    def has_jacobian(self) -> bool:
        return True

    def get_jacobian(self, name: str, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> casadi.Function:
        return self.keep(_ReverseJacobian(name, inputs, outputs, self._function))


class _ReverseJacobian(_Callback):
    """∂x̄/∂x = Σ_j ȳ_j H_j, ∂x̄/∂y = 0 and ∂x̄/∂ȳ = Jᵀ."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], function: RemoteFunction) -> None:
        self._function = function
        d, m = function.d, function.m
        blocks = ((d, d), (d, m), (d, m))
        super().__init__(
            name,
            dict(zip(inputs, ((d, 1), (m, 1), (m, 1), (d, 1)), strict=True)),
            dict(zip(outputs, blocks, strict=True)),
        )

    def zeros(self) -> frozenset[str]:
        return frozenset({self._outputs[1][0]})

    def eval(self, arguments: Sequence[casadi.DM]) -> list[casadi.DM]:
        x, adjoint = _vector(arguments[0]), _vector(arguments[2])
        hessian = self._function.model.hessian(x, weights=adjoint, dtype=np.float64)[..., 0]
        gradient = self._function.at(x)["gradient"]
        return [casadi.DM(hessian), casadi.DM(*self._outputs[1][1]), casadi.DM(gradient)]


def _vector(matrix: casadi.DM) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column as a vector."""
    return np.asarray(matrix.full(), dtype=np.float64)[:, 0]
