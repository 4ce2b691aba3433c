"""What runs programs: one module per backend, and the choice among them."""

from hessquik.backends.choice import Runner, chosen, device_value, make_runner, names, resolved

__all__ = ["Runner", "chosen", "device_value", "make_runner", "names", "resolved"]
