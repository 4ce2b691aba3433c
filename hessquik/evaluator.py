"""A frozen network that evaluates any number of points, tile by tile.

A tile is a number of rows whose memory fits into a cache. For any number of points, the memory besides inputs and
results is that of one tile, and the results of a row are bitwise independent of the other rows. Requesting other
quantities with it may change the plan, and with it the last bits; so may, on a GPU, whether its kernel was compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from itertools import count, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from hessquik import backends, memory
from hessquik.calculus import Derivatives
from hessquik.errors import ShapeError
from hessquik.networks import NN, Ensemble
from hessquik.plan import Ask, Plan, choose, exact_forms, expect_traceable, least_operations
from hessquik.quantities import QUANTITIES, needs_directions

__all__ = ["COMMON", "Evaluator"]

Given = Tensor | Sequence[int] | None

#: Supported dtypes.
DTYPES = (torch.float32, torch.float64)
#: The sets of quantities asked most often.
COMMON = (("value",), ("value", "gradient"), ("value", "gradient", "hessian"), ("laplacian",))
#: Operations on one core after which a caller may do something else.
OPERATIONS_BETWEEN = 2e7
#: A call is divided among threads into pieces of at least so many operations, which take some ten times as long as
#: handing over a piece, and into at most so many pieces for each thread. Who is done takes the next one.
PIECE_OPERATIONS, PIECES = 2e7, 8
#: Plans that are kept, and bytes of what they compute of the weights, in float64 and as a backend has it; those that
#: were not used for longest make room for new ones. A plan that is larger alone is kept alone.
MAX_PLANS, MAX_PLAN_BYTES = 256, 256 << 20
#: Most bytes that a plan, which was made to know its cost, may have computed of the weights to be kept until it runs.
MAX_WAITING_BYTES = 1 << 20
_SECOND_ORDER = Ask(frozenset({"value", "gradient", "hessian"}))


class Evaluator:
    """A network's values and derivatives on one device and in one dtype.

    The weights are copied at construction; later changes of the network have no effect. Threads may share it.

    Args:
        network: The network.
        device: Device to compute on.
        dtype: ``torch.float32`` or ``torch.float64``; the network's own if not given.
        threads: Number of threads, including the caller's, that share the rows of a large call on a CPU; a GPU needs
            no others, and their work would be on other streams.
        backend: A name out of :func:`hessquik.backends.names`; the best that the device has if not given.
        compiled: Quantities of calls without weights and directions, for instance :data:`COMMON`, that get a kernel
            each on a GPU: about twice as fast, compiled here, 4 to 10 seconds each on an idle core, unless found in
            Triton's cache on disk. All other calls share one kernel. The choice holds as long as the evaluator.
        owned: Whether weights in main memory are used without a copy; the caller must not change them.

    Attributes:
        d: Number of inputs.
        m: Number of outputs.
        backend: What runs the programs.
        compiled: Sets of quantities for which kernels are compiled.

    Raises:
        ShapeError: the dtype is neither float32 nor float64, or quantities to compile are unknown or need directions.
        TypeError: the network is an ensemble.
        ValueError: the device does not have the backend.

    Examples:
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
        backend: str | None = None,
        compiled: Sequence[Sequence[str]] = (),
        owned: bool = False,
    ) -> None:
        """Copy the weights and choose the backend."""
        if isinstance(network, Ensemble):
            raise TypeError("expected one network, got an ensemble, which hessquik.EnsembleEvaluator evaluates")
        own = next((parameter.dtype for parameter in network.parameters()), torch.get_default_dtype())
        self.device = backends.resolved(device)
        self.dtype = own if dtype is None else dtype
        for what, found in (("network", own), ("evaluator", self.dtype)):
            if found not in DTYPES:
                raise ShapeError(f"the dtype of the {what} must be torch.float32 or torch.float64, got {found}")
        self.d = network.dim_input()
        self.m = network.dim_output()
        self.backend = backends.chosen(self.device, backend)
        copy = (network if owned else deepcopy(network)).cpu().requires_grad_(False)
        self._forms = exact_forms(copy.layers())
        expect_traceable(self._forms)
        self._threads = threads if self.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._threads - 1, "evaluator") if self._threads > 1 else None
        self._lock = threading.Lock()
        own_parts = (*copy.parameters(), *copy.buffers())
        self._own_data = {part.untyped_storage().data_ptr() for part in own_parts}
        self._packed = backends.shared_weights(self.backend, own_parts)
        self._uses = count()
        self._runners: dict[Ask, backends.Runner] = {}
        self._plans: dict[Ask, Plan] = {}
        self._known: dict[Any, tuple[backends.Runner, backends.Bound]] = {}
        self._compiled = self._compile(compiled)
        self.compiled = tuple(tuple(sorted(ask.quantities)) for ask in self._compiled)

    @property
    def tile_rows(self) -> tuple[int, ...]:
        """Row counts of the tiles in which values, gradients and Hessians are computed, ascending."""
        return self._runner(_SECOND_ORDER).tile_rows

    def plan(self, quantities: Sequence[str] = ("value",), weights: Given = None, directions: Given = None) -> Plan:
        """Return how the quantities are computed and what a row costs; printable.

        Args:
            quantities: Names out of :data:`hessquik.quantities.QUANTITIES`.
            weights: λ or its shape, as for a call.
            directions: Likewise.

        Examples:
            >>> from hessquik.networks import fullyConnectedNN
            >>> plan = Evaluator(fullyConnectedNN([100, 16, 1])).plan(("laplacian",))
            >>> plan.start
            'reduced'
        """
        ask = self._ask(quantities, weights, directions)
        runner = self._compiled.get(ask) or self._runners.get(ask)
        if runner is not None:
            return runner.plan
        with self._lock:
            plan = self._plans.get(ask) or self._plan(ask)
            if self._size([plan]) <= MAX_WAITING_BYTES:  # else it is made again when it is to be run
                if len(self._plans) >= MAX_PLANS:
                    self._plans.clear()
                self._plans[ask] = plan
        return plan

    def operations(
        self, quantities: Sequence[str] = ("value",), weights: Given = None, directions: Given = None
    ) -> int:
        """Return the operations per row; arguments are those of :meth:`plan`."""
        return self.plan(quantities, weights, directions).operations

    def exceeds(
        self, most: float, quantities: Sequence[str], weights: Given = None, directions: Given = None
    ) -> bool:
        """Return whether a row takes more than so many operations; large networks need no plan to tell.

        Args:
            most: Number of operations.
            quantities: As for :meth:`plan`.
            weights: Likewise.
            directions: Likewise.

        Examples:
            >>> from hessquik.networks import fullyConnectedNN
            >>> Evaluator(fullyConnectedNN([100, 16, 1])).exceeds(1e4, ("hessian",))
            True
        """
        ask = self._ask(quantities, weights, directions)
        if least_operations(self._forms, ask, self.m) > most:
            return True
        return self.operations(quantities, weights, directions) > most

    def __call__(
        self,
        x: Tensor,
        quantities: Sequence[str] = ("value",),
        weights: Tensor | None = None,
        directions: Tensor | None = None,
        between: Callable[[], None] | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> Derivatives:
        """Compute the wanted quantities at the points.

        Args:
            x: Points (n, d), any n.
            quantities: Names out of :data:`hessquik.quantities.QUANTITIES`.
            weights: λ (m,) or (n, m): derivatives of Σⱼ λⱼ fⱼ instead of every fⱼ; every m axis becomes 1.
            directions: (k, d) or (n, k, d) for jvp, hvp and curvature.
            between: Called now and then between two tiles: on a CPU every half a millisecond or so of computing, on a
                GPU never.
            out: Where to write the results: a contiguous tensor for each quantity, of its shape and the evaluator's
                dtype, on the device of ``x``. New ones if not given.

        Returns:
            One named tensor per quantity, on the device of ``x``; the others ``None``.

        Raises:
            ShapeError: a shape does not fit, a quantity is unknown, or its directions are missing.
        """
        if self._is_elsewhere(x):
            return self._elsewhere(x, quantities, weights, directions, between, out)
        runner, bound = self._prepare(x, quantities, weights, directions)
        found = bound(x, weights, directions) if out is None else None
        if found is not None:
            return Derivatives(**found)
        n, arrays = x.shape[0], self._inputs(runner, x, quantities, weights, directions)
        if out is None:
            results = self._results(quantities, runner, n, x)
        else:
            results = dict(out)
            self._check_out(quantities, runner, n, x.device, results)
        arrays.update(results)
        if between is None or self.device.type != "cpu":
            self._run(runner, arrays, 0, n)
        else:
            rows = _rows_between(runner.plan, self._threads)
            for start in range(0, n, rows):
                if start:
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
        if self._is_elsewhere(x):
            for tile in self.tiles(x.to(self.device), quantities, weights, directions):
                yield Derivatives(**{name: getattr(tile, name).to(x.device) for name in quantities})
            return
        runner, _ = self._prepare(x, quantities, weights, directions)
        n, arrays = x.shape[0], self._inputs(runner, x, quantities, weights, directions)
        start = 0
        while start < max(n, 1):
            rows = min(runner.tile_rows[-1], n - start)
            results = self._results(quantities, runner, rows, x)
            inputs = {
                name: array if name in runner.shared else array[start : start + rows]
                for name, array in arrays.items()
            }
            runner.run({**inputs, **results}, 0, rows)
            yield Derivatives(**results)
            start += max(rows, 1)

    def _is_elsewhere(self, x: Tensor) -> bool:
        """Return whether points are on a GPU that is not the evaluator's device."""
        if x.is_cpu:
            return False
        own, index = self.device, x.device.index
        return x.device.type != own.type or own.index not in {None, index}

    def _elsewhere(
        self,
        x: Tensor,
        quantities: Sequence[str],
        weights: Tensor | None,
        directions: Tensor | None,
        between: Callable[[], None] | None,
        out: Mapping[str, Tensor] | None,
    ) -> Derivatives:
        """Compute for points of another device, which has the results, too."""
        if out is not None:
            runner, _ = self._prepare(x, quantities, weights, directions)
            self._check_out(quantities, runner, x.shape[0], x.device, dict(out))
        found = self(x.to(self.device), quantities, weights, directions, between)
        results = {name: getattr(found, name).to(x.device) for name in quantities}
        if out is not None:
            results = {name: place.copy_(results[name]) for name, place in out.items()}
        return Derivatives(**results)

    def _prepare(
        self, x: Tensor, quantities: Sequence[str], weights: Tensor | None, directions: Tensor | None
    ) -> tuple[backends.Runner, backends.Bound]:
        """Return what computes a call, and a function of the call's tensors that does; both are made once."""
        key = _key(quantities, weights, directions)
        known = self._known.get(key)
        if known is None:
            self._check(x, quantities, weights, directions)
            directed = directions if needs_directions(quantities) else None
            runner = self._runner(self._ask(quantities, weights, directed))
            known = runner, self._bound(runner, quantities)
            with self._lock:
                if len(self._known) >= 4 * MAX_PLANS:
                    self._known.clear()
                self._known[key] = known
        known[0].last_use = next(self._uses)
        return known

    def _inputs(
        self,
        runner: backends.Runner,
        x: Tensor,
        quantities: Sequence[str],
        weights: Tensor | None,
        directions: Tensor | None,
    ) -> dict[str, Tensor]:
        """Check everything and return the arrays of the inputs."""
        self._check(x, quantities, weights, directions)
        arrays = {"x": self._placed(x)}
        if weights is not None:
            arrays["weights"] = self._placed(weights)
        if directions is not None and runner.plan.ask.directions is not None:
            arrays["directions"] = self._placed(directions)
        return arrays

    def _bound(self, runner: backends.Runner, quantities: Sequence[str]) -> backends.Bound:
        """Return a function for calls of one tile: of x, weights and directions, and ``None`` if it refuses them."""
        ask, shapes = runner.plan.ask, runner.plan.shapes
        of_weights: dict[str | None, tuple[int, ...]] = {None: (), "shared": (self.m,), "each": (-1, self.m)}
        of_directions = {None: (), "shared": (ask.k, self.d), "each": (-1, ask.k, self.d)}
        inputs = {
            "x": (-1, self.d),
            "weights": of_weights[ask.weights],
            "directions": of_directions[ask.directions],
        }
        row_bytes = max(1, sum(prod(shapes[name]) for name in quantities)) * self.dtype.itemsize
        # Larger results come from huge pages, which are reused.
        most_rows = min(runner.tile_rows[-1], (memory.LARGE_BYTES - 1) // row_bytes)
        while self._piece(runner, most_rows) < most_rows:  # several threads are faster
            most_rows //= 2
        return runner.bind(inputs, {name: (-1, *shapes[name]) for name in quantities}, most_rows)

    def _placed(self, array: Tensor) -> Tensor:
        """Return an input as it is computed with: itself if it is so already; a GPU takes a host's array in tiles."""
        is_placed = array.is_cpu or array.device == self.device
        if is_placed and array.dtype is self.dtype and array.is_contiguous() and not array.is_neg():
            return array
        device = array.device if array.is_cpu else self.device
        return array.detach().resolve_neg().to(device, self.dtype).contiguous()

    @staticmethod
    def _ask(quantities: Sequence[str], weights: Given, directions: Given) -> Ask:
        """Return the key of the plan for quantities, weights and directions."""

        def rows(given: Given, shared_axes: int) -> tuple[str | None, tuple[int, ...]]:
            if given is None:
                return None, ()
            shape = tuple(given.shape if isinstance(given, Tensor) else given)
            return "shared" if len(shape) == shared_axes else "each", shape

        how_directions, shape = rows(directions, 2)
        k = shape[-2] if shape else 0
        return Ask(frozenset(quantities), rows(weights, 1)[0], how_directions, k)

    def _runner(self, ask: Ask) -> backends.Runner:
        """Return the runner of a plan, made when it is first asked for."""
        runner = self._compiled.get(ask) or self._runners.get(ask)
        if runner is not None:
            return runner
        with self._lock:
            runner = self._runners.get(ask)  # another thread may have made it meanwhile
            if runner is None:
                plan = self._plans.pop(ask, None) or self._plan(ask)
                runner = backends.make_runner(plan, self.dtype, self.device, self._packed)
                runner.last_use = next(self._uses)
                self._runners[ask] = runner
                self._make_room()
        return runner

    def _compile(self, compiled: Sequence[Sequence[str]]) -> dict[Ask, backends.Runner]:
        """Return runners on kernels compiled for their plans; they are kept, so a call's kernel never changes."""
        for names in compiled:
            undirected = [name for name in QUANTITIES if not needs_directions([name])]
            if not names or not set(names) <= set(undirected):
                known = ", ".join(undirected)
                raise ShapeError(f"expected quantities to compile out of {known}, got {list(names)}")
        if not backends.compiles_plans(self.backend):
            return {}
        asked = [Ask(names) for names in dict.fromkeys(map(frozenset, compiled))]
        plans = [self._plan(ask) for ask in asked]
        runners = backends.make_runners(plans, self.dtype, self.device) if asked else []
        return dict(zip(asked, runners, strict=True))

    def _plan(self, ask: Ask) -> Plan:
        plan = choose(self._forms, ask, self.dtype, self.m, backends.device_value(self.device))
        return replace(plan, kernel=backends.kernel(self.backend, plan, self.device))

    def _make_room(self) -> None:
        """Drop the plans that were not used for longest until the others are within their bounds."""
        while len(self._runners) > MAX_PLANS or (len(self._runners) > 1 and self.plan_bytes > MAX_PLAN_BYTES):
            oldest = min(self._runners, key=lambda ask: self._runners[ask].last_use)
            del self._runners[oldest]
            self._known.clear()

    @property
    def plan_bytes(self) -> int:
        """Bytes of what the plans that are kept compute of the weights, and of the backend's arrays, about.

        Arrays that plans share count once, the weights themselves not at all.
        """
        return self._size([runner.plan for runner in list(self._runners.values())])

    def _size(self, plans: Sequence[Plan]) -> int:
        """Return the bytes of what plans compute of the weights, and of the backend's arrays."""
        size = self.dtype.itemsize
        constants = {
            node.data.untyped_storage().data_ptr(): node.data.numel()
            for plan in plans
            for node in plan.graph.nodes
            if node.data is not None
        }
        return sum((8 + size) * numbers for place, numbers in constants.items() if place not in self._own_data)

    def _run(self, runner: backends.Runner, arrays: dict[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop``, on several threads if there is enough to do."""
        rows = self._piece(runner, stop - start)
        if self._pool is None or rows == stop - start:
            runner.run(arrays, start, stop)
            return
        pieces = pairwise([*range(start, stop, rows), stop])

        def work() -> None:
            for piece in pieces:
                runner.run(arrays, *piece)

        waiting = [self._pool.submit(work) for _ in range(self._threads - 1)]
        try:
            work()
        finally:
            list(pieces)  # after an error no thread takes another one
            for future in waiting:
                if not future.cancel():  # one that has not begun has nothing left to do
                    future.result()

    def _piece(self, runner: backends.Runner, n: int) -> int:
        """Return the rows of the pieces into which n rows are divided; whole tiles of a backend that pads them."""
        pieces = min(int(n * runner.plan.operations / PIECE_OPERATIONS), PIECES * self._threads)
        if self._threads == 1 or pieces < 2:
            return n
        if pieces > self._threads:  # as many for each thread
            pieces -= pieces % self._threads
        tile = runner.tile_rows[-1] if runner.tile_rows[0] > 1 else 1
        return min(n, -(-n // (pieces * tile)) * tile)

    def _results(self, quantities: Sequence[str], runner: backends.Runner, n: int, x: Tensor) -> dict[str, Tensor]:
        """Return arrays for the results on the points' device."""
        shapes = runner.plan.shapes
        return {name: memory.empty((n, *shapes[name]), self.dtype, x.device) for name in quantities}

    def _check_out(
        self, quantities: Sequence[str], runner: backends.Runner, n: int, device: torch.device, out: dict[str, Tensor]
    ) -> None:
        """Raise :class:`ShapeError` if the given output arrays do not fit."""
        if out.keys() != set(quantities):
            raise ShapeError(f"expected places for {', '.join(quantities)}, got {', '.join(out)}")
        for name, place in out.items():
            shape = (n, *runner.plan.shapes[name])
            fits = place.shape == shape and place.dtype is self.dtype and place.is_contiguous()
            if not fits or place.device != device:
                raise ShapeError(
                    f"expected a contiguous {name} of shape {shape} and {self.dtype} on {device}, "
                    f"got {tuple(place.shape)}, {place.dtype} on {place.device}"
                )

    def _check(self, x: Tensor, quantities: Sequence[str], weights: Tensor | None, directions: Tensor | None) -> None:
        """Raise :class:`ShapeError` for what does not fit."""
        if x.ndim != 2 or x.shape[1] != self.d:
            raise ShapeError(f"expected points of shape (n, {self.d}), got {tuple(x.shape)}")
        n = x.shape[0]
        unknown = [name for name in quantities if name not in QUANTITIES]
        if unknown or not quantities:
            raise ShapeError(f"expected quantities out of {', '.join(QUANTITIES)}, got {unknown}")
        if weights is not None and tuple(weights.shape) not in {(self.m,), (n, self.m)}:
            raise ShapeError(f"expected weights of shape ({self.m},) or ({n}, {self.m}), got {tuple(weights.shape)}")
        if directions is None and needs_directions(quantities):
            raise ShapeError(f"expected directions of shape (k, {self.d}) or ({n}, k, {self.d}), got none")
        if directions is not None and not (
            directions.ndim in (2, 3)
            and directions.shape[-1] == self.d
            and (directions.ndim == 2 or directions.shape[0] == n)
        ):
            raise ShapeError(
                f"expected directions of shape (k, {self.d}) or ({n}, k, {self.d}), got {tuple(directions.shape)}"
            )


def _key(quantities: Sequence[str], weights: Tensor | None, directions: Tensor | None) -> Any:
    """Return the key of a call's plan and of the order of its results."""
    if weights is None and directions is None:
        return tuple(quantities)
    return (
        tuple(quantities),
        None if weights is None else weights.ndim,
        None if directions is None else (directions.ndim, directions.shape[-2:]),
    )


def _rows_between(plan: Plan, threads: int) -> int:
    """Return rows in whole tiles that take so many threads as long as the caller is to wait."""
    tiles = threads * OPERATIONS_BETWEEN / (plan.operations * plan.rows)
    return max(1, round(tiles)) * plan.rows
