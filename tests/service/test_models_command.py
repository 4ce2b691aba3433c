"""``hessquik models`` lists the good files of a folder and names each malformed one with its fault."""

from pathlib import Path

from typer.testing import CliRunner

import hessquik
from hessquik.networks import fullyConnectedNN
from service.cli import app
from tests.engine.test_malformed_files import FAULTS


def test_malformed_files_are_listed_as_refused(tmp_path: Path) -> None:
    hessquik.save(fullyConnectedNN([2, 3, 1]), tmp_path / "good.safetensors")
    for number, (data, _) in enumerate(FAULTS.values()):
        (tmp_path / f"bad{number}.safetensors").write_bytes(data)
    result = CliRunner().invoke(app, ["models", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "good" in result.stdout
    refusals = result.stderr.split("refused: ")[1:]
    assert len(refusals) == len(FAULTS)
    assert all("must" in text or "truncated" in text for text in refusals)


def test_entries_that_are_left_out_are_listed_one_a_line(tmp_path: Path) -> None:
    hessquik.save(fullyConnectedNN([2, 3, 1]), tmp_path / "good.safetensors")
    (tmp_path / "itself").symlink_to(tmp_path)
    (tmp_path / f"{'long ' * 20}\n.safetensors").touch()
    result = CliRunner().invoke(app, ["models", str(tmp_path)], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "left out: itself: it is a link that leads out of the folder",
        f"left out: {'long ' * 20}\\n.safetensors: its name is not that of a model and a version",
    ]


def test_what_is_no_folder_or_cannot_be_looked_at_is_an_error_of_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path / ("x" * 300)):
        result = CliRunner().invoke(app, ["models", str(path)])
        assert (result.exit_code, result.stderr) == (2, f"hessquik: expected a folder, {path} is none\n")


def test_a_folder_whose_path_is_not_utf8_is_refused_before_anything_starts() -> None:
    result = CliRunner().invoke(app, ["serve", "models\udcff"])
    assert result.exit_code == 2
    assert result.stderr == "hessquik: models: Value error, expected a path in UTF-8, got 'models\\udcff'\n"
