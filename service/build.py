"""Compiles the modules that every request meets with mypyc, from the same source, if a build asks for it.

    python -m pip install "setuptools>=80" "mypy>=1.18"
    HESSQUIK_COMPILE=1 python -m pip install --no-build-isolation ".[server]"

setuptools runs this file alone, before the package can be imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

__all__ = ["COMPILED", "BuildModules"]

#: Names of the compiled modules. A class in them has no other attributes than those that it declares, and cannot be
#: changed from outside.
COMPILED = (
    "hessquik_client.question",
    "hessquik_service.codecs",
    "hessquik_service.front",
    "hessquik_service.http.connection",
    "hessquik_service.http.messages",
    "hessquik_service.http.negotiation",
    "hessquik_service.json_reader",
    "hessquik_service.link",
    "hessquik_service.routes.derivatives",
    "hessquik_service.scheduler",
    "hessquik_service.wire",
)
#: Types are taken from the project and the standard library alone, so that a build needs no other package.
CONFIGURATION = """\
[mypy]
follow_imports = silent
ignore_missing_imports = True
no_site_packages = True
"""


class BuildModules(build_py):  # type: ignore[misc]
    """Copies the modules, and compiles the copies if the environment has ``HESSQUIK_COMPILE=1``."""

    def run(self) -> None:
        """Copy the modules; add those that are to be compiled to the extensions, which are built next.

        Nothing is compiled for an editable install, which would go on running compiled code when its source changes.

        Raises:
            SetupError: mypy is not installed where the build runs.
        """
        super().run()
        if self.editable_mode or os.environ.get("HESSQUIK_COMPILE") != "1":
            return
        try:
            from mypyc.build import mypycify
        except ImportError:
            raise SetupError(
                "expected mypy for HESSQUIK_COMPILE=1: install it, and build with --no-build-isolation"
            ) from None

        temporary = Path(self.get_finalized_command("build").build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        configuration = temporary / "mypy.ini"
        configuration.write_text(CONFIGURATION)
        sources = [str(Path(self.build_lib, *name.split(".")).with_suffix(".py")) for name in COMPILED]
        arguments = [f"--config-file={configuration}", *sources]
        self.distribution.ext_modules += mypycify(arguments, opt_level="3", target_dir=str(temporary))
        self.reinitialize_command("build_ext")
        # The kernel's interface is the same in all versions of Python, that of compiled modules is not.
        self.distribution.get_command_obj("bdist_wheel").py_limited_api = False
