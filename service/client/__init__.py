"""An alias: ``service.client`` is :mod:`hessquik_client`, and each of its modules has an alias here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

import hessquik_client

ALIAS = f"{__name__}."


class _Known(Loader):
    """A loader that returns the module already imported under its own name."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Aliases(MetaPathFinder):
    """A finder that resolves ``service.client.NAME`` to ``hessquik_client.NAME``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(ALIAS):
            return None
        module = import_module(f"{hessquik_client.__name__}.{fullname.removeprefix(ALIAS)}")
        return spec_from_loader(fullname, _Known(module))


sys.meta_path.insert(0, _Aliases())
sys.modules[__name__] = hessquik_client
