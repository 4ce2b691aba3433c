"""Locks, bills of materials and ``pyproject.toml`` say the same."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from referencing import Registry

ROOT = Path(__file__).parents[2]
LOCKS = [ROOT / "requirements" / f"{name}.lock" for name in ("cpu", "cuda", "cuda-arm64")]
#: What compiles modules, in the stage of the image that builds.
BUILD = ROOT / "requirements" / "build.lock"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: With tracing, since every setting works in the image.
SERVER = [Requirement(line) for line in PROJECT["dependencies"] + EXTRAS["server"] + EXTRAS["otel"]]

#: Releases before these have known faults that this service would be open to.
FLOORS = {
    "torch": "2.10",  # CVE-2026-24747: code in a file read with weights_only
    "starlette": "1.3.1",  # CVE-2026-48710: Host header, CVE-2025-62727: Range header
    "h11": "0.16",  # CVE-2025-43859: request smuggling
    "httptools": "0.7",  # lenient parsing that lets requests be smuggled
    "uvicorn": "0.51",
    "safetensors": "0.8",
    "jinja2": "3.1.6",  # CVE-2025-27516: out of the sandbox
    "setuptools": "78.1.1",  # CVE-2025-47273: path traversal
}
#: Parsers for what no client of this service sends, and readers of pickles.
UNWANTED = {"python-multipart", "aiohttp", "cloudpickle", "dill"}


@pytest.fixture(name="sbom", scope="module")
def import_sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "deploy" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="pins", params=LOCKS, ids=lambda path: path.stem)
def read_pins(request: pytest.FixtureRequest, sbom: ModuleType) -> dict[str, Version]:
    return {pin.name: Version(pin.version) for pin in sbom.read_lock(request.param.read_text())}


@pytest.mark.parametrize("path", [*LOCKS, BUILD], ids=lambda path: path.stem)
def test_every_line_of_the_lock_is_a_pin_with_a_hash(path: Path, sbom: ModuleType) -> None:
    text = path.read_text()
    pins = sbom.read_lock(text)
    assert all(pin.hashes and (pin.needed_by or pin.name == "mypy") for pin in pins)
    assert len(pins) == len(re.findall(r"^[^\s#]", text, re.MULTILINE))
    assert sum(len(pin.hashes) for pin in pins) == text.count("--hash=")


@pytest.mark.parametrize("requirement", SERVER, ids=lambda requirement: requirement.name)
def test_lock_satisfies_the_project(requirement: Requirement, pins: dict[str, Version]) -> None:
    if requirement.marker is None or requirement.marker.evaluate({"sys_platform": "linux"}):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_lock_holds_what_the_image_builds_the_wheel_with(pins: dict[str, Version]) -> None:
    (requirement,) = map(
        Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    )
    assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_lock_keeps_to_the_constraints(pins: dict[str, Version]) -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    constraints = {
        canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)
    }
    shared = pins.keys() & constraints.keys()
    assert shared >= {canonicalize_name(requirement.name) for requirement in SERVER}
    assert {name: pins[name].public for name in shared} == {name: constraints[name].public for name in shared}


def closure(names: list[str], extras: frozenset[str] = frozenset()) -> set[str]:
    """Return the named packages and all of their dependencies, by the metadata of the installed ones."""
    found: set[str] = set()
    waiting = [(canonicalize_name(name), extras) for name in names]
    while waiting:
        name, extras = waiting.pop()
        if name in found and not extras:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in extras or {""}]
            if requirement.marker is None or any(requirement.marker.evaluate(one) for one in environments):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the locks are for the image's Python 3.11")
def test_lock_is_the_closure_of_the_project_and_nothing_else(sbom: ModuleType) -> None:
    locked = {pin.name for pin in sbom.read_lock(LOCKS[0].read_text())}
    if Version(importlib.metadata.version("torch")).local != "cpu":
        pytest.skip("the CPU lock is compared with an environment that has torch's CPU build")
    assert locked == closure([requirement.name for requirement in SERVER])


@pytest.mark.parametrize("name", FLOORS)
def test_lock_is_above_the_floor(name: str, pins: dict[str, Version]) -> None:
    assert pins[name] >= Version(FLOORS[name])


def test_the_lock_of_the_build_holds_what_mypy_needs_in_the_versions_that_are_tested(sbom: ModuleType) -> None:
    pins = {pin.name: Version(pin.version) for pin in sbom.read_lock(BUILD.read_text())}
    assert pins.keys() == closure(["mypy"])
    assert pins == {name: Version(importlib.metadata.version(name)) for name in pins}


@pytest.mark.parametrize("name", sorted(FLOORS.keys() & {requirement.name for requirement in SERVER}))
def test_project_states_the_floor(name: str) -> None:
    (requirement,) = (requirement for requirement in SERVER if requirement.name == name)
    (stated,) = (clause.version for clause in requirement.specifier if clause.operator == ">=")
    assert Version(stated) >= Version(FLOORS[name])


def test_lock_lacks_parsers_that_nothing_needs(pins: dict[str, Version]) -> None:
    assert not pins.keys() & UNWANTED


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_bill_of_materials_is_the_lock(path: Path, sbom: ModuleType) -> None:
    bill = path.with_suffix(".cdx.json").read_text()
    assert bill == sbom.write_bill(path.read_text()), "run `make lock`"
    listed = {(component["name"], component["version"]) for component in json.loads(bill)["components"]}
    assert listed == {(pin.name, pin.version) for pin in sbom.read_lock(path.read_text())}


def bill_validator() -> Draft7Validator:
    """Return a validator for CycloneDX 1.6, whose schema refers to two others."""
    schemas = importlib.resources.files("cyclonedx.schema") / "_res"
    names = ("bom-1.6", "spdx", "jsf-0.82")
    contents = [json.loads((schemas / f"{name}.SNAPSHOT.schema.json").read_text()) for name in names]
    registry = Registry().with_contents((content["$id"], content) for content in contents)
    return Draft7Validator(contents[0], registry=registry)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_bill_of_materials_fits_the_published_schema(path: Path) -> None:
    bill_validator().validate(json.loads(path.with_suffix(".cdx.json").read_text()))


def test_bill_schema_refuses_an_unknown_field() -> None:
    bill = json.loads(LOCKS[0].with_suffix(".cdx.json").read_text())
    bill["components"][0]["purk"] = bill["components"][0].pop("purl")
    with pytest.raises(ValidationError, match="purk"):
        bill_validator().validate(bill)


@pytest.mark.parametrize(
    ("old", "new"), [("h11==0.16.0", "h11==0.15.0"), ("--hash=sha256:0", "--hash=sha256:1")], ids=["version", "hash"]
)
def test_changed_lock_no_longer_fits_the_bill(old: str, new: str, sbom: ModuleType) -> None:
    lock = LOCKS[0].read_text()
    assert old in lock
    assert sbom.write_bill(lock.replace(old, new, 1)) != LOCKS[0].with_suffix(".cdx.json").read_text()
