"""Models of the service as PyTensor operations, for PyMC: with exact gradients and Hessian-vector products.

    flow = remote_function(client.model("borehole"))
    with pymc.Model():
        x = …                                     # (d,) or (n, d)
        pymc.Normal("observed", mu=flow(x)[0], sigma=2.0, observed=80.0)
        pymc.sample(cores=1)                      # a client belongs to one process

Value and gradient at a point are one request. Chains that are advanced together can evaluate all their points in one
request: (n, d).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.gradient import grad_not_implemented
from pytensor.graph.basic import Apply
from pytensor.graph.op import Op

from hessquik_client.client import Model
from hessquik_client.domain import Outside
from hessquik_client.last_point import LastPoint

__all__ = ["remote_function"]


def remote_function(model: Model, outside: Outside | None = None) -> Callable[[Any], Any]:
    """Return f as a function of PyTensor variables: (d,) → (m,), (n, d) → (n, m).

    It can be differentiated twice: gradients and Hessian-vector products
    (``pytensor.gradient.hessian_vector_product``) are exact.

    Args:
        model: The model; its sizes are requested immediately.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.

    Raises:
        ValueError: raised by the function for a variable that is not a vector or matrix with d columns.
    """
    model = model.with_options(outside=outside)
    facts = model.describe()
    value = _Value(model, int(facts["d"]), int(facts["m"]))

    def f(x: Any) -> Any:
        x = pt.as_tensor_variable(x).astype("float64")
        if x.ndim not in (1, 2) or x.type.shape[-1] not in (None, value.d):
            raise ValueError(f"x: expected shape ({value.d}) or (n, {value.d}), got {x.type.shape}")
        return value(x)

    return f


class _Remote(Op):  # type: ignore[misc]
    """Base of the operations on float64 variables, the first of which is x, (…, d).

    Args:
        model: The model.
        d: Number of its inputs.
        m: Number of its outputs.
        at: Cache of value and gradient at the last point.
    """

    def __init__(self, model: Model, d: int, m: int, at: LastPoint | None = None) -> None:
        """Create the operation; nothing is requested yet."""
        self.model, self.d, self.m = model, d, m
        self.at = LastPoint(model, ("value", "gradient")) if at is None else at

    def make_node(self, *inputs: Any) -> Apply:
        """Apply the operation."""
        x, *others = (pt.as_tensor_variable(one) for one in inputs)
        return Apply(self, [x, *others], [pt.tensor(dtype="float64", shape=(*x.type.shape[:-1], self.width()))])

    def perform(self, node: Apply, inputs: Sequence[Any], outputs: Any) -> None:
        """Compute the result."""
        outputs[0][0] = np.ascontiguousarray(self.compute(*inputs), np.float64)

    def infer_shape(self, _: Any, node: Apply, shapes: Sequence[Any]) -> list[Any]:
        """Return the result's shape."""
        return [(*shapes[0][:-1], self.width())]

    def other(self, kind: type[_Remote]) -> _Remote:
        """Return another operation on the same model."""
        return kind(self.model, self.d, self.m, self.at)

    def width(self) -> int:
        """Return the length of the result's last axis."""
        return self.d

    def compute(self, *inputs: Any) -> Any:
        """Return the result."""
        raise NotImplementedError


class _Value(_Remote):
    """The operation f(x), (…, m)."""

    def width(self) -> int:
        return self.m

    def compute(self, x: Any) -> Any:
        return self.at(x)["value"]

    def L_op(self, inputs: Sequence[Any], outputs: Any, given: Sequence[Any]) -> list[Any]:  # noqa: N802
        """Return Σ_j w_j ∂f_j/∂x."""
        return [self.other(_Gradient)(inputs[0], given[0])]

    def R_op(self, inputs: Sequence[Any], directions: Sequence[Any]) -> list[Any]:  # noqa: N802
        """Return J v."""
        return [None if directions[0] is None else self.other(_Along)(inputs[0], directions[0])]


class _Gradient(_Remote):
    """The operation Σ_j w_j ∂f_j/∂x, (…, d), of x and w, (…, m)."""

    def compute(self, x: Any, weights: Any) -> Any:
        return np.einsum("...am,...m->...a", self.at(x)["gradient"], weights)

    def L_op(self, inputs: Sequence[Any], outputs: Any, given: Sequence[Any]) -> list[Any]:  # noqa: N802
        """Return H_w v and J v."""
        x, weights = inputs
        return [self.other(_HessianProduct)(x, weights, given[0]), self.other(_Along)(x, given[0])]


class _Along(_Remote):
    """The operation J v, (…, m), of x and v, (…, d)."""

    def width(self) -> int:
        return self.m

    def compute(self, x: Any, v: Any) -> Any:
        return np.einsum("...am,...a->...m", self.at(x)["gradient"], v)

    def L_op(self, inputs: Sequence[Any], outputs: Any, given: Sequence[Any]) -> list[Any]:  # noqa: N802
        """Return H_w v and Σ_j w_j ∂f_j/∂x."""
        x, v = inputs
        return [self.other(_HessianProduct)(x, given[0], v), self.other(_Gradient)(x, given[0])]


class _HessianProduct(_Remote):
    """The operation Σ_j w_j ∂²f_j/∂x² v, (…, d), of x, w, (…, m), and v, (…, d)."""

    def compute(self, x: Any, weights: Any, v: Any) -> Any:
        found = self.model.hvp(x, v[..., None, :], weights=weights, dtype=np.float64)
        return found[..., 0, :, 0]

    def L_op(self, inputs: Sequence[Any], outputs: Any, given: Sequence[Any]) -> list[Any]:  # noqa: N802
        """Return PyTensor's marker of undefined gradients, since third derivatives are not available."""
        return [
            grad_not_implemented(self, i, one, "networks are served with two derivatives")
            for i, one in enumerate(inputs)
        ]
