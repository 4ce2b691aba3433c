"""Models of the service as objectives and constraints of ``scipy.optimize``.

objective = Objective(client.model("borehole"))
minimize(objective, x0, jac=objective.jac, hess=objective.hess, method="trust-exact")
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from scipy import optimize

from hessquik_client.client import Model
from hessquik_client.domain import Outside
from hessquik_client.last_point import LastPoint
from hessquik_client.messages import Array, ArrayLike

__all__ = ["Objective", "bounds", "constraint", "minimize_from"]

#: Methods of ``scipy.optimize.minimize`` that use a Hessian, and that use no derivatives; it warns of what is unused.
WITH_HESSIAN = {"newton-cg", "dogleg", "trust-ncg", "trust-krylov", "trust-exact", "trust-constr"}
WITHOUT_GRADIENT = {"nelder-mead", "powell", "cobyla", "cobyqa"}


class Objective:
    """A scalar function f(x) = Σ_j weights_j f_j(x) with its derivatives, for ``scipy.optimize.minimize``.

    One request per point returns all of them, so that an iterate costs one round trip.

    Args:
        model: The model.
        weights: Weights of the outputs, (m,); optional for a model with one output.
        has_hessian: Whether the Hessian is requested with the value. If not, :meth:`hessp` requests each product,
            which is better for many inputs and methods such as ``trust-ncg``.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.
    """

    def __init__(
        self,
        model: Model,
        weights: ArrayLike | None = None,
        has_hessian: bool = True,
        outside: Outside | None = None,
    ) -> None:
        """Create the objective; nothing is requested yet."""
        model = model.with_options(outside=outside)
        self._model = model
        self._weights = weights
        self._has_hessian = has_hessian
        self._at = LastPoint(model, ("value", "gradient", "hessian")[: 3 if has_hessian else 2], weights)

    def __call__(self, x: ArrayLike) -> float:
        """Return f(x).

        Raises:
            ValueError: the model has several outputs and no weights were given.
        """
        value = self._at(x)["value"]
        if value.shape != (1,):
            raise ValueError(f"weights: expected {len(value)} of them for as many outputs, got none")
        return float(value[0])

    def jac(self, x: ArrayLike) -> Array:
        """Return ∇f(x), (d,)."""
        return self._at(x)["gradient"][:, 0].copy()

    def hess(self, x: ArrayLike) -> Array:
        """Return ∇²f(x), (d, d).

        Raises:
            ValueError: the objective was created with ``has_hessian=False``.
        """
        if not self._has_hessian:
            raise ValueError("hess: expected an objective with has_hessian, use hessp")
        return self._at(x)["hessian"][..., 0].copy()

    def hessp(self, x: ArrayLike, p: ArrayLike) -> Array:
        """Return ∇²f(x)·p, (d,)."""
        if self._has_hessian:
            product: Array = self.hess(x) @ np.asarray(p, dtype=np.float64)
            return product
        return self._model.hvp(x, np.asarray(p)[None], weights=self._weights, dtype=np.float64)[0, :, 0]


def constraint(
    model: Model,
    lower: ArrayLike,
    upper: ArrayLike,
    keep_feasible: bool = False,
    outside: Outside | None = None,
) -> optimize.NonlinearConstraint:
    """Return the constraint lower ≤ f(x) ≤ upper; the server weights its Hessian with the multipliers.

    Args:
        model: The model.
        lower: Lower limits, (m,) or a number.
        upper: Upper limits, (m,) or a number.
        keep_feasible: See :class:`scipy.optimize.NonlinearConstraint`.
        outside: See :class:`Objective`.
    """
    model = model.with_options(outside=outside)
    at = LastPoint(model, ("value", "gradient"))

    def weighted_hessian(x: Array, multipliers: Array) -> Array:
        return model.hessian(x, weights=multipliers, dtype=np.float64)[..., 0]

    return optimize.NonlinearConstraint(
        lambda x: at(x)["value"].copy(),
        lower,
        upper,
        jac=lambda x: at(x)["gradient"].T.copy(),  # SciPy has outputs first
        hess=weighted_hessian,
        keep_feasible=keep_feasible,
    )


def bounds(model: Model) -> optimize.Bounds:
    """Return the bounds within which the model was fitted.

    Raises:
        ValueError: the model has no bounds.
    """
    metadata = model.describe()["metadata"]
    if not {"lower_bounds", "upper_bounds"} <= metadata.keys():
        raise ValueError("expected a model whose file has lower_bounds and upper_bounds, this one has none")
    return optimize.Bounds(metadata["lower_bounds"], metadata["upper_bounds"])


def minimize_from(
    starts: ArrayLike,
    model: Model,
    weights: ArrayLike | None = None,
    best: int = 8,
    threads: int = 8,
    outside: Outside | None = None,
    **options: Any,
) -> Sequence[optimize.OptimizeResult]:
    """Minimise from the best of many starts.

    One batch ranks all starts. The minimisations run concurrently, so that the service can batch their requests.

    Args:
        starts: The initial points (n, d).
        model: The model.
        weights: Weights of the outputs, (m,); optional for a model with one output.
        best: Number of starts that are minimised.
        threads: Number of concurrent minimisations.
        outside: See :class:`Objective`.
        options: Options of ``scipy.optimize.minimize``, such as ``method`` and ``bounds``. Only derivatives that the
            method uses are requested; a custom method gets all of them.

    Returns:
        The results, lowest first.
    """
    points = np.asarray(starts, dtype=np.float64)
    values = model.value(points, weights=weights, dtype=np.float64, outside=outside)[:, 0]
    chosen = points[np.argsort(values, kind="stable")[:best]]
    method = options.get("method")
    is_own = callable(method)
    name = "" if method is None or is_own else str(method).lower()
    has_hessian = is_own or name in WITH_HESSIAN

    def minimize(start: Array) -> optimize.OptimizeResult:
        objective = Objective(model, weights, has_hessian, outside)
        jac = None if name in WITHOUT_GRADIENT else objective.jac
        return optimize.minimize(objective, start, jac=jac, hess=objective.hess if has_hessian else None, **options)

    with ThreadPoolExecutor(threads) as executor:
        return sorted(executor.map(minimize, chosen), key=lambda result: float(result.fun))
