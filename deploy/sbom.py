"""Writes the bill of materials (CycloneDX) of each lock file beside it: cpu.lock → cpu.cdx.json.

    python deploy/sbom.py requirements/cpu.lock requirements/cuda.lock

The same lock gives the same bytes: no time, no random number.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
PYTORCH_CPU = "https://download.pytorch.org/whl/cpu"
#: A pin, its hashes, and the comments that say what asked for it.
ENTRY = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?P<rest>(?: \\\n +--hash=\S+)*(?:\n +#.*)*)", re.MULTILINE)
NEEDED_BY = re.compile(r"#\s+(?:via +)?(?!via$)([\w.-]+)(?: \(pyproject\.toml\))?$", re.MULTILINE)


class Pin(NamedTuple):
    """One locked package: its hashes, and the names of the packages that need it."""

    name: str
    version: str
    hashes: tuple[str, ...]
    needed_by: tuple[str, ...]


def read_lock(text: str) -> list[Pin]:
    """Return the pins of a lock file as ``uv pip compile --generate-hashes`` writes it."""
    return [
        Pin(
            match["name"],
            match["version"],
            tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})", match["rest"])),
            tuple(
                re.findall(r"#\s+(?:via +)?(?!via$)([\w.-]+)(?: \(pyproject\.toml\))?$", match["rest"], re.MULTILINE)
            ),
        )
        for match in ENTRY.finditer(text)
    ]


def describe(pin: Pin) -> Component:
    """Return a locked package as a component; every file that the lock admits by its hash."""
    # A local version such as 2.13.0+cpu is no release of the Python package index.
    qualifiers = {"repository_url": PYTORCH_CPU} if pin.version.endswith("+cpu") else {}
    address = PackageURL("pypi", None, pin.name, pin.version, qualifiers)
    files = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION,
        url=XsUri(address.to_string()),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in pin.hashes],
    )
    return Component(
        type=ComponentType.LIBRARY,
        name=pin.name,
        version=pin.version,
        purl=address,
        bom_ref=address.to_string(),
        external_references=[files],
    )


def write_bill(lock: str) -> str:
    """Return the bill of materials of a lock file's text, as JSON."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    root = Component(
        type=ComponentType.APPLICATION, name=project["name"], version=project["version"], bom_ref=project["name"]
    )
    bill = Bom()
    bill.metadata.component = root
    pins = read_lock(lock)
    components = {pin.name: describe(pin) for pin in pins}
    bill.components.update(components.values())
    components[project["name"]] = root
    needs: dict[str, list[Component]] = {name: [] for name in components}
    for pin in pins:
        for name in pin.needed_by:
            needs[name].append(components[pin.name])
    for name, needed in needs.items():
        bill.register_dependency(components[name], needed)
    document = json.loads(JsonV1Dot6(bill).output_as_string())
    # The two that would differ from one run to the next.
    del document["serialNumber"], document["metadata"]["timestamp"]
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.with_suffix(".cdx.json").write_text(write_bill(path.read_text()))
