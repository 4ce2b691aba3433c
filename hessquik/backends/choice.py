"""Backends of a device, and plans made ready to run on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from hessquik.backends.runner import Runner
from hessquik.device import CPU, GPU, Device
from hessquik.plan import Plan
from hessquik.steps import Product

if TYPE_CHECKING:
    from hessquik.backends.cpu.packing import Packed
    from hessquik.backends.torch import TorchProgram
    from hessquik.backends.triton import TritonProgram

__all__ = [
    "Kernel",
    "chosen",
    "compiles_plans",
    "device_value",
    "kernel",
    "make_runner",
    "make_runners",
    "names",
    "resolved",
    "shared_weights",
]


#: Columns of products from which a GPU computes them faster with torch's library, one launch for each.
WIDE = 256


class Kernel(StrEnum):
    """A name for each kernel or library that runs plans."""

    CPU = "the CPU kernel"
    #: A kernel for one plan, and the one for all others.
    OWN = "a kernel of its own"
    TABLE = "the table kernel"
    TORCH = "torch"
    CAPTURED = "torch, captured in CUDA graphs"


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


def kernel(backend: str, plan: Plan, device: torch.device) -> Kernel:
    """Return what runs a plan for which no kernel is compiled."""
    if backend == "cpu":
        return Kernel.CPU
    if backend == "triton" and _is_for_triton(plan):
        return Kernel.TABLE
    return Kernel.CAPTURED if device.type == "cuda" else Kernel.TORCH


def make_runner(plan: Plan, dtype: torch.dtype, device: torch.device, packed: Packed | None = None) -> Runner:
    """Return a plan ready to run on its kernel; on a CPU, programs with the same ``packed`` weights share them."""
    if plan.kernel == Kernel.CPU:
        from hessquik.backends.cpu import CpuProgram

        on_cpu = CpuProgram(plan.program, dtype, plan.rows, packed=packed)
        return Runner(plan, on_cpu.run, lambda: tuple(sorted({1, plan.rows})), on_cpu.bind)
    if plan.kernel == Kernel.TABLE:
        from hessquik.backends.triton import TritonProgram

        return _tiled(plan, TritonProgram(plan.program, dtype, device))
    if plan.kernel == Kernel.CAPTURED:
        from hessquik.backends.gpu_captured import CapturedProgram, captures_of

        return _tiled(plan, CapturedProgram(plan.graph, dtype, device, plan.rows, captures_of(device)))
    from hessquik.backends.torch import TorchProgram

    return _tiled(plan, TorchProgram(plan.graph, dtype, device, plan.rows))


def shared_weights(backend: str, weights: Sequence[torch.Tensor]) -> Packed | None:
    """Return what programs of a network share, for :func:`make_runner`; ``None`` if the backend shares nothing."""
    if backend != "cpu":
        return None
    from hessquik.backends.cpu.packing import Packed

    return Packed(weights)


def compiles_plans(backend: str) -> bool:
    """Return whether a backend has kernels for single plans."""
    return backend == "triton"


def make_runners(plans: Sequence[Plan], dtype: torch.dtype, device: torch.device) -> list[Runner]:
    """Return plans ready to run, each on a kernel compiled for it, unless that would be too large.

    The kernel that runs all other plans is compiled, too.

    Args:
        plans: The plans of a backend that compiles them.
        dtype: Of all numbers.
        device: Where to compute.
    """
    from hessquik.backends.triton import UnrolledProgram, ready_programs

    narrow = [plan for plan in plans if plan.kernel == Kernel.TABLE]
    programs = ready_programs([plan.program for plan in narrow], dtype, device)
    ready = {
        id(plan): _tiled(
            replace(plan, kernel=Kernel.OWN if isinstance(program, UnrolledProgram) else plan.kernel), program
        )
        for plan, program in zip(narrow, programs, strict=True)
    }
    return [ready.get(id(plan)) or make_runner(plan, dtype, device) for plan in plans]


def _tiled(plan: Plan, program: TorchProgram | TritonProgram) -> Runner:
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
