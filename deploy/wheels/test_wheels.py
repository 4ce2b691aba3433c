"""Tests of the files that `make wheels` built: contents, kernels, and use from a clean environment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIST = Path(os.environ.get("DIST", ROOT / "dist"))
WHEELS = sorted(DIST.glob("*.whl"))
KERNEL = "hessquik/backends/cpu/_kernel.abi3.so"


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split("\n")) - {""}


def wheel_for(machine: str) -> Path:
    (wheel,) = [path for path in WHEELS if path.stem.endswith(machine)]
    return wheel


@pytest.mark.parametrize(("machine", "elf"), [("x86_64", 62), ("aarch64", 183)])
def test_wheels_have_the_packages_and_a_kernel_of_their_architecture(machine: str, elf: int) -> None:
    wheel = wheel_for(machine)
    assert "-cp311-abi3-manylinux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        header = archive.read(KERNEL)[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == elf
    ours = {name for name in tracked("hessquik", "hessquik_client") if "generated" not in name}
    server = {name for name in tracked("service") if not name.startswith("service/client/")}
    assert names - {KERNEL} == ours | {f"hessquik_{name}" for name in server}
    assert wheel.stat().st_size < 2 * 2**20


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clean environment with the wheel alone, and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    wheel = wheel_for(platform.machine())
    command = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        str(wheel),
    ]
    subprocess.run(command, check=True)
    return folder


def test_the_base_install_is_the_client(installed: Path, tmp_path: Path) -> None:
    listed = subprocess.run(
        [installed / "bin" / "python", "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    packages = {line.split("==")[0].lower() for line in listed.stdout.split()}
    assert {"numpy", "httpx", "safetensors", "hessquik-service"} <= packages
    assert not {"torch", "fastapi", "pydantic"} & packages
    code = "from hessquik_client import Client; Client('http://127.0.0.1:9').close(); print('client')"
    ended = subprocess.run(
        [installed / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (ended.stdout, ended.stderr) == ("client\n", "")


def test_a_folder_named_service_hides_nothing_of_the_server(tmp_path: Path) -> None:
    """Nor does PyPI's package of that name, which lies beside the wheel's packages."""
    for folder in ("site", "project"):
        (tmp_path / folder / "service").mkdir(parents=True)
        (tmp_path / folder / "service" / "__init__.py").write_text("raise SystemExit('another package')")
    with zipfile.ZipFile(wheel_for(platform.machine())) as archive:
        archive.extractall(tmp_path / "site")
    assert not (tmp_path / "site" / "service" / "cli.py").exists()
    code = "from hessquik_service import cli, frontend, supervisor, worker"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "project", env=environment, check=True)


def test_the_kernel_of_the_wheel_is_used(tmp_path: Path) -> None:
    """The wheel's packages before those of this checkout, torch from this environment."""
    with zipfile.ZipFile(wheel_for(platform.machine())) as archive:
        archive.extractall(tmp_path)
    code = (
        "import hessquik, torch; from hessquik.backends import names; from hessquik.proof import prove\n"
        "from hessquik.networks import fullyConnectedNN\n"
        "rows = prove(fullyConnectedNN([3, 16, 2]).double())\n"
        "print(hessquik.__file__, names(), all(row.passed for row in rows))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == f"{tmp_path}/hessquik/__init__.py ('cpu', 'torch') True\n"
