"""Imports point down and never in a circle; each package imports no more than it may."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Modules from the bottom up; one may import those on lines above it and, but for circles, those on its own line.
#: A name stands for the module and all that is inside it.
LAYERS = {
    "hessquik": """
        hessquik.errors hessquik.original
        hessquik.expressions
        hessquik.activations hessquik.device hessquik.memory hessquik.pointwise hessquik.quantities hessquik.recent
        hessquik.strict_json
        hessquik.algebra hessquik.graph hessquik.strided
        hessquik.operations hessquik.steps hessquik.trace
        hessquik.layers hessquik.layout hessquik.passes
        hessquik.calculus
        hessquik.plan
        hessquik.backends
        hessquik.networks
        hessquik.architecture hessquik.evaluator hessquik.utils
        hessquik.ensemble hessquik.reference hessquik.storage
        hessquik.conversion hessquik.importing hessquik.proof
        hessquik
    """,
    "hessquik_client": """
        hessquik_client.errors hessquik_client.domain hessquik_client.quantities
        hessquik_client.question
        hessquik_client.evaluators
        hessquik_client.messages
        hessquik_client.parts
        hessquik_client.steps
        hessquik_client.progress
        hessquik_client.local hessquik_client.models hessquik_client.transport
        hessquik_client.client
        hessquik_client.last_point
        hessquik_client.for_casadi hessquik_client.for_ipopt hessquik_client.for_jax hessquik_client.for_openmdao
        hessquik_client.for_pymc hessquik_client.for_pyomo hessquik_client.for_scipy hessquik_client.for_torch
        hessquik_client
    """,
    "service": """
        service.versions service.wire
        service.child
        service.metrics
        service.periodic service.settings
        service.keys
        service.http service.json_reader
        service.bulk
        service.assets service.client service.codecs service.devices service.healthcheck service.logs
        service.loadtest service.metadata service.schemas
        service.open_inference service.shared service.tracing
        service.scheduler service.workers
        service.link service.repository
        service.node
        service.core
        service.front
        service.routes
        service.app
        service.server service.worker
        service.run_worker
        service.frontend
        service.supervisor
        service.cli service.ray_data service.ray_serve
        service.__main__
        service
    """,
}
#: What the engine may import besides the standard library.
ENGINE_NEEDS = {"torch", "safetensors"}
#: Modules that import Triton, which comes with torch where there are GPUs; nothing imports them elsewhere.
TRITON = {
    f"hessquik.backends.{name}"
    for name in (
        "gpu_compile",
        "gpu_driver",
        "gpu_kernel",
        "gpu_math",
        "gpu_stream",
        "gpu_table",
        "gpu_unrolled",
        "triton",
    )
}
#: What must not be loaded when the client is imported, or its base install would not do.
NOT_FOR_THE_CLIENT = {"torch", "fastapi", "starlette", "uvicorn", "pydantic"}


def sources(package):
    """Yield the files of a package by module name."""
    folder = ROOT / package.replace(".", "/")
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path, everywhere=True):
    """Return the imports of a file as (module, name) pairs; without ``everywhere`` only those made on loading."""
    tree = ast.parse(path.read_text())
    delayed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not everywhere and id(node) in delayed:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if node.level:  # the server's: it is installed under another name
                package = path.relative_to(ROOT).parts[: -node.level]
                assert package[0] == "service", f"{path}: relative import"
                module = ".".join([*package, *filter(None, [module])])
            yield from ((module, alias.name) for alias in node.names)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imported_modules(package):
    """Return for every module of a package the modules of the same package that it imports."""
    files = dict(sources(package))
    return {
        name: {
            f"{module}.{imported}" if f"{module}.{imported}" in files else module
            for module, imported in imports(path, everywhere=False)
            if module.split(".")[0] == package
        }
        for name, path in files.items()
    }


def level(module, lines):
    """Return the line of the layering that names the module or its nearest enclosing package."""
    matches = [
        (len(name), number)
        for number, line in enumerate(lines)
        for name in line.split()
        if module == name or (module.startswith(name + ".") and "." in name)
    ]
    # A new module gets its place on a line above all that it imports.
    assert matches, f"{module} has no place in LAYERS"
    return max(matches)[1]


def upward(graph, lines):
    """Return the imports of modules on a higher line."""
    return [
        f"{module} imports {imported}"
        for module, found in graph.items()
        for imported in found
        if level(imported, lines) > level(module, lines)
    ]


def circle(graph):
    """Return modules that form an import cycle, or an empty list."""
    done, way = set(), []

    def visit(module):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        way.append(module)
        for imported in graph.get(module, set()) - {module}:
            if found := visit(imported):
                return found
        done.add(way.pop())
        return []

    return next(filter(None, map(visit, graph)), [])


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_down(package):
    assert upward(imported_modules(package), LAYERS[package].split("\n")) == []


@pytest.mark.parametrize("package", LAYERS)
def test_imports_have_no_circles(package):
    assert circle(imported_modules(package)) == []


def test_the_engine_imports_torch_and_safetensors_only():
    optional = {
        "setuptools": {"hessquik.backends.cpu.build"},
        "triton": TRITON,
        "networkx": {"hessquik.importing.lowering"},
        "onnx": {f"hessquik.importing.onnx_{name}" for name in ("handlers", "model", "node", "reader")},
        "sklearn": {
            "hessquik.importing.support",
            *(f"hessquik.importing.sklearn_{name}" for name in ("estimator", "parts", "transformers")),
        },
    }
    apart = set().union(*optional.values())
    loaded = {module for name in apart for module, _ in imports(dict(sources("hessquik"))[name], everywhere=False)}
    assert not {"networkx", "onnx", "onnxruntime", "sklearn"} & {module.split(".")[0] for module in loaded}
    paths = [path for name, path in sources("hessquik") if name not in apart]
    found = {module.split(".")[0] for path in paths for module, _ in imports(path)}
    assert found - sys.stdlib_module_names - {"hessquik"} == ENGINE_NEEDS


def test_the_engine_knows_nothing_of_the_service():
    assert not any(module.startswith("service") for _, path in sources("hessquik") for module, _ in imports(path))


def test_the_client_knows_nothing_of_the_server():
    found = {module for _, path in sources("hessquik_client") for module, _ in imports(path)}
    assert not any(module.split(".")[0] == "service" for module in found)


def test_the_client_loads_neither_torch_nor_the_server():
    program = f"import sys; from hessquik_client import Client; print(*{NOT_FOR_THE_CLIENT!r} & sys.modules.keys())"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize("module", ["hessquik", "hessquik.quantities", "hessquik_client.quantities"])
def test_quantities_are_known_without_any_package(module):
    """A front end and a client need the table of quantities, and not what computes them."""
    program = f"import sys; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"hessquik", module.split(".")[0]}


def test_the_rules_refuse_what_breaks_them(tmp_path):
    (tmp_path / "low.py").write_text("import numpy\ndef f():\n    import high\n")
    assert list(imports(tmp_path / "low.py")) == [("numpy", None), ("high", None)]
    assert list(imports(tmp_path / "low.py", everywhere=False)) == [("numpy", None)]
    lines = ["a.low", "a.high", "a"]
    assert upward({"a.high": {"a.low"}, "a": {"a.high"}}, lines) == []
    assert upward({"a.low.part": {"a.high"}}, lines) == ["a.low.part imports a.high"]
    with pytest.raises(AssertionError, match=r"a\.new has no place"):
        upward({"a.new": {"a.low"}}, lines)
    assert circle({"x": {"y", "x"}, "y": {"z"}, "w": {"y"}}) == []
    assert circle({"x": {"y"}, "y": {"z"}, "z": {"y"}}) == ["y", "z", "y"]


MODULES = [name for name, _ in sources("hessquik")]


@pytest.mark.parametrize("name", MODULES)
def test_all_names_are_the_exports(name):
    """``__all__`` is sorted, complete and true: every public name made here, or handed on by a package."""
    module = import_module(name)
    tree = ast.parse(Path(module.__file__).read_text())
    made = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    when_used = [inner for node in tree.body if is_type_checking(node) for inner in node.body]
    handed_on = {
        alias.asname or alias.name
        for node in [*tree.body, *when_used]
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hessquik")
        for alias in node.names
    }
    public = {name for name in made if not name.startswith("_")}
    if hasattr(module, "__path__") and not public:
        public |= handed_on
    assert all(hasattr(module, exported) for exported in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    assert public <= set(module.__all__), f"not exported: {public - set(module.__all__)}"
    constants = {
        target.id
        for node in tree.body
        for target in getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    }
    assert set(module.__all__) <= public | constants
