"""Models of the service as problems of cyipopt: Ipopt with exact weighted Hessians, one request per point.

    x, info = minimize(client.model("peaks"), [0.3, -1.0])

``pip install cyipopt-wheels`` installs the module ``cyipopt``; the package named cyipopt has no wheels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cyipopt
import numpy as np

from hessquik_client.client import Model
from hessquik_client.domain import Outside
from hessquik_client.last_point import LastPoint
from hessquik_client.messages import Array, ArrayLike

__all__ = ["RemoteProblem", "minimize"]


class RemoteProblem:
    """The problem min Σ_j objective_j f_j(x) with outputs as constraints: ``problem_obj`` of ``cyipopt.Problem``.

    One request per point returns values, gradients and packed Hessians of all outputs; Ipopt's multipliers are
    applied here, so that new multipliers need no request.

    Args:
        model: The model; its sizes are requested immediately.
        objective: Weights of the outputs, (m,); the first output if not given.
        constraints: Indices of the outputs that are constraints, in the order of Ipopt's constraints.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.

    Attributes:
        d: Number of variables.
    """

    def __init__(
        self,
        model: Model,
        objective: ArrayLike | None = None,
        constraints: Sequence[int] = (),
        outside: Outside | None = None,
    ) -> None:
        """Request the sizes.

        Raises:
            ValueError: the objective does not have m numbers, or a constraint is not the index of an output.
        """
        facts = model.describe()
        self.d, m = int(facts["d"]), int(facts["m"])
        self._objective = np.eye(m)[0] if objective is None else np.asarray(objective, dtype=np.float64)
        self._constraints = list(constraints)
        if self._objective.shape != (m,):
            raise ValueError(f"objective: expected {m} weights, got shape {self._objective.shape}")
        if not set(self._constraints) <= set(range(m)):
            raise ValueError(f"constraints: expected outputs from 0 to {m - 1}, got {self._constraints}")
        self._at = LastPoint(model.with_options(outside=outside), ("value", "gradient", "hessian_packed"))

    def objective(self, x: Array) -> float:
        """Return Σ_j objective_j f_j(x)."""
        return float(self._at(x)["value"] @ self._objective)

    def gradient(self, x: Array) -> Array:
        """Return the objective's gradient, (d,)."""
        gradient: Array = self._at(x)["gradient"] @ self._objective
        return gradient

    def constraints(self, x: Array) -> Array:
        """Return the constraints' values."""
        return self._at(x)["value"][self._constraints]

    def jacobian(self, x: Array) -> Array:
        """Return the constraints' gradients, one after the other: a dense Jacobian row by row."""
        return self._at(x)["gradient"][:, self._constraints].T.ravel()

    def hessianstructure(self) -> tuple[Any, Any]:
        """Return rows and columns of the lower triangle, row by row."""
        return np.tril_indices(self.d)

    def hessian(self, x: Array, multipliers: Array, factor: float) -> Array:
        """Return the lower triangle of factor · ∇²objective + Σ_i multipliers_i ∇²c_i, row by row."""
        weights = factor * self._objective
        np.add.at(weights, self._constraints, multipliers)
        hessian: Array = self._at(x)["hessian_packed"] @ weights
        return hessian


def minimize(
    model: Model,
    x0: ArrayLike,
    objective: ArrayLike | None = None,
    constraints: Mapping[int, tuple[float, float]] | None = None,
    bounds: ArrayLike | None = None,
    outside: Outside | None = None,
    **options: Any,
) -> tuple[Array, dict[str, Any]]:
    """Minimise a weighted sum of a model's outputs with Ipopt.

    Args:
        model: The model.
        x0: The initial point (d,).
        objective: Weights of the outputs, (m,); the first output if not given.
        constraints: Lower and upper limit of each output that is constrained, by its index.
        bounds: Bounds of the variables, (d, 2); those of the model if not given, none if it has none.
        outside: See :class:`RemoteProblem`.
        options: Options of Ipopt, such as ``tol`` and ``max_iter``; ``print_level`` is 0 if not given.

    Returns:
        The solution (d,), and Ipopt's ``info``: ``status``, ``obj_val``, ``mult_g``, ….
    """
    within = constraints or {}
    problem = RemoteProblem(model, objective, list(within), outside)
    metadata = model.describe()["metadata"] or {}
    lower, upper = metadata.get("lower_bounds"), metadata.get("upper_bounds")
    if bounds is not None:
        lower, upper = np.asarray(bounds, dtype=np.float64).T
    ipopt = cyipopt.Problem(
        n=problem.d,
        m=len(within),
        problem_obj=problem,
        lb=lower,
        ub=upper,
        cl=[low for low, _ in within.values()],
        cu=[high for _, high in within.values()],
    )
    for name, value in {"print_level": 0, "sb": "yes", **options}.items():
        ipopt.add_option(name, value)
    x, info = ipopt.solve(np.asarray(x0, dtype=np.float64))
    return x, info
