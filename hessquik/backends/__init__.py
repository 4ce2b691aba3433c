"""Backends, which run programs: one module each, and the choice among them."""

from hessquik.backends.choice import (
    Runner,
    chosen,
    compiles_plans,
    device_value,
    make_runner,
    make_runners,
    names,
    resolved,
)

__all__ = ["Runner", "chosen", "compiles_plans", "device_value", "make_runner", "make_runners", "names", "resolved"]
