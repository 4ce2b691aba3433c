"""``import hessQuik`` for code that was written for the original: each name leads to the same module of hessquik.

This is a module, not a package, so that it shares no file with the original: where both are installed, Python finds
the original's package first. On file systems that ignore case, a folder of this name would be the engine's own.
"""

import sys
from importlib import import_module

_ENGINE = "hessquik"
for _package in ("activations", "layers", "networks", "utils"):
    import_module(f"{_ENGINE}.{_package}")
for _name in [name for name in sys.modules if name.partition(".")[0] == _ENGINE]:
    sys.modules["hessQuik" + _name.removeprefix(_ENGINE)] = sys.modules[_name]
