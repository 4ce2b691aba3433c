"""Backends, which run programs: one module each, and the choice among them."""

from hessquik.backends.choice import Runner, chosen, device_value, make_runner, names, resolved

__all__ = ["Runner", "chosen", "device_value", "make_runner", "names", "resolved"]
