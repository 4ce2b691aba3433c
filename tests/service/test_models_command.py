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
