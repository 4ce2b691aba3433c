"""Models of the service as CasADi functions, with exact Jacobians and exact weighted Hessians for Ipopt.

    f = RemoteFunction("borehole", client.model("borehole"))
    x = casadi.MX.sym("x", 8)
    solver = casadi.nlpsol("solver", "ipopt", {"x": x, "f": f(x)})

Over a horizon, ``RemoteFunction(name, model, points=100)`` takes 100 points, a column each, in one request.

CasADi keeps no reference to a callback: keep the object as long as anything built from it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import casadi
import numpy as np

from hessquik_client.client import Model
from hessquik_client.domain import Outside
from hessquik_client.last_point import LastPoint
from hessquik_client.messages import Array

__all__ = ["RemoteFunction"]


class _Callback(casadi.Callback):
    """A CasADi callback with named inputs and outputs of given sparsities.

    Args:
        name: Name of the function in CasADi.
        inputs: Sparsities by names.
        outputs: Sparsities by names.
    """

    def __init__(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Construct the function in CasADi."""
        casadi.Callback.__init__(self)
        self._inputs = list(inputs.items())
        self._outputs = list(outputs.items())
        self._parts: list[casadi.Callback] = []
        self.construct(name, {})

    def get_n_in(self) -> int:
        """Return the number of inputs."""
        return len(self._inputs)

    def get_n_out(self) -> int:
        """Return the number of outputs."""
        return len(self._outputs)

    def get_name_in(self, i: int) -> str:
        """Return the name of an input."""
        return self._inputs[i][0]

    def get_name_out(self, i: int) -> str:
        """Return the name of an output."""
        return self._outputs[i][0]

    def get_sparsity_in(self, i: int) -> Any:
        """Return the sparsity of an input."""
        return self._inputs[i][1]

    def get_sparsity_out(self, i: int) -> Any:
        """Return the sparsity of an output."""
        return self._outputs[i][1]

    def keep(self, part: casadi.Callback) -> casadi.Callback:
        """Keep a reference to a derivative function, since CasADi keeps none, and return it."""
        self._parts.append(part)
        return part


class RemoteFunction(_Callback):
    """The function f: (d, n) → (m, n) of points in columns, evaluated by the service in float64, in one request.

    Args:
        name: Name of the function in CasADi.
        model: The model; its sizes are requested immediately.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.
        points: Number n of points.
    """

    def __init__(self, name: str, model: Model, outside: Outside | None = None, points: int = 1) -> None:
        """Request the sizes and construct the function."""
        model = model.with_options(outside=outside)
        facts = model.describe()
        self.model = model
        self.n, self.d, self.m = points, int(facts["d"]), int(facts["m"])
        self.at = LastPoint(model, ("value", "gradient"))
        self.x, self.y = casadi.Sparsity.dense(self.d, points), casadi.Sparsity.dense(self.m, points)
        super().__init__(name, {"x": self.x}, {"y": self.y})

    def blocks(self, rows: int, columns: int) -> casadi.Sparsity:
        """Return the sparsity of a derivative: a block for each point, since no point depends on another."""
        return casadi.diagcat(*[casadi.Sparsity.dense(rows, columns)] * self.n)

    def eval(self, arguments: Sequence[casadi.DM]) -> list[casadi.DM]:
        """Return f at every column."""
        return [casadi.DM(self.at(_points(arguments[0]))["value"].T)]

    def has_jacobian(self) -> bool:
        """Return ``True``."""
        return True

    def get_jacobian(self, name: str, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> casadi.Function:
        """Return the function that evaluates J, (m n, d n), given x and f(x)."""
        return self.keep(_Jacobian(name, inputs, outputs, self))

    def has_jac_sparsity(self, output: int, argument: int) -> bool:
        """Return ``True``: the Jacobian is block-diagonal."""
        return True

    def get_jac_sparsity(self, output: int, argument: int, symmetric: bool) -> casadi.Sparsity:
        """Return the blocks of J."""
        return self.blocks(self.m, self.d)

    def second(self, argument: int) -> casadi.Sparsity:
        """Return the sparsity of the derivative of x̄ = Jᵀȳ with respect to x, y or ȳ (0, 1, 2)."""
        if argument == 1:
            return casadi.Sparsity(self.d * self.n, self.m * self.n)
        return self.blocks(self.d, self.d if argument == 0 else self.m)

    def has_reverse(self, count: int) -> bool:
        """Return whether reverse mode supports ``count`` adjoints at once; only one is supported."""
        return count == 1

    def get_reverse(
        self, count: int, name: str, inputs: Sequence[str], outputs: Sequence[str], options: Any
    ) -> casadi.Function:
        """Return the function that evaluates Jᵀȳ, given x, f(x) and ȳ."""
        return self.keep(_Reverse(name, inputs, outputs, self))


# The entries of a block-diagonal matrix lie in CasADi's memory block by block, column by column.


class _Jacobian(_Callback):
    """The function J = ∂f/∂x."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], function: RemoteFunction) -> None:
        self._function = function
        blocks = function.blocks(function.m, function.d)
        super().__init__(
            name, dict(zip(inputs, (function.x, function.y), strict=True)), dict.fromkeys(outputs, blocks)
        )

    def eval(self, arguments: Sequence[casadi.DM]) -> list[casadi.DM]:
        gradient = self._function.at(_points(arguments[0]))["gradient"]
        return [casadi.DM(self._outputs[0][1], gradient.ravel())]


class _Reverse(_Callback):
    """The function x̄ = Jᵀȳ."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], function: RemoteFunction) -> None:
        self._function = function
        shapes = (function.x, function.y, function.y)
        super().__init__(name, dict(zip(inputs, shapes, strict=True)), dict.fromkeys(outputs, function.x))

    def has_jac_sparsity(self, output: int, argument: int) -> bool:
        return True

    def get_jac_sparsity(self, output: int, argument: int, symmetric: bool) -> casadi.Sparsity:
        return self._function.second(argument)

    def eval(self, arguments: Sequence[casadi.DM]) -> list[casadi.DM]:
        gradient = self._function.at(_points(arguments[0]))["gradient"]
        return [casadi.DM(np.einsum("naj,nj->an", gradient, _points(arguments[2])))]

    def has_jacobian(self) -> bool:
        return True

    def get_jacobian(self, name: str, inputs: Sequence[str], outputs: Sequence[str], options: Any) -> casadi.Function:
        return self.keep(_ReverseJacobian(name, inputs, outputs, self._function))


class _ReverseJacobian(_Callback):
    """The derivatives of x̄ = Jᵀȳ: ∂x̄/∂x = Σ_j ȳ_j H_j, ∂x̄/∂y = 0 and ∂x̄/∂ȳ = Jᵀ."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], function: RemoteFunction) -> None:
        self._function = function
        blocks = map(function.second, range(3))
        super().__init__(
            name,
            dict(zip(inputs, (function.x, function.y, function.y, function.x), strict=True)),
            dict(zip(outputs, blocks, strict=True)),
        )

    def eval(self, arguments: Sequence[casadi.DM]) -> list[casadi.DM]:
        x, adjoint = _points(arguments[0]), _points(arguments[2])
        packed = self._function.model.hessian_packed(x, weights=adjoint, dtype=np.float64)[..., 0]
        d = self._function.d
        hessian = np.empty((len(x), d, d))
        a, b = np.tril_indices(d)
        hessian[:, a, b] = hessian[:, b, a] = packed
        transposed = self._function.at(x)["gradient"].transpose(0, 2, 1)
        sparsities = [sparsity for _, sparsity in self._outputs]
        return [
            casadi.DM(sparsities[0], hessian.ravel()),
            casadi.DM(sparsities[1]),
            casadi.DM(sparsities[2], transposed.ravel()),
        ]


def _points(matrix: casadi.DM) -> Array:
    """Return the columns of a matrix as points, (n, d)."""
    return np.ascontiguousarray(matrix.full().T, dtype=np.float64)
