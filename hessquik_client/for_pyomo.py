"""Models of the service as Pyomo grey boxes: y = f(x) with exact Jacobian and exact weighted Hessian.

block.set_external_model(RemoteGreyBox(client.model("borehole")))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pyomo.contrib.pynumero.interfaces.external_grey_box import ExternalGreyBoxModel
from scipy.sparse import coo_matrix

from hessquik_client.client import Model
from hessquik_client.domain import Outside
from hessquik_client.last_point import LastPoint
from hessquik_client.messages import Array, ArrayLike

__all__ = ["RemoteGreyBox"]


class RemoteGreyBox(ExternalGreyBoxModel):  # type: ignore[misc]
    """The outputs f(x) of a model as functions of its inputs.

    Args:
        model: The model; its sizes and names are requested immediately.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.
    """

    def __init__(self, model: Model, outside: Outside | None = None) -> None:
        """Request sizes and names."""
        model = model.with_options(outside=outside)
        facts = model.describe()
        self._inputs: Sequence[str] = facts["metadata"].get("input_names") or [f"x{a}" for a in range(facts["d"])]
        self._outputs: Sequence[str] = facts["metadata"].get("output_names") or [f"y{j}" for j in range(facts["m"])]
        self._model = model
        self._at = LastPoint(model, ("value", "gradient"))
        self._x: Array = np.zeros(len(self._inputs))
        self._multipliers: Array = np.zeros(len(self._outputs))

    def input_names(self) -> list[str]:
        """Return the names of the inputs: those in the model's file, or x0, x1, …."""
        return list(self._inputs)

    def output_names(self) -> list[str]:
        """Return the names of the outputs: those in the model's file, or y0, y1, …."""
        return list(self._outputs)

    def set_input_values(self, input_values: ArrayLike) -> None:
        """Set the point x, (d,)."""
        self._x = np.array(input_values, dtype=np.float64)

    def set_output_constraint_multipliers(self, output_con_multiplier_values: ArrayLike) -> None:
        """Set the multipliers λ of the outputs, (m,)."""
        self._multipliers = np.array(output_con_multiplier_values, dtype=np.float64)

    def evaluate_outputs(self) -> Array:
        """Return f(x), (m,)."""
        return self._at(self._x)["value"].copy()

    def evaluate_jacobian_outputs(self) -> Any:
        """Return ∂f_j/∂x_a, (m, d), as a sparse matrix."""
        return _all_entries(self._at(self._x)["gradient"].T, *np.indices((len(self._outputs), len(self._inputs))))

    def evaluate_hessian_outputs(self) -> Any:
        """Return the lower triangle of Σ_j λ_j ∂²f_j/∂x_a∂x_b, (d, d), as a sparse matrix; the server applies λ."""
        packed = self._model.hessian_packed(self._x, weights=self._multipliers, dtype=np.float64)[:, 0]
        d = len(self._x)
        return coo_matrix((packed, np.tril_indices(d)), shape=(d, d))


def _all_entries(dense: Array, rows: Any, columns: Any) -> Any:
    """Return entries as a sparse matrix that also stores zeros, so that its structure is constant."""
    rows, columns = rows.ravel(), columns.ravel()
    return coo_matrix((dense[rows, columns], (rows, columns)), shape=dense.shape)
