"""A server of models of every kind that the dialects and clients meet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import hessquik
from hessquik import activations, layers, networks
from hessquik.networks import NN, Ensemble
from tests.live import LiveServer
from tests.oracle import derivatives

ADMIN = "the-admin-key"
KEY = "the-key"


@dataclass(frozen=True)
class Zoo:
    """A live server, and its networks in process."""

    server: LiveServer
    networks: dict[str, NN | Ensemble]

    @property
    def url(self) -> str:
        return self.server.url

    def derivatives(self, name: str, x: np.ndarray) -> dict[str, np.ndarray]:
        """Return value, gradient and Hessian at (n, d) points by autodiff in float64, with axes as the service's."""
        parts = derivatives(self.networks[name], torch.as_tensor(x, dtype=torch.float64))
        return dict(zip(("value", "gradient", "hessian"), (part.numpy() for part in parts), strict=True))


def build_networks() -> dict[str, NN | Ensemble]:
    """Return networks by name.

    ``vector/1`` and ``/2`` have three inputs and four outputs, ``single`` is float32, ``steep`` overflows, and
    ``trio`` is an ensemble of networks like ``vector``.
    """
    torch.manual_seed(0)

    def vector() -> NN:
        return networks.fullyConnectedNN([3, 16, 16, 4], act=activations.antiTanhActivation()).double()

    steep = NN(layers.singleLayer(2, 3, act=activations.expActivation())).double()
    return {
        "vector/1": vector(),
        "vector/2": vector(),
        "single": networks.fullyConnectedNN([2, 8, 1], act=activations.tanhActivation()),
        "steep": steep,
        "trio": Ensemble(*(vector() for _ in range(3))),
    }


@pytest.fixture(scope="session")
def zoo(shipped_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    """Yield a server for tests that do not change it."""
    folder = tmp_path_factory.mktemp("zoo")
    built = build_networks()
    for name, network in built.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        hessquik.save(network, path)
    for name in ("peaks", "borehole"):
        shutil.copy(shipped_models / f"{name}.safetensors", folder)
        built[name] = hessquik.load(folder / f"{name}.safetensors").double()
    built["vector"] = built["vector/2"]
    with LiveServer(folder, settings={"admin_keys": ADMIN}) as server:
        yield Zoo(server, built)


@pytest.fixture(scope="session")
def guarded(shipped_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Yield a server that asks for :data:`KEY` and refuses points outside; ``changing`` may be changed."""
    folder = tmp_path_factory.mktemp("guarded")
    for name in ("peaks", "changing"):
        shutil.copy(shipped_models / "peaks.safetensors", folder / f"{name}.safetensors")
    with LiveServer(folder, settings={"api_keys": KEY, "outside": "refuse"}) as server:
        yield server
