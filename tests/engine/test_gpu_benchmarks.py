"""The parts of the benchmarks for GPUs that run without one."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu_soak import Soak


def test_soak_compares_with_every_shipped_model() -> None:
    models = Path("models")
    soak = Soak("http://127.0.0.1:9", models, 0.0)
    assert sorted(soak.networks) == sorted(path.stem for path in models.glob("*.safetensors"))
    for exact, lower, upper in soak.networks.values():
        assert lower.shape == upper.shape == (exact.d,)
        value = exact(torch.from_numpy((lower + upper) / 2).unsqueeze(0)).value
        assert value.shape == (1, exact.m)
