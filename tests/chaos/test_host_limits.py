"""A machine that is short of everything: descriptors, disk, memory, the models' folder, and a clock that jumps."""

from __future__ import annotations

import contextlib
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from hessquik_client import Client
from tests.live import LiveServer

#: 64 descriptors; a disk that takes no byte, nor a line of the access log; a day's clock that jumps by a year.
SHORT = """
import random, resource, runpy, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
day, day_ns = time.time, time.time_ns
time.time = lambda: day() + random.choice((-3e7, 0, 3e7))
time.time_ns = lambda: day_ns() + random.choice((-3, 0, 3)) * 10**16
sys.argv[0] = "service"
runpy.run_module("service", run_name="__main__", alter_sys=True)
"""
POINTS = np.random.default_rng(3).uniform(-1, 1, (20_000, 2))
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shipped_models: Path) -> Iterator[LiveServer]:
    """Yield a server with 64 descriptors, a full disk, also for its access log, and a clock that jumps."""
    folder = tmp_path_factory.mktemp("host") / "models"
    folder.mkdir()
    shutil.copy(shipped_models / "peaks.safetensors", folder)
    settings = {"admin_keys": "admin", "watch_s": 0.2, "batch_timeout_s": 30, "access_log": True}
    with (
        Path("/dev/full").open("w", buffering=1) as full,
        LiveServer(folder, settings=settings, command=("-c", SHORT), stdout=full) as live,
    ):
        yield live


def ask(server: LiveServer, points: np.ndarray = POINTS[:50]) -> np.ndarray:
    """Return Hessians, and check the first of many by those of the first alone."""
    with Client(server.url) as client:
        model = client.model("peaks")
        hessians: np.ndarray = model.evaluate(points, ["hessian"]).hessian
        assert np.array_equal(hessians[:5], model.evaluate(points[:5], ["hessian"]).hessian)
    return hessians


def until(server: LiveServer, limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not server.is_ready():
        assert time.monotonic() < end_s, "\n".join(server.log[-20:])
        time.sleep(0.1)


def test_it_answers_and_nothing_is_written(server: LiveServer) -> None:
    """Large results cannot come through shared memory, which is a file, and come through the socket."""
    assert ask(server, POINTS).shape == (20_000, 2, 2, 1)


def test_more_connections_than_descriptors_cost_nothing_but_themselves(server: LiveServer) -> None:
    before = ask(server)
    socks = []
    try:
        for _ in range(150):
            with contextlib.suppress(OSError):
                socks.append(socket.create_connection(("127.0.0.1", server.port), 2))
        assert psutil.Process(server.process.pid).num_fds() <= 64
        (worker,) = server.workers()
        worker.kill()  # its successor needs descriptors that are not there
        time.sleep(1.0)
    finally:
        for sock in socks:
            sock.close()
    until(server)
    assert np.array_equal(ask(server), before)


def test_a_worker_without_memory_costs_at_most_a_refusal(server: LiveServer) -> None:
    until(server)
    before, restarts = ask(server, POINTS), server.metric("hessquik_worker_restarts_total")
    (worker,) = server.workers()
    size = worker.memory_info().vms + (1 << 20)
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (size, size))
    body = {"inputs": POINTS.tolist(), "quantities": ["value", "gradient", "hessian"]}
    statuses = [
        httpx.post(f"{server.url}/v1/models/peaks/evaluate", json=body, timeout=60).status_code for _ in range(3)
    ]
    assert set(statuses) <= {200, 503}
    if worker.is_running():
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (-1, -1))
    until(server)
    is_noticed = 503 in statuses or server.metric("hessquik_worker_restarts_total") > restarts
    assert is_noticed, "the control: memory was short"
    assert np.array_equal(ask(server, POINTS), before)


def test_a_folder_that_is_removed_changes_nothing_until_it_is_back(server: LiveServer) -> None:
    until(server)
    before = ask(server)
    away = server.models.with_name("away")
    server.models.rename(away)
    time.sleep(1.0)
    assert server.is_ready()
    assert np.array_equal(ask(server), before)
    refused = httpx.post(f"{server.url}/v1/models/peaks/load", headers=ADMIN, timeout=60)
    assert (refused.status_code, refused.json()["code"]) == (422, "model_refused")
    shutil.copy(away / "peaks.safetensors", away / "other.safetensors")
    away.rename(server.models)
    end_s = time.monotonic() + 30
    while httpx.get(f"{server.url}/v1/models/other").status_code != 200:
        assert time.monotonic() < end_s
        time.sleep(0.1)
    assert np.array_equal(ask(server), before)
