"""Forbidden constructs in the source: nothing in the service or the engine can run what it reads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.live import ROOT

PACKAGES = ("hessquik", "hessquik_client", "service")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BANNED_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
#: The command that converts checkpoints of the original library, offline, by a restricted unpickler that runs no code
#: of theirs; nothing that serves imports it.
CONVERSION = "conversion.py"
#: Calls allowed, by file: kernels are compiled from text written from a plan's numbers and primitives, never from the
#: text of a file or a request; the command that imports networks reads weights alone.
ALLOWED = {
    CONVERSION: ["pickle", "torch.load"],
    "gpu_unrolled.py": ["exec", "compile"],
    "sequential.py": ["torch.load"],
}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "input"}


def faults(tree: ast.AST) -> list[str]:
    """Return the forbidden imports and calls of a module."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in BANNED_IMPORTS]
            case ast.ImportFrom(module=str(module)):
                found += [module] if module.split(".")[0] in BANNED_IMPORTS else []
            case ast.Call(func=function):
                found += [ast.unparse(function)] if ast.unparse(function) in BANNED_CALLS else []
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_nothing_that_is_read_can_be_run(path: Path) -> None:
    found = faults(ast.parse(path.read_text()))
    assert found == ALLOWED.get(path.name, [])
    text = path.read_text()
    assert text.count(" torch.load(path,") == text.count('map_location="cpu", weights_only=True)')


def test_nothing_that_serves_imports_the_conversion() -> None:
    importers = [path.name for path in FILES if "conversion" in path.read_text() and path.name != CONVERSION]
    assert importers == ["cli.py"]


def test_what_is_forbidden_is_found() -> None:
    """The control."""
    source = "import pickle\nfrom joblib import load\nimport torch\ntorch.load('x')\neval('1')"
    assert faults(ast.parse(source)) == ["pickle", "joblib", "torch.load", "eval"]


def test_no_form_parser_is_required() -> None:
    assert "multipart" not in (ROOT / "pyproject.toml").read_text()
    assert "multipart" not in (ROOT / "constraints.txt").read_text()
