"""The documentation: every block is run, its output is the documented one, and the site builds without warnings."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from typer.testing import CliRunner

from hessquik_client.quantities import QUANTITIES, describe_shape
from service import cli
from tests.live import ROOT, LiveServer

pytestmark = pytest.mark.xdist_group("docs")

DOCS = ROOT / "docs"
URL = "http://127.0.0.1:8000"
#: Indentation, language, text, and the text that a Python block is said to print.
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```\n(?=(\n```text\n(.*?)^```\n)?)", flags=re.M | re.S)
#: The command that readers leave running in another terminal; the fixture starts one server for all pages.
SERVE = re.compile(r"(HESSQUIK_\w+=\S+ )*hessquik serve models")
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if "```" in page.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as readers have it: a copy of the repository's models, and its other files."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "models", folder / "models")
    for name in ("tests", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[LiveServer]:
    with LiveServer(folder / "models", settings={"admin_keys": "admin", "watch_s": 0.2}) as live:
        yield live


@pytest.mark.parametrize("page", PAGES)
def test_blocks_do_what_the_page_says(
    page: str, folder: Path, running: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (DOCS / page).read_text()
    monkeypatch.chdir(tmp_path if "an empty folder" in content else folder)
    torch.set_num_threads(1)  # threads that wait for each other are slow beside other tests
    namespace: dict[str, object] = {"__name__": "__docs__"}
    blocks = BLOCK.findall(content.replace(URL, running.url))
    assert blocks
    try:
        for _, language, text, _, expected in blocks:
            run(language, textwrap.dedent(text), expected or None, namespace, running)
            if Path.cwd() == tmp_path and SERVE.search(text):  # the server that runs serves another folder
                shutil.copytree(tmp_path / "models", folder / "models", dirs_exist_ok=True)
    finally:
        torch.set_default_dtype(torch.float32)


def run(language: str, text: str, expected: str | None, namespace: dict[str, object], server: LiveServer) -> None:
    """Run a block, and check its output."""
    match language:
        case "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, text, "exec"), namespace)
            assert expected is None or printed.getvalue() == expected
        case "console":
            for command, output in re.findall(r"^\$ (.*\n)((?:(?!\$ ).*\n)*)", text, flags=re.M):
                follow(command.strip(), output)
        case "json":
            reply = httpx.post(f"{server.url}/v1/models/peaks/evaluate", json=json.loads(text))
            assert reply.status_code == 200, reply.text
        case "sh":  # needs Docker, a cluster or root: tests/deployment tries its files, here it has to be sound
            check_shell(text)
        case "yaml":
            assert yaml.safe_load(text)
        case "text":
            pass  # formulas, and what Python blocks print
        case _:
            raise AssertionError(f"nobody runs {language}")


@pytest.mark.parametrize("page", ["clients.md", "reference/http.md"])
def test_tables_of_quantities_have_all_of_them(page: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\(n.*?\)) \|", (DOCS / page).read_text(), flags=re.M))
    assert rows == {name: describe_shape(name) for name in QUANTITIES}


def test_sizes_of_all_extras_are_listed() -> None:
    """But of those for work on the project itself."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (table,) = re.findall(r"^\| extra \|.*\n((?:\|.*\n)+)", (DOCS / "clients.md").read_text(), flags=re.M)
    listed = re.findall(r"`(\w+)`", table)
    assert sorted(listed) == sorted(extras.keys() - {"dev", "deploy", "fuzz", "wheels", "bench"})


def check_shell(text: str) -> None:
    """Check that a script parses, and that its make targets, commands and files exist."""
    subprocess.run(["bash", "-n", "-c", text], check=True)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", text, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert set(re.findall(r"^hessquik (\w+)", text, flags=re.M)) <= known
    for file in re.findall(r"(?:deploy|requirements)/[\w./-]+", text):
        assert (ROOT / file).exists(), file


def follow(command: str, output: str) -> None:
    """Run a command; an ellipsis in the documented output stands for anything."""
    if command.startswith("make "):  # runs for minutes, or this very test
        check_shell(command)
        return
    if SERVE.fullmatch(command) or ("cuda" in command and torch.cuda.is_available()):
        return
    if re.fullmatch(r"hessquik [^;&|<>$]+", command):  # in this process, which has imported torch
        called = CliRunner().invoke(cli.app, shlex.split(command)[1:], env={"COLUMNS": "160"})
        assert called.exit_code == 0, called.output
        expect_output(called.stdout, output)
        return
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    ended = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    expect_output(ended.stderr + ended.stdout if "echo" in command else ended.stdout, output)


def expect_output(got: str, output: str) -> None:
    """Compare what a command printed with the documented output, if there is one."""
    if output:
        pattern = ".*".join(map(re.escape, output.strip().split("…")))
        assert re.fullmatch(pattern, got.strip(), flags=re.S), got


def test_runner_notices_wrong_output() -> None:
    with pytest.raises(AssertionError):
        follow("echo one", "two\n")
    with pytest.raises(AssertionError):
        run("python", "print(1)", "2\n", {}, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "INFO" in ended.stderr, "with --quiet, warnings are neither shown nor counted"
    assert "WARNING" not in ended.stderr, ended.stderr
    return target


def test_site_builds_without_warnings_and_needs_no_other_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        fetched = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\"> ]+)", page.read_text()
        )
        assert fetched == [], page


def test_generated_tables_are_whole(site: Path) -> None:
    from hessquik_client.errors import Overloaded
    from service.settings import Settings

    text = (site / "reference" / "settings" / "index.html").read_text()
    assert all(f"HESSQUIK_{name.upper()}" in text for name in Settings.model_fields)
    assert Overloaded.code in (site / "reference" / "http" / "index.html").read_text()
    importable = (site / "how-to" / "import" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in importable for name in ("log_sigmoid", "BatchNormalization", "MLPRegressor"))
    commands = (site / "reference" / "commands" / "index.html").read_text()
    assert all(f"hessquik {name}" in commands for name in ("serve", "models", "convert", "check"))
    assert "{{" not in text + commands + importable


@pytest.mark.parametrize("image", sorted((DOCS / "images").iterdir()), ids=lambda path: path.name)
def test_images_are_small(image: Path) -> None:
    assert image.stat().st_size < 300_000
