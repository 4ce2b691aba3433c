"""The scripts in examples/: the fit that the training scripts share, and the ones that talk to a server."""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from hessquik import load, storage
from hessquik.activations import tanhActivation
from hessquik.layers import resnetLayer, singleLayer
from hessquik.networks import NN
from tests import oracle
from tests.live import ROOT, LiveServer

EXAMPLES = ROOT / "examples"
#: Heights of the maxima and minima of the function; those of the network differ by at most NETWORK_ERROR.
HILLS_AND_HOLLOWS = {"hill": (3.5925, 3.7766, 8.1062), "hollow": (-6.5511, -3.0498, -0.0649)}
NETWORK_ERROR = 5e-3


def run(script: str, *arguments: str, timeout_s: float = 120) -> str:
    """Return what a script prints."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module that the training scripts share."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import fitting

    return fitting


def fitted(fitting: ModuleType, rounds: int) -> NN:
    """Return a small network with scaled inputs, fitted to x₀² + x₀x₁ on [−1, 3] × [0, 2]."""
    target = fitting.Target(
        name="parabola",
        description="",
        reference="",
        function=lambda x: x[0] ** 2 + x[0] * x[1],
        inputs={"a": (-1.0, 3.0), "b": (0.0, 2.0)},
        output="",
    )
    torch.manual_seed(0)
    half = torch.tensor([0.5, 1.0], dtype=torch.float64)
    network = NN(
        fitting.affine_layer(half, -half),
        resnetLayer(2, act=tanhActivation(), dtype=torch.float64),
        singleLayer(2, 1, dtype=torch.float64),
    )
    fitting.fit(network, target, target.spread_points(32, 1), rounds)
    return network


def test_fit_gives_the_same_network_again_and_leaves_the_scaling_alone(fitting: ModuleType) -> None:
    first, second = fitted(fitting, 2), fitted(fitting, 2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert torch.equal(first.state_dict()["0.K"], torch.diag(torch.tensor([0.5, 1.0], dtype=torch.float64)))
    assert not torch.equal(first.state_dict()["2.K"], fitted(fitting, 0).state_dict()["2.K"])


def test_minimise_borehole_finds_the_lowest_corner(server: LiveServer, shipped_models: Path) -> None:
    printed = run("minimise_borehole.py", "--url", server.url)
    match = re.search(r"at the minimum: +([\d.]+), \d+ iterations, (\d+) points", printed)
    assert match is not None
    network = load(shipped_models / "borehole.safetensors")
    bounds = [tuple(map(float, line)) for line in re.findall(r"of ([\d.e+]+) to ([\d.e+]+)$", printed, re.MULTILINE)]
    corners = torch.tensor(list(itertools.product(*bounds)), dtype=torch.float64)
    assert corners.shape == (256, 8)
    lowest = float(oracle.value(network, corners).detach().min())
    assert float(match[1]) == pytest.approx(lowest, abs=0.01)
    assert 1 < int(match[2]) < 100


def test_newton_finds_the_hills_and_hollows_of_peaks(server: LiveServer, tmp_path: Path) -> None:
    picture = tmp_path / "paths.png"
    printed = run("newton_from_many_starts.py", "--url", server.url, "--picture", str(picture))
    found = re.findall(r"(hill|hollow) +at \(.*\), height ([-+.\d]+), \d+ paths", printed)
    for kind, heights in HILLS_AND_HOLLOWS.items():
        here = [float(height) for name, height in found if name == kind]
        for height in heights:
            assert min(abs(height - other) for other in here) <= NETWORK_ERROR, (kind, height)
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert min(width, height) >= 600


def test_steps_limited_by_the_spread_end_where_the_ensemble_is_right(server: LiveServer, tmp_path: Path) -> None:
    picture = tmp_path / "spread.png"
    printed = run("minimise_with_spread.py", "--url", server.url, "--limit", "0.3", "--picture", str(picture))
    ends = {
        name: tuple(map(float, numbers))
        for name, *numbers in re.findall(
            r"(\w+): +\d+ steps to +([-.\d]+) ± ([.\d]+), the function itself has +([-.\w]+)", printed
        )
    }
    mean, spread, truth = ends["limited"]
    assert spread <= 0.3
    assert abs(mean - truth) <= 3 * spread
    mean, spread, truth = ends["unlimited"]
    assert mean < -100  # of a flow that cannot be negative
    assert spread > 10
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_posterior_of_the_borehole_agrees_with_importance_sampling(server: LiveServer, shipped_models: Path) -> None:
    printed = run("sample_posterior.py", "--url", server.url, "--chains", "8", "--steps", "80")
    # 320 correlated draws: about 40 independent ones, so that a mean has an error of a sixth of the spread.
    check_posterior(printed, shipped_models)


@pytest.mark.whole  # Ray takes half a minute to start and end
def test_points_of_parquet_files_are_evaluated_by_ray(shipped_models: Path, tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(-3, 3, (5000, 2))
    pyarrow.parquet.write_table(pyarrow.table({"x": list(points)}), tmp_path / "points.parquet")
    model, target = shipped_models / "peaks.safetensors", tmp_path / "results"
    options = (str(model), str(tmp_path / "points.parquet"), str(target), "--quantities", "value,gradient")
    assert run("evaluate_with_ray.py", *options, timeout_s=300).endswith("results: 5000 points\n")
    table = pyarrow.parquet.read_table(target)
    found = {name: np.array(table[name].to_pylist()) for name in ("x", "value", "gradient")}
    order, wanted = np.lexsort(found["x"].T), np.lexsort(points.T)
    np.testing.assert_array_equal(found["x"][order], points[wanted])
    value, gradient, _ = oracle.derivatives(load(model).double(), torch.from_numpy(points[wanted]))
    np.testing.assert_allclose(found["value"][order].reshape(-1, 1), value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["gradient"][order].reshape(-1, 2, 1), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.whole  # half a minute of a core; test_pymc.py samples a posterior of one input
def test_posterior_by_nuts_agrees_with_importance_sampling(
    server: LiveServer, shipped_models: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "posterior.png"
    options = ("--url", server.url, "--draws", "100", "--picture", str(picture))
    check_posterior(run("sample_with_pymc.py", *options, timeout_s=600), shipped_models)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def check_posterior(printed: str, models: Path) -> None:
    """Check the mean and the spread of the flow, which a script printed, by importance sampling."""
    match = re.search(r"posterior: ([\d.]+) ± ([\d.]+)", printed)
    assert match is not None
    saved = storage.parse((models / "borehole.safetensors").read_bytes())
    lower, upper = (
        torch.tensor(saved.metadata[key], dtype=torch.float64) for key in ("lower_bounds", "upper_bounds")
    )
    s = 0.4 * torch.randn(20_000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = s[(s.abs() <= 1).all(1)]
    flow = oracle.value(saved.network, (lower + upper) / 2 + (upper - lower) / 2 * s).detach()[:, 0]
    weight = torch.exp(-(((flow - 120) / 10) ** 2) / 2)
    mean = float((weight * flow).sum() / weight.sum())
    spread = float((weight * (flow - mean) ** 2).sum() / weight.sum()) ** 0.5
    assert float(match[1]) == pytest.approx(mean, abs=spread / 2)
    assert 0.5 * spread < float(match[2]) < 1.5 * spread
