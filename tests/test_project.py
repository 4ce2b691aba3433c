"""Forms, workflows, the citation and CONTRIBUTING.md are valid and name what exists."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.live import ROOT

pytestmark = pytest.mark.xdist_group("project")

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


def test_installed_packages_are_all_there_are_and_none_is_named_service() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = [path for name in ("hessquik", "hessquik_client", "service") for path in (ROOT / name).rglob("*.py")]
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in files} - {"service.client"}
    expected = {re.sub("^service", "hessquik_service", name) for name in folders}
    assert set(listed["tool"]["setuptools"]["packages"]) == expected
    assert listed["project"]["scripts"] == {"hessquik": "hessquik_service.__main__:main"}


def test_the_source_distribution_has_all_that_is_tracked(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
    build_sdist = runpy.run_path(str(ROOT / "deploy" / "wheels" / "build.py"))["build_sdist"]
    with tarfile.open(build_sdist(tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(listed.stdout.splitlines()) - names == set()


def test_modules_that_are_not_searched_for_examples_have_none() -> None:
    """The client's adapters are left out, since they import other libraries, for seconds."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (pattern,) = re.findall(r"--ignore-glob=(\S+)", options)
    adapters = list(ROOT.glob(pattern))
    assert len(adapters) > 5
    assert [path.name for path in adapters if ">>>" in path.read_text()] == []


def make_targets(text: str) -> set[str]:
    return set(re.findall(r"\bmake ([a-z][\w-]*)(?= {2,}|\n|`|$)", text))


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ("vendor.github-workflows", [str(path.relative_to(ROOT)) for path in WORKFLOWS]),
        ("vendor.dependabot", [".github/dependabot.yml"]),
        ("vendor.citation-file-format", ["CITATION.cff"]),
    ],
)
def test_files_fit_their_schemas(schema: str, names: list[str]) -> None:
    assert names
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *names]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in WORKFLOWS)])
def test_make_targets_exist(name: str) -> None:
    for target in make_targets((ROOT / name).read_text()):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), f"{name}: make {target}"


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:hessquik|service|tests|docs|deploy|benchmarks)/[\w./-]+)`", text))
    assert len(named) > 15
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set()


def test_workflows_hold_no_more_rights_than_they_need() -> None:
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path.name
        for name, job in workflow["jobs"].items():
            # Only a release may write, and only where it publishes.
            writes = {scope for scope, right in job.get("permissions", {}).items() if right == "write"}
            assert not writes or path.name == "release.yml", f"{path.name}: {name} may write {writes}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.name)
def test_issue_forms_ask_for_something(path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    identifiers = [item["id"] for item in form["body"] if item["type"] != "markdown"]
    assert len(set(identifiers)) == len(identifiers) >= 3
    assert any(item.get("validations", {}).get("required") for item in form["body"])


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ, reason="needs pytest-xdist, as in make test: -n 2 --dist loadgroup"
)
def test_groups_of_tests_are_kept_together(request: pytest.FixtureRequest) -> None:
    """Tests of a group share a server, or would disturb each other; their names tell the scheduler."""
    assert request.node.nodeid.endswith("@project")
    assert all("@" in item.nodeid for item in request.session.items), "a file is a group where none is named"
