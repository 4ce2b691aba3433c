"""A server that several files of tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import hessquik
from tests.live import LiveServer
from tests.service.gate import Gate
from tests.service.seeded import network

#: The files that use it run in one process.
FAULTY_GROUP = pytest.mark.xdist_group("faulty")


@pytest.fixture(scope="session")
def faulty_server(shipped_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Yield a server of the models ``peaks`` and ``small``, whose worker fails on demand and looks for work."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(shipped_models / "peaks.safetensors", folder)
    hessquik.save(network(3), folder / "small.safetensors")
    settings = {"batch_timeout_s": 1.5, "max_queue_requests": 20, "spin_us": 10_000, "threads": 2}
    with LiveServer(folder, settings=settings, command=("-m", "tests.service.faulty_serve")) as live:
        yield live


@pytest.fixture(scope="session")
def gate() -> Iterator[Gate]:
    """Yield the gate of the servers that are started from then on."""
    with Gate() as gate:
        yield gate


@pytest.fixture(scope="session")
def gated_server(faulty_server: LiveServer, gate: Gate) -> Iterator[LiveServer]:
    """Yield a server like ``faulty_server`` whose worker may be held at the gate for as long as a test takes."""
    settings = {"batch_timeout_s": 120, "max_queue_requests": 20, "spin_us": 10_000, "threads": 2}
    command = ("-m", "tests.service.faulty_serve")
    with LiveServer(faulty_server.models, settings=settings, command=command) as live:
        yield live


@pytest.fixture
def gated(gated_server: LiveServer) -> LiveServer:
    """Return the server when its worker is ready."""
    return gated_server.wait_until_ready()


@pytest.fixture
def faulty(faulty_server: LiveServer) -> LiveServer:
    """Return the server when its worker is ready, whatever earlier tests did to it."""
    return faulty_server.wait_until_ready()
