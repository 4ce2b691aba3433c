"""Messages name the fault: a misspelt name, or the folder in which models were searched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from hessquik_client.quantities import QUANTITIES
from hessquik_client.question import misspelt
from tests.live import LiveServer


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ({"inputs": [0, 0], "quantities": ["value", "hesian"]}, "one like hessian"),
        ({"inputs": [0, 0], "quantities": ["laplace"]}, "one like laplacian"),
        ({"inputs": [0, 0], "quantities": ["qwfpgj"]}, "something else"),
        ({"inputs": [0, 0], "quantities": ["value", "value"]}, "something else"),
        ({"inputs": [0, 0], "quantity": ["value"]}, "one like quantities"),
        ({"input": [0, 0]}, "one like inputs"),
        ({"inputs": [0, 0], "zzz": 1}, "another one"),
    ],
)
def test_a_misspelt_name_is_told_what_it_resembles(server: LiveServer, body: dict[str, object], got: str) -> None:
    problem = httpx.post(f"{server.url}/v1/models/peaks/evaluate", json=body).json()
    assert (problem["code"], problem["got"]) == ("invalid_input", got)


def test_long_names_are_not_compared() -> None:
    assert misspelt(["hessian" * 1000], QUANTITIES) is None


@pytest.mark.parametrize(
    ("name", "found"),
    [("file", "a file"), ("nowhere", "nothing"), ("x" * 300, "none that can be read (File name too long)")],
    ids=["file", "nothing", "closed"],  # a name that is too long stands for a folder that is closed to the service
)
def test_a_start_without_a_folder_names_the_path(tmp_path: Path, name: str, found: str) -> None:
    path = tmp_path / name
    (tmp_path / "file").write_bytes(b"")
    command = [sys.executable, "-m", "service", "serve", str(path), "--port", "0", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 3
    assert f"expected a folder of models at {path}, found {found}" in run.stderr
    assert "Traceback" not in run.stderr
