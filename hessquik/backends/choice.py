"""Backends of a device, and plans made ready to run on one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from hessquik.backends.runner import Runner
from hessquik.device import CPU, GPU, Device
from hessquik.plan import Plan
from hessquik.steps import Product

if TYPE_CHECKING:
    from hessquik.backends.cpu.packing import Packed
    from hessquik.backends.triton import TritonProgram

__all__ = [
    "chosen",
    "compiles_plans",
    "device_value",
    "make_runner",
    "make_runners",
    "names",
    "resolved",
    "shared_weights",
]


#: Columns of products from which a GPU computes them faster with torch's library, one launch for each.
WIDE = 256


def names(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Return the backends that a device has on this machine, the best first.

    Examples:
        >>> "torch" in names("cpu")
        True
    """
    from hessquik.backends import cpu

    if torch.device(device).type == "cpu":
        return ("cpu", "torch") if cpu.is_available() else ("torch",)
    return ("triton", "torch") if _has_triton(torch.device(device)) else ("torch",)


def resolved(device: torch.device | str) -> torch.device:
    """Return a device with its index, as the calling thread sees it now."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def chosen(device: torch.device, backend: str | None) -> str:
    """Return the backend to use.

    Raises:
        ValueError: the device does not have the one that is asked for.
    """
    available = names(device)
    if backend is not None and backend not in available:
        raise ValueError(f"backend must be one of {', '.join(available)} on {device}, got {backend!r}")
    return available[0] if backend is None else backend


def device_value(device: torch.device) -> Device:
    """Return the numbers that planning needs of a device."""
    return GPU if device.type == "cuda" else CPU


def make_runner(
    backend: str, plan: Plan, dtype: torch.dtype, device: torch.device, packed: Packed | None = None
) -> Runner:
    """Return a plan ready to run; on a CPU, programs with the same ``packed`` weights share them."""
    if backend == "cpu":
        from hessquik.backends.cpu import CpuProgram

        on_cpu = CpuProgram(plan.program, dtype, plan.rows, packed=packed)
        return Runner(plan, on_cpu.run, lambda: tuple(sorted({1, plan.rows})), on_cpu.bind)
    if backend == "triton" and _is_for_triton(plan):
        from hessquik.backends.triton import TritonProgram

        return _on_card(plan, TritonProgram(plan.program, dtype, device))
    from hessquik.backends.torch import TorchProgram

    by_torch = TorchProgram(plan.graph, dtype, device, plan.rows)
    return Runner(plan, by_torch.run, lambda: by_torch.tile_rows)


def shared_weights(backend: str, weights: Sequence[torch.Tensor]) -> Packed | None:
    """Return what programs of a network share, for :func:`make_runner`; ``None`` if the backend shares nothing."""
    if backend != "cpu":
        return None
    from hessquik.backends.cpu.packing import Packed

    return Packed(weights)


def compiles_plans(backend: str) -> bool:
    """Return whether a backend has kernels for single plans."""
    return backend == "triton"


def make_runners(backend: str, plans: Sequence[Plan], dtype: torch.dtype, device: torch.device) -> list[Runner]:
    """Return plans ready to run, each on a kernel compiled for it, unless that would be too large.

    The kernel that runs all other plans is compiled, too.

    Args:
        backend: One that compiles plans.
        plans: The plans.
        dtype: Of all numbers.
        device: Where to compute.
    """
    from hessquik.backends.triton import ready_programs

    narrow = [plan for plan in plans if _is_for_triton(plan)]
    ready = dict(zip(map(id, narrow), ready_programs([plan.program for plan in narrow], dtype, device), strict=True))
    return [
        _on_card(plan, ready[id(plan)]) if id(plan) in ready else make_runner(backend, plan, dtype, device)
        for plan in plans
    ]


def _on_card(plan: Plan, program: TritonProgram) -> Runner:
    return Runner(plan, program.run, lambda: program.tile_rows)


def _has_triton(device: torch.device) -> bool:
    """Return whether Triton is installed and compiles for a device."""
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    from hessquik.backends import triton

    return triton.is_available(resolved(device))


def _is_for_triton(plan: Plan) -> bool:
    """Return whether a plan's products are narrow and its arrays small enough for the Triton kernels."""
    from hessquik.backends.triton import fits

    products = (step for step in plan.program.steps if isinstance(step, Product))
    return fits(plan.program) and all(min(step.b.shape[1:]) < WIDE for step in products)
