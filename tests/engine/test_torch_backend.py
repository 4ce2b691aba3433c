"""The torch backend's tiles: their sizes, what they cost, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hessquik import Evaluator
from hessquik.backends import names
from hessquik.backends import torch as backend
from hessquik.backends.torch import TorchProgram
from hessquik.device import CPU
from hessquik.graph import Node
from hessquik.networks import fullyConnectedNN
from hessquik.operations import compute_node
from hessquik.plan import Ask, choose, exact_forms

ASKED = ("value", "gradient", "hessian")
D, M = 3, 2


def program(tile_rows: int = 128, widths: tuple[int, ...] = (D, 16, 16, M)) -> TorchProgram:
    torch.manual_seed(0)
    network = fullyConnectedNN([*widths]).double()
    plan = choose(exact_forms(network.layers()), Ask(frozenset(ASKED)), torch.float64, M, CPU)
    return TorchProgram(plan.graph, torch.float64, torch.device("cpu"), tile_rows)


def run(made: TorchProgram, n: int) -> dict[str, Tensor]:
    x = torch.linspace(-1, 1, n * D, dtype=torch.float64).reshape(n, D)
    shapes = {"value": (M,), "gradient": (D, M), "hessian": (D, D, M)}
    arrays = {name: torch.full((n, *shape), float("nan"), dtype=torch.float64) for name, shape in shapes.items()}
    made.run({"x": x, **arrays}, 0, n)
    return arrays


def rows_of(made: TorchProgram, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the row counts of the tiles that are computed from now on are added."""
    computed: list[int] = []
    right = made._compute

    def compute(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        computed.append(len(inputs["x"]))
        return right(inputs)

    monkeypatch.setattr(made, "_compute", compute)
    return computed


def test_tiles_are_filled_by_half_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchProgram, "_bits", lambda self, rows: torch.zeros(1, 1))
    made = program(512)
    assert made.tile_rows == (8, 32, 128, 512)
    computed = rows_of(made, monkeypatch)
    for n, expected in {
        1: [8],
        8: [8],
        9: [8, 8],
        16: [32],
        20: [32],
        63: [32, 32],
        64: [128],
        129: [128, 8],
        256: [512],
        1100: [512, 512, 128],
    }.items():
        run(made, n)
        assert computed == expected, n
        assert sum(computed) <= max(8, 2 * n)
        computed.clear()


def test_all_sizes_give_the_same_numbers() -> None:
    made = program()
    whole = run(made, 150)
    for rows in made.tile_rows:
        made.tile_rows = (rows,)
        for name, found in run(made, 150).items():
            assert torch.equal(found, whole[name]), (rows, name)


def changed_in_tiles_of(rows: int) -> Callable[[Node, list[Tensor]], Tensor]:
    """Return a ``compute_node`` whose products have other last bits in tiles of so many rows."""

    def compute(node: Node, inputs: list[Tensor]) -> Tensor:
        found = compute_node(node, inputs)
        return found * (1 + 2**-52) if node.op == "matmul" and len(inputs[0]) == rows else found

    return compute


@pytest.mark.parametrize(("rows", "left"), [(32, [8, 128]), (8, [32, 128]), (128, [128])])
def test_sizes_with_other_bits_are_not_used(rows: int, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = program().tile_rows
    monkeypatch.setattr(backend, "compute_node", changed_in_tiles_of(rows))
    assert program().tile_rows == tuple(size for size in left if size in sizes)


def test_results_that_are_no_numbers_have_bits_too() -> None:
    sizes = program().tile_rows
    made = program()
    made._constants = {i: array * float("nan") for i, array in made._constants.items()}
    assert made._with_equal_bits(sizes) == sizes


def without_memory_for(rows: int) -> Callable[[TorchProgram, Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return a ``_compute`` that has no memory for tiles of so many rows or more."""
    right = TorchProgram._compute

    def compute(self: TorchProgram, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if len(inputs["x"]) >= rows:
            raise torch.OutOfMemoryError("no memory")
        return right(self, inputs)

    return compute


@pytest.mark.parametrize("when", ["made", "run"])
def test_tiles_for_which_there_is_no_memory_are_left_out(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = program()
    expected, sizes = run(made, 150), made.tile_rows
    monkeypatch.setattr(TorchProgram, "_compute", without_memory_for(100))
    if when == "made":
        made = program()
    found = run(made, 150)
    assert made.tile_rows == tuple(rows for rows in sizes if rows < 100)
    for name in ASKED:
        assert torch.equal(found[name], expected[name])
    monkeypatch.setattr(TorchProgram, "_compute", without_memory_for(1))
    with pytest.raises(torch.OutOfMemoryError):
        run(made, 1) if when == "run" else program()


class Paddings(TorchDispatchMode):
    """Counts paddings of tensors."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function.overloadpacket is torch.ops.aten.pad
        return function(*arguments, **(options or {}))


def test_whole_arrays_are_not_copied() -> None:
    """A wide network spends as much time on copies as on its products."""
    torch.manual_seed(0)
    network = fullyConnectedNN([16, 32, 32, 1]).double()
    plan = choose(exact_forms(network.layers()), Ask(frozenset(["value"])), torch.float64, 1, CPU)
    made = TorchProgram(plan.graph, torch.float64, torch.device("cpu"), 64)
    x, value = torch.zeros(64, 16, dtype=torch.float64), torch.zeros(64, 1, dtype=torch.float64)
    with Paddings() as paddings:
        made.run({"x": x, "value": value}, 0, 64)
    assert paddings.count == 1, "the last layer's matrix has one column"


def test_the_kernel_is_a_part_of_the_printed_plan() -> None:
    network = fullyConnectedNN([3, 8, 1])
    kernels = {"torch": "torch", "cpu": "the CPU kernel"}
    for name in names("cpu"):
        plan = Evaluator(network, backend=name).plan(ASKED)
        assert str(plan).splitlines()[0].endswith(f", on {kernels[name]}")
