"""``hessquik describe`` and ``hessquik convert`` write what a file says of its network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import hessquik
from hessquik.networks import fullyConnectedNN
from hessquik.storage import parse
from service.cli import app

CHECKPOINT = Path("tests/fixtures/original/resnet.pt")
DOMAIN = ["--set", "lower_bounds=-1,-1,-1", "--set", "upper_bounds=[1, 1, 2.5]"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_convert_takes_names_bounds_and_errors(tmp_path: Path) -> None:
    out = tmp_path / "resnet.safetensors"
    more = ["--set", "input_names=x, y,z", "--set", "training.value_relative_error=1e-3", "--description", "Old."]
    assert run("convert", str(CHECKPOINT), str(out), *DOMAIN, *more).exit_code == 0
    assert parse(out.read_bytes()).metadata == {
        "description": "Old.",
        "input_names": ["x", "y", "z"],
        "lower_bounds": [-1.0, -1.0, -1.0],
        "upper_bounds": [1, 1, 2.5],
        "training": {"value_relative_error": 1e-3},
    }


def test_describe_shows_and_edits_a_file_and_leaves_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    network = fullyConnectedNN([2, 3, 1])
    hessquik.save(network, path, description="first", training={"a": 1, "b": 2})
    before = path.read_bytes()
    shown = json.loads(run("describe", str(path)).stdout)
    assert (shown["d"], shown["m"], shown["description"]) == (2, 1, "first")
    assert path.read_bytes() == before
    assert (
        run(
            "describe", str(path), "--set", "description=", "--set", "training.a=", "--set", "output_names=f"
        ).exit_code
        == 0
    )
    saved = parse(path.read_bytes())
    assert saved.metadata == {"training": {"b": 2}, "output_names": ["f"]}
    for name, tensor in network.state_dict().items():
        assert (saved.network.state_dict()[name] == tensor).all()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("colour=red", "expected KEY=VALUE with a KEY out of description, input_names"),
        ("description", "expected KEY=VALUE"),
        ("description.first=a", "expected KEY=VALUE"),
        ("lower_bounds=a,b", "lower_bounds: expected numbers separated by commas, got 'a,b'"),
        ("training=no", "training: expected JSON, got 'no'"),
        ("lower_bounds=0,0", "upper_bounds"),
        ("input_names=x", "input_names"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_file_stays(tmp_path: Path, change: str, fault: str) -> None:
    path = tmp_path / "f.safetensors"
    hessquik.save(fullyConnectedNN([2, 3, 1]), path)
    before = path.read_bytes()
    result = run("describe", str(path), "--set", change)
    assert result.exit_code == 1
    assert fault in result.stderr
    assert path.read_bytes() == before
