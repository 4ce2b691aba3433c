"""Models that are loaded, replaced and unloaded while they are used."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

import hessquik
from hessquik.activations import tanhActivation
from hessquik.networks import fullyConnectedNN
from tests.live import LiveServer, wait_until
from tests.service.seeded import network, value, write_first
from tests.whole import choose

ADMIN = {"Authorization": "Bearer admin"}
SWAPS = choose(48, 200)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Yield a server that the tests of this file share."""
    with LiveServer(write_first(tmp_path_factory.mktemp("models")), settings={"admin_keys": "admin"}) as live:
        yield live


@pytest.fixture
def server(served: LiveServer) -> LiveServer:
    """Return the shared server, with one model of one version, whatever earlier tests left."""
    write_first(served.models)
    reply = httpx.post(f"{served.url}/v1/models/net/load", headers=ADMIN, timeout=60)
    assert reply.status_code == 200, reply.text
    return served


def ask(http: httpx.Client, version: str | None = None) -> tuple[str, float]:
    query = {} if version is None else {"version": version}
    reply = http.post("/v1/models/net/value", params=query, json={"inputs": [1, 1]})
    assert reply.status_code == 200, reply.text
    return reply.json()["version"], reply.json()["value"][0]


def test_swaps_under_load_lose_and_mix_nothing(server: LiveServer) -> None:
    """Versions 1, 2, 3, … come and go; version v always holds the network of seed v."""
    values = {str(version): value(version) for version in range(1, 8)}
    wrong: list[str] = []
    counted, is_over = [0] * 4, threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not is_over.is_set():
                try:
                    version, got = ask(http)
                except AssertionError as error:
                    wrong.append(str(error))
                    continue
                if got != pytest.approx(values[version], rel=1e-12):
                    wrong.append(f"version {version}: {got}")
                counted[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=server.url, timeout=60, headers=ADMIN) as http:
        for swap in range(SWAPS):
            version = 2 + swap % 6
            path = server.models / "net" / f"{version}.safetensors"
            if path.exists():
                path.unlink()
            else:
                hessquik.save(network(version), path)
            reply = http.post("/v1/models/net/load")
            assert reply.status_code == 200, reply.text
    is_over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(counted) > 0


def mapped_bytes(process: psutil.Process) -> int:
    """Return the bytes of models' files that a process has mapped."""
    return sum(part.size for part in process.memory_maps(grouped=False) if part.path.startswith("/memfd:file"))


def test_workers_map_a_large_file(server: LiveServer) -> None:
    """They share its memory. None is held when the model is unloaded, by the workers or the front end."""
    large = fullyConnectedNN([2, 760, 760, 1], tanhActivation(), dtype=torch.float64)
    size = len(hessquik.storage.serialize(large))
    x = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    gradient = hessquik.Evaluator(large)(x, ("gradient",)).gradient
    with httpx.Client(base_url=server.url, timeout=60, headers=ADMIN) as http:
        http.get("/livez")  # connects
        front = psutil.Process(server.process.pid)
        descriptors = front.num_fds()

        def is_held(times: int, pages: int) -> bool:
            mapped = [mapped_bytes(process) for process in server.workers()]
            return mapped == [pages * mmap.PAGESIZE] and front.num_fds() == descriptors + times

        hessquik.save(large, server.models / "large.safetensors")
        assert http.post("/v1/models/large/load").status_code == 200
        assert is_held(1, -(-size // mmap.PAGESIZE))
        server.workers()[0].kill()
        wait_until(lambda: is_held(1, -(-size // mmap.PAGESIZE)))  # by its successor
        reply = http.post("/v1/models/large/gradient", json={"inputs": x.tolist()})
        assert np.allclose(reply.json()["gradient"], gradient, rtol=1e-12, atol=0)
        (server.models / "large.safetensors").unlink()
        assert http.post("/v1/models/large/unload").status_code == 200
        wait_until(lambda: is_held(0, 0))


def test_a_failed_load_leaves_the_old_version_serving(server: LiveServer) -> None:
    (server.models / "net" / "1.safetensors").write_bytes(b"damaged on the way")
    with httpx.Client(base_url=server.url, timeout=60) as http:
        reply = http.post("/v1/models/net/load", headers=ADMIN).json()
        assert reply["loaded"][0]["state"] == "failed"
        assert "safetensors" in reply["loaded"][0]["reason"]
        assert ask(http) == ("1", pytest.approx(value(1), rel=1e-12))


def test_the_highest_version_is_the_default_and_others_can_be_named(server: LiveServer) -> None:
    hessquik.save(network(12), server.models / "net" / "12.safetensors")
    with httpx.Client(base_url=server.url, timeout=60) as http:
        http.post("/v1/models/net/load", headers=ADMIN)
        shown = http.get("/v1/models/net").json()
        assert (shown["versions"], shown["default_version"]) == (["1", "12"], "12")
        assert ask(http) == ("12", pytest.approx(value(12), rel=1e-12))
        assert ask(http, "1") == ("1", pytest.approx(value(1), rel=1e-12))


def test_an_unloaded_model_is_gone_until_it_is_loaded_again(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.post("/v1/models/net/unload", headers=ADMIN).json()["state"] == "unloaded"
        assert http.post("/v1/models/net/value", json={"inputs": [1, 1]}).status_code == 404
        assert http.get("/v1/models").json() == {"models": []}
        assert http.post("/v1/models/net/load", headers=ADMIN).status_code == 200
        assert ask(http)[0] == "1"


def test_a_watched_folder_is_followed_from_the_first_model_on(tmp_path: Path) -> None:
    server = LiveServer(tmp_path, settings={"watch_s": 0.1}).wait_until_listening()
    try:
        server.wait_for_line(f"no model: expected NAME.safetensors in {tmp_path}")
        with httpx.Client(base_url=server.url) as http:
            follow(write_first(tmp_path), http)
    finally:
        server.stop()


def follow(folder: Path, http: httpx.Client) -> None:
    def served(models: dict[str, list[str]]) -> None:
        for _ in range(200):
            listed = {model["name"]: model for model in http.get("/v1/models").json()["models"]}
            if {name: model["versions"] for name, model in listed.items() if model["state"] == "ready"} == models:
                return
            threading.Event().wait(0.05)
        raise AssertionError(listed)

    served({"net": ["1"]})
    hessquik.save(network(2), folder / "net" / "2.safetensors")
    hessquik.save(network(9), folder / "other.safetensors")
    (folder / "net" / "1.safetensors").unlink()
    served({"net": ["2"], "other": ["1"]})
    assert ask(http) == ("2", pytest.approx(value(2), rel=1e-12))
