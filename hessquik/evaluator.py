"""A frozen network that evaluates any number of points, tile by tile.

A tile is a number of rows that stays in cache. However many points come, the memory beside inputs and results is
one tile's, and a row's numbers are the same to the last bit whoever it is computed with: the CPU kernel computes
every row alike, and where torch does the work (on a GPU, or without a compiled kernel) tiles have one of a few
fixed row counts, the last one padded. What else is asked may change the plan and with it a result's last bits.

Float32 is float32: on a GPU, TensorFloat-32 is off whatever the process has chosen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor

from hessquik import memory
from hessquik.calculus import DIRECTIONAL, QUANTITIES, Derivatives
from hessquik.errors import ShapeError
from hessquik.native import Packed, is_available
from hessquik.networks import NN
from hessquik.plan import Ask, Plan, choose
from hessquik.runners import NativeRunner, Runner, TorchRunner

__all__ = ["Evaluator"]

Given = Tensor | Sequence[int] | None


#: Operations on one core after which a caller may do something else.
OPERATIONS_BETWEEN = 2e7
#: Plans that are kept; the oldest makes room for a new one, so that callers cannot fill the memory with them.
MAX_PLANS = 256
_SECOND_ORDER = Ask(frozenset({"value", "gradient", "hessian"}))


class Evaluator:
    """A network's values and derivatives on one device and in one dtype.

    The weights are copied when it is made; later changes of the network do not reach it. Threads may share it.

    Args:
        network: The network.
        device: Where to compute.
        dtype: ``torch.float32`` or ``torch.float64``; the network's own if not given.
        threads: How many threads of its own share the rows of a large call, on a CPU; with 1 the caller's does all.
        native: Whether the compiled CPU kernel may be used.

    Attributes:
        d: Number of inputs.
        m: Number of outputs.

    Example:
        >>> import torch
        >>> from hessquik.networks import fullyConnectedNN
        >>> evaluate = Evaluator(fullyConnectedNN([3, 16, 2]), dtype=torch.float64)
        >>> out = evaluate(torch.zeros(5, 3), quantities=("value", "laplacian"))
        >>> out.value.shape, out.laplacian.shape, out.hessian
        (torch.Size([5, 2]), torch.Size([5, 2]), None)
    """

    def __init__(
        self,
        network: NN,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        threads: int = 1,
        native: bool = True,
    ) -> None:
        """Freeze the network."""
        weights = next(network.parameters(), None)
        self.device = torch.device(device)
        self.dtype = dtype or (torch.get_default_dtype() if weights is None else weights.dtype)
        self.d = network.dim_input()
        self.m = network.dim_output()
        # Converted before forms are made, since some compute with the weights: softplus(L) of a convex layer.
        is_converted = weights is not None and weights.dtype != self.dtype
        forms = (deepcopy(network).to(self.dtype) if is_converted else network).forms()
        self._forms = [form.to(self.device, self.dtype) for form in forms]
        self._native = native and self.device.type == "cpu"
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "evaluator") if threads > 1 else None
        self._lock = threading.Lock()
        self._runners: dict[Ask, Runner] = {}
        self._packed = Packed()
        self._runner(_SECOND_ORDER)

    @property
    def ladder(self) -> tuple[int, ...]:
        """Row counts of the tiles in which values, gradients and Hessians are computed, ascending."""
        return self._runner(_SECOND_ORDER).ladder

    def plan(self, quantities: Sequence[str] = ("value",), weights: Given = None, directions: Given = None) -> Plan:
        """How the quantities are computed and what a row costs; printable.

        Args:
            quantities: Names out of :data:`hessquik.calculus.QUANTITIES`.
            weights: λ or its shape, as for a call.
            directions: Likewise.

        Example:
            >>> from hessquik.networks import fullyConnectedNN
            >>> plan = Evaluator(fullyConnectedNN([100, 16, 1])).plan(("laplacian",))
            >>> plan.start
            'reduced'
        """
        return self._runner(self._ask(quantities, weights, directions)).plan

    def __call__(
        self,
        x: Tensor,
        quantities: Sequence[str] = ("value",),
        weights: Tensor | None = None,
        directions: Tensor | None = None,
        between: Callable[[], None] | None = None,
    ) -> Derivatives:
        """Compute the wanted quantities at the points.

        Args:
            x: Points (n, d), any n.
            quantities: Names out of :data:`hessquik.calculus.QUANTITIES`.
            weights: λ (m,) or (n, m): derivatives of Σⱼ λⱼ fⱼ instead of every fⱼ; every m axis becomes 1.
            directions: (k, d) or (n, k, d) for jvp, hvp and curvature.
            between: Called now and then between two tiles: on a CPU every half a millisecond or so of computing, on a
                GPU never.

        Returns:
            One named tensor per quantity, on the device of ``x``; the others ``None``.

        Raises:
            ShapeError: a shape does not fit, a quantity is unknown, or its directions are missing.
        """
        runner, arrays = self._prepare(x, quantities, weights, directions)
        results = self._results(quantities, runner, x.shape[0], x.device)
        arrays.update(results)
        n = x.shape[0]
        rows = n if between is None or self.device.type != "cpu" else _rows_between(runner.plan, self._threads)
        for start in range(0, n, max(rows, 1)):
            if start > 0 and between is not None:
                between()
            self._run(runner, arrays, start, min(n, start + rows))
        return Derivatives(**results)

    def tiles(
        self,
        x: Tensor,
        quantities: Sequence[str] = ("value",),
        weights: Tensor | None = None,
        directions: Tensor | None = None,
    ) -> Iterator[Derivatives]:
        """Compute as :meth:`__call__` does and yield the rows tile by tile, in order; no rows are one empty tile."""
        runner, arrays = self._prepare(x, quantities, weights, directions)
        n = x.shape[0]
        for start in range(0, max(n, 1), runner.ladder[-1]):
            rows = min(runner.ladder[-1], n - start)
            results = self._results(quantities, runner, rows, x.device)
            inputs = {
                name: array if name in runner.shared else array[start : start + rows]
                for name, array in arrays.items()
            }
            runner.run({**inputs, **results}, 0, rows)
            yield Derivatives(**results)

    def _prepare(
        self, x: Tensor, quantities: Sequence[str], weights: Tensor | None, directions: Tensor | None
    ) -> tuple[Runner, dict[str, Tensor]]:
        """Check everything and find the inputs' arrays and what runs on them."""
        self._check(x, quantities, weights, directions)
        if DIRECTIONAL.isdisjoint(quantities):
            directions = None
        arrays = {"x": self._placed(x)}
        if weights is not None:
            arrays["weights"] = self._placed(weights)
        if directions is not None:
            arrays["directions"] = self._placed(directions)
        return self._runner(self._ask(quantities, weights, directions)), arrays

    def _placed(self, array: Tensor) -> Tensor:
        """An input as it is computed with, itself if it is so already; a GPU takes what is here tile by tile."""
        device = self.device if array.device.type != "cpu" else array.device
        if array.dtype is not self.dtype or array.device != device or not array.is_contiguous():
            array = array.detach().to(device, self.dtype).contiguous()
        return array

    @staticmethod
    def _ask(quantities: Sequence[str], weights: Given, directions: Given) -> Ask:
        """What is asked, as the key of a plan."""

        def rows(given: Given, shared_axes: int) -> tuple[str | None, tuple[int, ...]]:
            if given is None:
                return None, ()
            shape = tuple(given.shape if isinstance(given, Tensor) else given)
            return "shared" if len(shape) == shared_axes else "each", shape

        how_directions, shape = rows(directions, 2)
        k = shape[-2] if shape else 0
        return Ask(frozenset(quantities), rows(weights, 1)[0], how_directions, k)

    def _runner(self, ask: Ask) -> Runner:
        """The runner of a plan, made when it is first asked for."""
        runner = self._runners.get(ask)
        if runner is not None:
            return runner
        with self._lock:
            runner = self._runners.get(ask)  # another thread may have made it meanwhile
            if runner is None:
                plan = choose(self._forms, ask, self.dtype, self.m)
                if self._native and is_available(plan.program):
                    runner = NativeRunner(plan, self.dtype, self._packed)
                else:
                    runner = TorchRunner(plan, self.dtype, self.device)
                if len(self._runners) >= MAX_PLANS:
                    self._runners.pop(next(iter(self._runners)))
                self._runners[ask] = runner
        return runner

    def _run(self, runner: Runner, arrays: dict[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop``, on several threads if there are tiles enough."""
        n = stop - start
        shares = min(self._threads, -(-n // runner.ladder[-1]))
        if self._pool is None or shares <= 1:
            runner.run(arrays, start, stop)
            return
        cuts = [start + n * i // shares for i in range(shares + 1)]
        list(self._pool.map(lambda cut: runner.run(arrays, *cut), pairwise(cuts)))

    def _results(self, quantities: Sequence[str], runner: Runner, n: int, device: torch.device) -> dict[str, Tensor]:
        """Arrays for the results."""
        return {name: memory.empty((n, *runner.plan.shapes[name]), self.dtype, device) for name in quantities}

    def _check(self, x: Tensor, quantities: Sequence[str], weights: Tensor | None, directions: Tensor | None) -> None:
        """Refuse what does not fit."""
        if x.ndim != 2 or x.shape[1] != self.d:
            raise ShapeError(f"expected points of shape (n, {self.d}), got {tuple(x.shape)}")
        n = x.shape[0]
        unknown = [name for name in quantities if name not in QUANTITIES]
        if unknown or not quantities:
            raise ShapeError(f"expected quantities out of {', '.join(QUANTITIES)}, got {unknown}")
        if weights is not None and tuple(weights.shape) not in {(self.m,), (n, self.m)}:
            raise ShapeError(f"expected weights of shape ({self.m},) or ({n}, {self.m}), got {tuple(weights.shape)}")
        if not DIRECTIONAL.isdisjoint(quantities) and directions is None:
            raise ShapeError(f"expected directions of shape (k, {self.d}) or ({n}, k, {self.d}), got none")
        if directions is not None and not (
            directions.ndim in (2, 3)
            and directions.shape[-1] == self.d
            and (directions.ndim == 2 or directions.shape[0] == n)
        ):
            raise ShapeError(
                f"expected directions of shape (k, {self.d}) or ({n}, k, {self.d}), got {tuple(directions.shape)}"
            )


def _rows_between(plan: Plan, threads: int) -> int:
    """Rows in whole tiles that take so many threads as long as the caller is to wait."""
    tiles = threads * OPERATIONS_BETWEEN / (plan.operations * plan.rows)
    return max(1, round(tiles)) * plan.rows
