"""Backends, which run programs: one module each, and the choice among them."""

from hessquik.backends.choice import (
    chosen,
    compiles_plans,
    device_value,
    kernel,
    make_runner,
    make_runners,
    names,
    resolved,
    shared_weights,
)
from hessquik.backends.runner import Bound, Runner

__all__ = [
    "Bound",
    "Runner",
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
