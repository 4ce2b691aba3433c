"""``hessquik evaluate``: files of points in, files of results out, tile by tile."""

from __future__ import annotations

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner, Result

import hessquik
from hessquik.activations import tanhActivation
from hessquik.networks import fullyConnectedNN
from hessquik_client.evaluators import Evaluators
from service import bulk
from service.bulk import Job, evaluate_file
from service.cli import app

D, M, N = 3, 2, 1000
X = np.random.default_rng(0).uniform(-1, 1, (N, D))
V = np.random.default_rng(1).normal(size=(2, D))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "f.safetensors"
    network = fullyConnectedNN([D, 8, M], tanhActivation(), dtype=torch.float64)
    bounds = {"lower_bounds": [-1.0] * D, "upper_bounds": [1.0] * D}
    hessquik.save(network, path, input_names=["x", "y", "z"], output_names=["f", "g"], **bounds)
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, np.ndarray]:
    evaluate = hessquik.Evaluator(hessquik.load(model))
    names = ("value", "gradient", "hessian_packed", "hvp")
    out = evaluate(torch.from_numpy(X), names, None, torch.from_numpy(V).expand(N, -1, -1).contiguous())
    return {name: getattr(out, name).numpy() for name in names}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiles small, so that there are several and the last one is smaller."""
    monkeypatch.setattr(bulk, "TILE_BYTES", 1 << 14)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def write(path: Path, points: np.ndarray, names: list[str] | None = None) -> Path:
    if path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([*([names] if names else []), *points.tolist()])
    else:
        table = pyarrow.table(dict(zip(names or ["a", "b", "c"], points.T, strict=True)))
        pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_one_quantity_from_every_kind_of_file_to_npy(
    model: Path, expected: dict[str, np.ndarray], tmp_path: Path, suffix: str
) -> None:
    source, target = write(tmp_path / f"in{suffix}", X), tmp_path / "out.npy"
    result = run(model, source, target, "--quantities", "gradient")
    assert (result.exit_code, result.stdout) == (0, f"{target}: {N} points\n")
    found = np.load(target, mmap_mode="r")
    assert found.tobytes() == np.ascontiguousarray(expected["gradient"]).tobytes()
    assert found.shape == (N, D, M)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name])


def test_several_quantities_are_columns_with_names_or_files(
    model: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    source = write(tmp_path / "in.npy", X)
    names = ["x,f", "x,g", "y,f", "y,g", "z,f", "z,g"]
    labels = ["value[f]", "value[g]", *(f"gradient[{name}]" for name in names)]
    flat = np.concatenate([expected["value"], expected["gradient"].reshape(N, -1)], axis=1)
    assert run(model, source, tmp_path / "out.csv", "--quantities", "value,gradient").exit_code == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        first, *rows = csv.reader(file)
    assert first == labels
    assert (np.array(rows, float) == flat).all()
    assert run(model, source, tmp_path / "out.parquet", "--quantities", "value,gradient").exit_code == 0
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == labels
    assert (np.stack([column.to_numpy() for column in table.columns], axis=1) == flat).all()
    np.save(tmp_path / "v.npy", V)
    more = ("--quantities", "hvp,hessian_packed,domain_distance", "--directions", tmp_path / "v.npy")
    assert run(model, source, tmp_path / "out", *more).exit_code == 0
    for name in ("hvp", "hessian_packed"):
        np.testing.assert_allclose(np.load(tmp_path / "out" / f"{name}.npy"), expected[name], rtol=1e-12, atol=1e-14)
    assert (np.load(tmp_path / "out" / "domain_distance.npy") == np.zeros(N)).all()


def test_weights_dtypes_and_columns_by_name(model: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    shuffled = np.concatenate([X[:, [2]], np.full((N, 1), 7.0), X[:, :2]], axis=1)
    for suffix in (".csv", ".parquet"):
        source = write(tmp_path / f"in{suffix}", shuffled, ["z", "other", "x", "y"])
        target = tmp_path / "out.npy"
        assert run(model, source, target, "--weights", "2,-1", "--dtype", "float32").exit_code == 0
        found = np.load(target)
        assert (found.shape, found.dtype) == ((N, 1), np.float32)
        np.testing.assert_allclose(found[:, 0], expected["value"] @ [2, -1], atol=1e-5)


def test_an_empty_file_has_no_results(model: Path, tmp_path: Path) -> None:
    for suffix in (".npy", ".csv", ".parquet"):
        source = write(tmp_path / f"in{suffix}", X[:0], ["x", "y", "z"])
        result = run(model, source, tmp_path / "out.npy")
        assert (result.exit_code, np.load(tmp_path / "out.npy").shape) == (0, (0, M)), result.stderr


def test_empty_lines_of_a_text_file_are_skipped_and_counted(model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.npy"
    source.write_text("\nx,y,z\n0.1,0.2,0.3\n\n0.4,0.5,0.6\n\n")
    assert run(model, source, target).exit_code == 0
    assert np.load(target).shape == (2, M)
    source.write_text("\n0.1,0.2,0.3\n\n0.4,0.5\n")
    assert "line 4: expected 3 numbers, got 2" in run(model, source, target).stderr


BAD = {
    "suffix in": ("in.txt", "out.npy", (), "expected a file of points that ends in .npy, .csv, .parquet"),
    "suffix out": ("in.npy", "out.txt", (), "expected a folder, or a file that ends in"),
    "two quantities": ("in.npy", "out.npy", ("--quantities", "value,gradient"), "expected a folder"),
    "quantity": ("in.npy", "out.npy", ("--quantities", "velocity"), "--quantities: expected names out of value"),
    "dtype": ("in.npy", "out.npy", ("--dtype", "float16"), "--dtype: expected float32 or float64"),
    "outside": ("in.npy", "out.npy", ("--outside", "forbid"), "--outside: expected allow or refuse"),
    "width": ("wide.npy", "out.npy", (), "expected numbers of shape (n, 3), got float64 (1000, 4)"),
    "columns": ("wide.csv", "out.npy", (), "expected 3 numbers, got 4"),
    "text": ("text.csv", "out.npy", (), "line 3: expected 3 numbers, got '1,2,no'"),
    "not finite": ("nan.npy", "out.npy", (), "inputs, row 700: expected finite numbers"),
    "outside the bounds": ("far.npy", "out.npy", ("--outside", "refuse"), "inputs, row 700: expected y from -1 to 1"),
    "no directions": ("in.npy", "out.npy", ("--quantities", "hvp"), "directions: expected shape"),
    "weights": ("in.npy", "out.npy", ("--weights", "1,2,3"), "weights: expected shape"),
    "no file": ("none.npy", "out.npy", (), "No such file"),
}


@pytest.mark.parametrize(("source", "target", "more", "fault"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    model: Path, tmp_path: Path, source: str, target: str, more: tuple[str, ...], fault: str
) -> None:
    (tmp_path / "in.txt").write_text("1 2 3")
    (tmp_path / "text.csv").write_text("x,y,z\n1,2,3\n1,2,no\n")
    spoiled, far = X.copy(), X.copy()
    spoiled[700, 1], far[700, 1] = np.nan, 2.0
    for name, points in {"in": X, "nan": spoiled, "far": far, "wide": np.ones((N, 4))}.items():
        write(tmp_path / f"{name}.npy", points)
    write(tmp_path / "wide.csv", np.ones((N, 4)))
    before = sorted(tmp_path.iterdir())
    result = run(model, tmp_path / source, tmp_path / target, *more)
    assert result.exit_code in {1, 2}
    assert fault in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_memory_is_that_of_a_tile(model: Path, tmp_path: Path) -> None:
    rows = 60_000
    points = np.lib.format.open_memmap(tmp_path / "in.npy", "w+", np.float64, (rows, D))
    points[:] = 0.5
    evaluators = Evaluators(hessquik.storage.parse(model.read_bytes()), torch.device("cpu"), 1)
    tracemalloc.start()
    evaluate_file(evaluators, tmp_path / "in.npy", tmp_path / "out.npy", Job(("hessian",)), lambda rows, total: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out.npy").stat().st_size > 8e6
    assert peak < 2e6
