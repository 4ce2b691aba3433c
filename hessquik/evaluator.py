"""A frozen network that evaluates any number of points in tiles of a few fixed row counts.

Fixed shapes keep the working set in cache, bound memory however many points come, and make a row's answer the
same to the last bit whoever it is computed with: the kernels that run depend on the tile alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hessquik import calculus
from hessquik.calculus import DIRECTIONAL, QUANTITIES, Derivatives
from hessquik.errors import ShapeError
from hessquik.networks import NN

__all__ = ["Evaluator"]

#: Rows of the smallest tile; with fewer, other kernels run (matrix times vector) and give other bits.
SMALLEST_TILE_ROWS = 8
#: Rows of the largest tile.
LARGEST_TILE_ROWS = 256
#: What the tangents of a tile may take, so that they stay in a core's cache.
TILE_BYTES = 1 << 20


class Evaluator:
    """A network's values and derivatives on one device and in one dtype.

    The weights are copied when it is made; later changes of the network do not reach it. Calls write nothing on
    it, so threads may share it.

    Args:
        network: The network.
        device: Where to compute.
        dtype: ``torch.float32`` or ``torch.float64``; the network's own if not given.

    Example:
        >>> import torch
        >>> from hessquik.networks import fullyConnectedNN
        >>> evaluate = Evaluator(fullyConnectedNN([3, 16, 2]), dtype=torch.float64)
        >>> out = evaluate(torch.zeros(5, 3), quantities=("value", "laplacian"))
        >>> out.value.shape, out.laplacian.shape, out.hessian
        (torch.Size([5, 2]), torch.Size([5, 2]), None)
    """

    def __init__(self, network: NN, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        """Freeze the network."""
        weights = next(network.parameters())
        self.device = torch.device(device)
        self.dtype = weights.dtype if dtype is None else dtype
        self.d = network.dim_input()
        self.m = network.dim_output()
        self._forms = [form.to(self.device, self.dtype) for form in network.forms()]
        self.ladder = _ladder(self.d, self.m, network, self.dtype)

    def __call__(
        self,
        x: Tensor,
        quantities: Sequence[str] = ("value",),
        weights: Tensor | None = None,
        directions: Tensor | None = None,
    ) -> Derivatives:
        """Compute the wanted quantities at the points.

        Args:
            x: Points (n, d), any n.
            quantities: Names out of :data:`hessquik.calculus.QUANTITIES`.
            weights: λ (m,) or (n, m): derivatives of Σⱼ λⱼ fⱼ instead of every fⱼ; every m axis becomes 1.
            directions: (k, d) or (n, k, d) for jvp, hvp and curvature.

        Returns:
            One named tensor per quantity, on the device of ``x``; the others ``None``.

        Raises:
            ShapeError: a shape does not fit, a quantity is unknown, or its directions are missing.
        """
        tiles = list(self.tiles(x, quantities, weights, directions))
        return Derivatives(
            **{name: torch.cat([getattr(tile, name) for tile in tiles]).to(x.device) for name in quantities}
        )

    def tiles(
        self,
        x: Tensor,
        quantities: Sequence[str] = ("value",),
        weights: Tensor | None = None,
        directions: Tensor | None = None,
    ) -> Iterator[Derivatives]:
        """Compute as :meth:`__call__` does and yield the rows tile by tile, in order; no rows are one empty tile."""
        n = x.shape[0]
        self._check(x, quantities, weights, directions)
        weights = weights if weights is None or weights.ndim == 2 else weights.unsqueeze(0)
        directions = directions if directions is None or directions.ndim == 3 else directions.unsqueeze(0)
        start = 0
        while True:
            rows = self._tile_rows(n - start)
            stop = min(start + rows, n)
            with torch.inference_mode():
                found = calculus.evaluate(
                    self._forms,
                    self._tile(x, start, stop, rows),
                    quantities,
                    None if weights is None else self._tile(weights, start, stop, rows),
                    None if directions is None else self._tile(directions, start, stop, rows),
                )
            yield Derivatives(**{name: getattr(found, name)[: stop - start] for name in quantities})
            start = stop
            if start == n:
                return

    def _tile_rows(self, remaining: int) -> int:
        """Rows of the next tile: the smallest that holds what remains, or the largest."""
        return next((rows for rows in self.ladder if rows >= remaining), self.ladder[-1])

    def _tile(self, rows_of: Tensor, start: int, stop: int, rows: int) -> Tensor:
        """Rows ``start`` to ``stop`` on the device, padded with zeros; one row for all is left as it is."""
        if rows_of.shape[0] == 1 and rows_of.shape[0] != stop - start:
            return rows_of.to(self.device, self.dtype)
        part = rows_of[start:stop].to(self.device, self.dtype)
        if part.shape[0] == rows:
            return part
        padded = part.new_zeros(rows, *part.shape[1:])
        padded[: stop - start] = part
        return padded

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


def _ladder(d: int, m: int, network: NN, dtype: torch.dtype) -> tuple[int, ...]:
    """Row counts of the tiles: the smallest, and the power of two whose tangents fit :data:`TILE_BYTES`."""
    hidden_units = sum(layer.output_widths()[0] for layer in network.layers())
    row_bytes = d * (1 + m) * hidden_units * dtype.itemsize
    rows = SMALLEST_TILE_ROWS
    while 2 * rows <= LARGEST_TILE_ROWS and 2 * rows * row_bytes <= TILE_BYTES:
        rows *= 2
    return (SMALLEST_TILE_ROWS,) if rows == SMALLEST_TILE_ROWS else (SMALLEST_TILE_ROWS, rows)
