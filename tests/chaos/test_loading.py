"""Large, many and hostile models are loaded while others are served; expensive rows delay only their callers."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import hessquik
from hessquik.activations import tanhActivation
from hessquik.networks import fullyConnectedNN, resnetNN
from tests.chaos.conftest import Start
from tests.live import LiveServer
from tests.whole import Note

ADMIN = {"Authorization": "Bearer admin"}
#: Of a network that takes seconds to read, prove and try.
LARGE_MIB = 400
#: Longest time for it, with nothing else on the machine.
LARGE_S = 30.0
MODELS = 2000
#: Longest time for each file, with nothing else on the machine.
FILE_S = 0.06
#: What a start takes without models, on two free cores; where all else is slower, so is loading.
USUAL_START_S = 5.0
P99_S = 0.05
#: Inputs of a network whose Hessian takes some 30 billion operations a row.
HEAVY_D = 2048


def save_small(path: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    hessquik.save(fullyConnectedNN([2, 8, 1], tanhActivation(), dtype=torch.float64), path)


def save_large(path: Path, mib: int) -> None:
    """Save a network of a few wide layers with weights of a given size in MiB."""
    width = int((mib * 2**20 / 4 / 4) ** 0.5)
    torch.manual_seed(0)
    hessquik.save(resnetNN(width, 4, act=tanhActivation()), path)


def ask(http: httpx.Client, model: str = "small") -> float:
    began = time.perf_counter()
    reply = http.post(f"/v1/models/{model}/hessian", json={"inputs": [[0.1, 0.2]]})
    assert reply.status_code == 200, reply.text
    return time.perf_counter() - began


def percentile(times: list[float], q: float) -> float:
    return float(np.quantile(times, q))


@pytest.mark.whole
def test_a_large_model_is_loaded_while_others_are_served(start: Start, tmp_path: Path, note: Note) -> None:
    """No worker is replaced, readiness holds, and small requests hardly notice."""
    save_small(tmp_path / "small.safetensors")
    server = start(folder=tmp_path, admin_keys="admin", batch_timeout_s=10, load_timeout_s=300)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        before = [ask(http) for _ in range(1000)]
        save_large(tmp_path / "large.safetensors", LARGE_MIB)
        with ThreadPoolExecutor(1) as threads:
            began = time.perf_counter()
            loading = threads.submit(httpx.post, f"{server.url}/v1/models/large/load", headers=ADMIN, timeout=300)
            times, unready = [], 0
            while not loading.done():
                times.append(ask(http))
                unready += len(times) % 10 == 0 and http.get("/readyz").status_code != 200
            assert loading.result().status_code == 200, loading.result().text
            took_s = time.perf_counter() - began
    note(
        f"{LARGE_MIB} MiB loaded in {took_s:.1f} s; small requests' p99 {1e3 * percentile(times, 0.99):.1f} ms, "
        f"worst {1e3 * max(times):.0f} ms, {1e3 * percentile(before, 0.99):.1f} ms before"
    )
    assert server.metric("hessquik_worker_restarts_total", "admin") == 0
    assert unready == 0
    slower = max(1.0, server.started_s / USUAL_START_S)
    assert took_s <= LARGE_S * slower
    assert percentile(times, 0.99) <= P99_S * slower


@pytest.mark.whole
def test_many_models_are_ready_soon(start: Start, tmp_path: Path, note: Note) -> None:
    """Starting takes time in proportion to the number of files."""
    (tmp_path / "many").mkdir()
    for number in range(MODELS):
        save_small(tmp_path / "many" / f"model{number}.safetensors", number)
    (tmp_path / "one").mkdir()
    save_small(tmp_path / "one" / "model.safetensors")
    one_s = start(folder=tmp_path / "one").started_s
    server = start(folder=tmp_path / "many")
    took_s = server.started_s - one_s
    names = [model["name"] for model in httpx.get(f"{server.url}/v1/models", timeout=60).json()["models"]]
    assert len(names) == MODELS
    note(f"{MODELS} models ready {took_s:.1f} s after a start with one, which takes {one_s:.1f} s")
    assert took_s <= MODELS * FILE_S * max(1.0, one_s / USUAL_START_S)


@pytest.fixture
def heavy(start: Start, tmp_path: Path) -> LiveServer:
    """Return a server of a model whose Hessian of one row exceeds a batch's time limit, and of a small model."""
    save_small(tmp_path / "small.safetensors")
    torch.manual_seed(1)
    network = fullyConnectedNN([HEAVY_D, 1024, 1024, 1], tanhActivation(), dtype=torch.float64)
    hessquik.save(network, tmp_path / "heavy.safetensors")
    evaluate = hessquik.Evaluator(network)
    row_s = min(_time(evaluate) for _ in range(2))
    return start(folder=tmp_path, workers=1, batch_timeout_s=row_s / 4, load_timeout_s=600)


def _time(evaluate: hessquik.Evaluator) -> float:
    began = time.perf_counter()
    evaluate(torch.zeros(1, HEAVY_D, dtype=torch.float64), ("hessian",))
    return time.perf_counter() - began


@pytest.mark.whole
def test_rows_that_are_too_heavy_cost_their_callers_an_error_and_the_service_nothing(
    heavy: LiveServer, note: Note
) -> None:
    body = {"inputs": [[0.1] * HEAVY_D]}
    statuses: list[tuple[int, Any]] = []

    def ask_heavy(_: int) -> None:
        reply = httpx.post(f"{heavy.url}/v1/models/heavy/hessian", json=body, timeout=120)
        statuses.append((reply.status_code, reply.json().get("code")))

    is_over = threading.Event()
    times: list[float] = []

    def keep_asking() -> None:
        with httpx.Client(base_url=heavy.url, timeout=60) as http:
            while not is_over.is_set():
                times.append(ask(http))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask_heavy, range(12)))
    is_over.set()
    asking.join()
    restarts = heavy.metric("hessquik_worker_restarts_total")
    note(f"12 too heavy: {set(statuses)}, {restarts:.0f} workers replaced, {len(times)} others served")
    assert set(statuses) == {(422, "too_expensive")}
    assert restarts == 0
    assert len(times) > 0
    assert heavy.process.poll() is None
