"""The torch machine: runs a program tile by tile, on a GPU, or on a CPU for which no kernel was built.

Its tiles have fixed row counts and its arrays fixed places, so that on a GPU all steps of a tile are one CUDA
graph. Which kernels run then depends on the tile and not on the rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from hessquik.program import VECTOR_BYTES, Program, Step, View

__all__ = ["Machine", "full_precision"]

#: One graph is recorded at a time.
_capturing = threading.Lock()


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, not in TensorFloat-32, whatever the process has chosen elsewhere.

    Example:
        >>> with full_precision():
        ...     torch.backends.cuda.matmul.fp32_precision
        'ieee'
    """
    chosen = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = chosen


class Machine:
    """A program bound to arrays of its own; one thread at a time may run it.

    Args:
        program: The program.
        dtype: Of all numbers.
        device: Where its constants are.
        rows: Rows of a tile.

    Attributes:
        arrays: Inputs and results of a tile by name.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device, rows: int) -> None:
        """Make the arrays, bind the steps to them, and capture them on a GPU."""
        self.rows = rows
        self.dtype = dtype
        self.device = device
        self.arrays: dict[str, Tensor] = {}
        self._workspace = torch.zeros(rows * program.workspace + VECTOR_BYTES, dtype=dtype, device=device)
        self._calls: list[Callable[[], object]] = []
        for step in program.once:
            call = self._bind(step)
            if all(view is None or view.constant is not None for view in step.inputs):
                call()
            else:  # it follows from inputs, which come with a tile
                self._calls.append(call)
        self._calls += [self._bind(step) for step in program.steps]
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def run(self) -> None:
        """Compute the results of a tile from its inputs, both in :attr:`arrays`."""
        if self._graph is None:
            for call in self._calls:
                call()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        """Record the steps as one graph, after a run that lets libraries set themselves up.

        The kernels of a graph are chosen while it is recorded, so what is set then holds for good.
        """
        with _capturing, torch.cuda.device(self.device), full_precision():
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self.run()
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.run()
            self._graph = graph

    def _tensor(self, view: View, rows: int, width: int | None = None) -> Tensor:
        """A view as (rows, outer, inner, columns)."""
        buffer = view.buffer
        shape = (rows, *view.shape[:2], width or view.shape[2])
        strides = (view.row_stride, *view.strides)
        if buffer.data is not None:
            return buffer.data.as_strided(shape, strides, buffer.data.storage_offset() + view.column)
        if buffer.base == "workspace":
            return self._workspace.as_strided(shape, strides, buffer.offset * self.rows + view.column)
        if buffer.base not in self.arrays:
            size = buffer.size * (1 if buffer.is_shared else self.rows)
            self.arrays[buffer.base] = torch.zeros(size, dtype=self.dtype, device=self.device)
        return self.arrays[buffer.base].as_strided(shape, strides, view.column)

    def _bind(self, step: Step) -> Callable[[], object]:
        """A step as a call without arguments."""
        rows = 1 if step.out.is_shared else self.rows
        if step.operation == "multiply":
            return self._multiply(step, rows)
        if step.operation == "activate":
            return self._activate(step)
        out = self._tensor(step.out, rows)
        a, b, add, add_by = (
            None if view is None else self._tensor(view, rows) for view in (*step.inputs, None, None)[:4]
        )
        assert a is not None
        if step.operation == "scale":
            return self._scale(out, a, b, add, add_by, step.alpha)
        assert b is not None
        return partial(_REDUCTIONS[step.operation], out, a, b)

    def _multiply(self, step: Step, rows: int) -> Callable[[], object]:
        """C = A B + b + D as one product of matrices where B is the same for all rows."""
        a, b, bias, add = step.inputs
        assert a is not None
        assert b is not None
        matrix = b.constant
        inner = a.shape[1]
        flat = [view for view in (a, step.out, add) if view is not None]
        if matrix is None or any(view.row_stride != inner * view.strides[1] for view in flat):
            out = self._tensor(step.out, rows)[:, 0]
            left, right = self._tensor(a, rows)[:, 0], self._tensor(b, rows)[:, 0]
            terms = [self._tensor(view, rows)[:, 0] for view in (bias, add) if view is not None]
            return partial(_multiply_rows, out, left, right, terms)
        # Whole vectors only: a kernel's last few columns may be added up in another order.
        lanes = VECTOR_BYTES // self.dtype.itemsize
        columns = step.out.shape[2]
        width = -(-columns // lanes) * lanes if step.out.buffer.base == "workspace" else columns
        width = width if step.out.strides[2] == 1 else columns
        out = self._tensor(step.out, rows, width).reshape(-1, width)
        if out.data_ptr() != self._tensor(step.out, rows).data_ptr():
            raise AssertionError("a product's rows lie evenly")
        left = self._tensor(a, rows).reshape(-1, a.shape[2])
        right = _widened(matrix, width)
        if add is not None and add.buffer is step.out.buffer:
            assert bias is None
            return partial(out.addmm_, left, right)
        shift = torch.zeros(1, dtype=self.dtype, device=self.device)
        if bias is not None and bias.constant is not None:
            shift = _widened(bias.constant, width).squeeze(0)
        call = partial(torch.addmm, shift, left, right, out=out)
        if bias is None:
            call = partial(torch.mm, left, right, out=out)
        if add is None:
            return call
        total, term = self._tensor(step.out, rows), self._tensor(add, rows)
        return lambda: (call(), total.add_(term))

    def _activate(self, step: Step) -> Callable[[], object]:
        """σ, σ' and σ'' over whole vectors, so that all entries go through the same code."""
        assert step.activation is not None
        views = (step.out, *step.inputs)
        tensors = [None if view is None else self._whole(view) for view in views]
        value, z, slope, curvature = tensors
        assert z is not None
        order = 0 if slope is None else 1 if curvature is None else 2
        return partial(_activate, partial(step.activation.jet, z, order), (value, slope, curvature))

    def _whole(self, view: View) -> Tensor:
        """A view with its padding, if it is all of a workspace array."""
        is_all = view.buffer.base == "workspace" and view.buffer.size == view.strides[1] and not view.column
        return self._tensor(view, self.rows, view.buffer.size if is_all else None)

    @staticmethod
    def _scale(
        c: Tensor, a: Tensor, by: Tensor | None, add: Tensor | None, add_by: Tensor | None, alpha: float
    ) -> Callable[[], object]:
        """C = α A ⊙ S + D ⊙ T."""
        if add is not None and add_by is not None:
            assert by is not None
            return lambda: torch.addcmul(add * add_by, a, by, value=alpha, out=c)
        if by is None:
            if add is not None:
                return partial(torch.add, add, a, alpha=alpha, out=c)
            return partial(c.copy_, a) if alpha == 1.0 else partial(torch.mul, a, alpha, out=c)
        if add is not None:
            return partial(torch.addcmul, add, a, by, value=alpha, out=c)
        if alpha == 1.0:
            return partial(torch.mul, a, by, out=c)
        return lambda: torch.mul(a, by, out=c).mul_(alpha)


def _widened(matrix: Tensor, width: int) -> Tensor:
    """A matrix with columns of zeros behind its own."""
    return torch.nn.functional.pad(matrix, (0, width - matrix.shape[1]))


def _multiply_rows(out: Tensor, a: Tensor, b: Tensor, terms: list[Tensor]) -> None:
    """A product for every row."""
    product = torch.matmul(a, b)
    for term in terms:
        product += term
    out.copy_(product)


def _activate(jet: Callable[[], tuple[Tensor | None, ...]], into: tuple[Tensor | None, ...]) -> None:
    """Put σ and its derivatives where they belong."""
    for place, result in zip(into, jet(), strict=True):
        if place is not None and result is not None:
            place.copy_(result)


def _sum_products(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.sum(a * b, dim=2, keepdim=True, out=out)


def _contract(out: Tensor, a: Tensor, b: Tensor) -> None:
    out.copy_(a @ b.mT)


def _congruence(out: Tensor, a: Tensor, c: Tensor) -> None:
    weighted = a.transpose(1, 2) * c
    flat = a.squeeze(1) @ weighted.flatten(1, 2).mT
    out.copy_(flat.view(*flat.shape[:2], *weighted.shape[1:3]))


_REDUCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "sum_products": _sum_products,
    "contract": _contract,
    "congruence": _congruence,
}
