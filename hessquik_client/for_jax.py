"""Models of the service as JAX functions: under ``jit``, ``vmap``, ``grad`` and ``hessian``.

f = remote_function(client.model("peaks"))
jax.hessian(lambda x: f(x)[0])(x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hessquik_client.client import Model
from hessquik_client.domain import Outside

__all__ = ["remote_function"]


def remote_function(model: Model, outside: Outside | None = None) -> Callable[[jax.Array], jax.Array]:
    """Return f: (d,) → (m,), evaluated by the service in the dtype of the point; it can be differentiated twice.

    Each order (value, Jacobian, Hessian) is a host callback, and the next order is its derivative rule. Under
    ``vmap`` a batch is one request per order. For float64, set JAX's ``jax_enable_x64``.

    Args:
        model: The model; its sizes are requested immediately.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; the service's setting if not given.
    """
    model = model.with_options(outside=outside)
    facts = model.describe()
    d, m = int(facts["d"]), int(facts["m"])

    def ask(quantity: str, shape: tuple[int, ...], order: tuple[int, ...], x: jax.Array) -> jax.Array:
        """Return a quantity at x, its axes in JAX's order: outputs first."""

        def on_host(points: Any) -> Any:
            array = np.asarray(points)
            lead = array.shape[:-1]
            answer = model.evaluate(array.reshape(-1, d), [quantity], dtype=array.dtype)[quantity]
            return np.ascontiguousarray(np.transpose(answer, (0, *order))).reshape(*lead, *shape)

        result = jax.ShapeDtypeStruct(shape, x.dtype)  # type: ignore[no-untyped-call]
        answer: jax.Array = jax.pure_callback(on_host, result, x, vmap_method="broadcast_all")
        return answer

    @jax.custom_jvp
    def jacobian(x: jax.Array) -> jax.Array:
        return ask("gradient", (m, d), (2, 1), x)

    @jacobian.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        (x,), (dx,) = primals, tangents
        return jacobian(x), ask("hessian", (m, d, d), (3, 1, 2), x) @ dx

    @jax.custom_jvp
    def value(x: jax.Array) -> jax.Array:
        return ask("value", (m,), (1,), x)

    @value.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        (x,), (dx,) = primals, tangents
        return value(x), jacobian(x) @ dx

    def function(x: jax.Array) -> jax.Array:
        """Return f(x); integers are converted to JAX's default floating-point type.

        Raises:
            TypeError: the dtype of x is neither float32, float64 nor an integer type.
            ValueError: x is not one point of d numbers.
        """
        # Known when traced: an error inside the callback would be an internal one of JAX, far from its cause.
        dtype = jax.numpy.result_type(x, float)
        if dtype not in (np.float32, np.float64):
            raise TypeError(f"x: expected float32 or float64, got {dtype}")
        if jax.numpy.shape(x) != (d,):
            raise ValueError(f"x: expected one point, shape ({d},), got {jax.numpy.shape(x)}; jax.vmap takes a batch")
        return value(jax.numpy.asarray(x, dtype))

    return function
