"""The shipped Ray application on a cluster of two nodes, with the shipped balancer before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml

import hessquik
from hessquik_client import Client
from service.loadtest import build_load, run
from service.settings import Settings
from tests import oracle
from tests.deployment.balanced import Balancer, needs_haproxy
from tests.deployment.load import CALLS, POINTS, WAIT_S, Load, hessian, is_close
from tests.deployment.two_nodes import CPU_GROUPS, FIRST, SECOND, THIRD, TwoNodes, limited
from tests.live import ROOT, LiveServer
from tests.ways import WAYS, Way, expect_same_bits_by, in_process
from tests.whole import Note

pytestmark = [
    pytest.mark.xdist_group("ray"),
    *needs_haproxy,
]

needs_shares = pytest.mark.skipif(
    not os.access(CPU_GROUPS, os.W_OK),
    reason="needs root and cgroup v1, /sys/fs/cgroup/cpu",
)
CONFIG = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
QUANTITIES = ["value", "gradient", "hessian", "laplacian", "hessian_diagonal", "jvp", "hvp", "curvature"]
TOLERANCE = 1e-10


@pytest.fixture(name="models", scope="module")
def copy_models(shipped_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for path in shipped_models.glob("*.safetensors"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(name="cluster", scope="module")
def start_cluster(models: Path) -> Iterator[TwoNodes]:
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        TwoNodes(models, Path(folder)) as cluster,
    ):
        yield cluster


@pytest.fixture(name="balancer", scope="module")
def start_balancer(cluster: TwoNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    addresses = [f"{address}:{cluster.port}" for address in (FIRST, SECOND)]
    with Balancer(addresses[0], addresses[1], tmp_path_factory.mktemp("haproxy") / "log") as balancer:
        yield balancer


@pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is imported
def test_configuration_file_is_what_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(CONFIG)
    (application,) = schema.applications
    (deployment,) = application.deployments
    assert deployment.ray_actor_options.num_gpus == 1
    assert deployment.max_replicas_per_node == 1, "the servers of a node would want the same port"
    assert deployment.graceful_shutdown_timeout_s > Settings().drain_s
    assert schema.proxy_location == "Disabled"
    assert Settings.model_fields.keys() >= application.args.keys()
    assert application.args["watch_s"] > 0, "new files of models would need a deployment"


@pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is imported
@pytest.mark.parametrize(
    ("requests", "nodes"),
    [({}, 1), ({"a": 0.0}, 1), ({"a": 64.0}, 1), ({"a": 64.0, "b": 1.0}, 2), ({"a": 999.0}, 16)],
)
def test_requests_in_progress_say_how_many_nodes_are_wanted(requests: dict[str, float], nodes: int) -> None:
    from service.ray_serve import desired_nodes

    context: Any = SimpleNamespace(aggregated_metrics={"requests": requests})
    assert desired_nodes(context)[0] == nodes


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::hessquik_client.OutsideDomainWarning")
@pytest.mark.parametrize("address", [FIRST, SECOND])
def test_each_node_answers_every_quantity(address: str, cluster: TwoNodes, models: Path, note: Note) -> None:
    note(f"two nodes were ready after {cluster.started_s:.0f} s")
    for path in sorted(models.glob("*.safetensors")):
        network = hessquik.load(path).double()
        random = np.random.default_rng(8)
        x, v = random.uniform(-1, 1, (5, network.dim_input())), random.normal(size=(2, network.dim_input()))
        with Client(cluster.url(address)) as client:
            answer = client.model(path.stem).evaluate(x, QUANTITIES, directions=v, dtype="float64")
        f, df, d2f = oracle.derivatives(network, torch.from_numpy(x))
        k = torch.from_numpy(v)
        expected = {
            "value": f,
            "gradient": df,
            "hessian": d2f,
            "laplacian": torch.einsum("nddm->nm", d2f),
            "hessian_diagonal": torch.einsum("nddm->ndm", d2f),
            "jvp": torch.einsum("ndm,kd->nkm", df, k),
            "hvp": torch.einsum("ndem,ke->nkdm", d2f, k),
            "curvature": torch.einsum("ndem,kd,ke->nkm", d2f, k, k),
        }
        for quantity, tensor in expected.items():
            assert oracle.difference(torch.from_numpy(answer[quantity]), tensor) <= TOLERANCE, (path.stem, quantity)


@pytest.mark.whole
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_dialect_and_encoding_gives_the_bits_of_the_engine_in_process(
    way: Way, cluster: TwoNodes, shipped_models: Path
) -> None:
    for address in (FIRST, SECOND):
        with httpx.Client(base_url=cluster.url(address), timeout=30) as client:
            expect_same_bits_by(way, client, 7, in_process(shipped_models))


DATASET = """
import json, sys
import numpy as np, ray, ray.data
from ray.util.state import list_actors
from service.ray_data import evaluate_dataset

address, node, path, points, results = sys.argv[1:]
ray.init(address=address, _node_ip_address=node, logging_level="ERROR", log_to_driver=False)
context = ray.data.DataContext.get_current()
context.enable_progress_bars, context.wait_for_min_actors_s = False, 120  # or the first takes all
rows = ray.data.from_numpy(np.load(points)).rename_columns({"data": "x"}).repartition(16)
found = evaluate_dataset(rows, path, ["value", "hessian"], actors=3)
nodes = set()
with open(results, "wb") as file:
    taken = []
    for batch in found.iter_batches(batch_size=None):
        actors = [one for one in list_actors(address=address) if "MapBatches" in one.class_name]
        nodes |= {one.node_id for one in actors if one.node_id}
        taken.append(batch)
    np.savez(file, **{name: np.concatenate([batch[name] for batch in taken]) for name in taken[0]})
print(len(nodes))
"""


@pytest.mark.whole
@pytest.mark.timeout(600)
def test_a_dataset_is_evaluated_on_both_nodes(cluster: TwoNodes, models: Path, tmp_path: Path) -> None:
    """Each node has two free CPUs, and three processes evaluate."""
    path = models / "peaks.safetensors"
    x = np.random.default_rng(3).uniform(-3, 3, (80_000, 2))
    np.save(tmp_path / "points.npy", x)
    arguments = [cluster.address, FIRST, path, tmp_path / "points.npy", tmp_path / "results.npz"]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DATASET, *map(str, arguments)],
        env=cluster.environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == "2", "both nodes had actors"
    found = np.load(tmp_path / "results.npz")
    order, wanted = np.lexsort(found["x"].T), np.lexsort(x.T)
    assert np.array_equal(found["x"][order], x[wanted])
    some = slice(None, None, 100)
    value, _, second = oracle.derivatives(hessquik.load(path).double(), torch.from_numpy(x[wanted][some]))
    assert oracle.difference(torch.from_numpy(found["value"][order][some]), value) <= TOLERANCE
    assert oracle.difference(torch.from_numpy(found["hessian"][order][some]), second) <= TOLERANCE


def rate(url: str, seconds: float) -> float:
    """Return how many one-row requests a second 16 connections get answered."""
    facts = httpx.get(f"{url}/v1/models/peaks").raise_for_status().json()
    load = build_load(url, facts, quantities=["hessian"], clients=16, rows=1, seconds=seconds, is_binary=False)
    tally = asyncio.run(run(load))
    assert not tally.errors
    return tally.answers / tally.elapsed_s


@pytest.mark.whole
def test_requests_do_not_pay_for_ray(cluster: TwoNodes, models: Path, note: Note) -> None:
    """Within 1.5 times of a server without Ray, asked in turns; the best of each counts."""
    with LiveServer(models) as plain:
        urls = (cluster.url(FIRST), plain.url)
        rounds = [[rate(url, 0.5) for url in urls] for _ in range(4)]
    placed, alone = (max(rates) for rates in zip(*rounds, strict=True))
    assert cluster.server(cluster.first).nice() == 0, "Ray's own processes have a lower priority"
    note(f"16 connections, one row: {placed:.0f}/s under Ray, {alone:.0f}/s without")
    assert placed > alone / 1.5


def rows(urls: list[str], seconds: float) -> float:
    """Return how many rows a second the servers answer together, asked at the same time."""
    facts = httpx.get(f"{urls[0]}/v1/models/borehole").raise_for_status().json()

    async def work() -> float:
        loads = [
            build_load(url, facts, quantities=["hessian"], clients=2, rows=1000, seconds=seconds, is_binary=True)
            for url in urls
        ]
        tallies = await asyncio.gather(*map(run, loads))
        assert not any(tally.errors for tally in tallies)
        return sum(1000 * tally.answers / tally.elapsed_s for tally in tallies)

    return asyncio.run(work())


@pytest.mark.whole
@needs_shares
def test_a_second_node_doubles_the_rows(cluster: TwoNodes, note: Note) -> None:
    """Each server has a fifth of a core, so that the machine has enough for both and for the load, outside of Ray."""
    urls = [cluster.url(address) for address in (FIRST, SECOND)]
    with limited(cluster.server(cluster.first), 0.2), limited(cluster.server(cluster.second), 0.2):
        rounds = [(rows(urls[:1], 2.0), rows(urls, 2.0)) for _ in range(4)]
    one, two = (max(found) for found in zip(*rounds, strict=True))
    note(f"a fifth of a core each, 1000 rows: {one:.0f} rows/s from one node, {two:.0f} from two")
    assert two > 1.5 * one


def hessian_at(url: str) -> np.ndarray:
    reply = httpx.post(f"{url}/v1/models/peaks/hessian", json={"inputs": POINTS, "dtype": "float64"})
    return np.array(reply.raise_for_status().json()["hessian"])


@pytest.mark.whole
def test_model_is_replaced_under_load_without_a_404(cluster: TwoNodes, balancer: Balancer, models: Path) -> None:
    """A file is replaced; every answer is the old network's or the new one's, and at last both nodes have the new."""
    old = hessian(models / "peaks.safetensors")
    network = hessquik.load(models / "peaks.safetensors")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.01)
    hessquik.save(network, models / "new.partial")
    new = hessian(models / "new.partial")
    assert not is_close(old, new)
    load = Load(balancer.url, lambda found: is_close(found, old) or is_close(found, new))
    load.wait(CALLS)
    (models / "new.partial").rename(models / "peaks.safetensors")
    deadline = time.monotonic() + WAIT_S
    for address in (FIRST, SECOND):
        while True:
            if is_close(hessian_at(cluster.url(address)), new):
                break
            assert time.monotonic() < deadline, "the new network is served"
            time.sleep(0.1)
    load.wait(CALLS)
    assert load.end().keys() == {"200"}


@pytest.mark.whole  # waits a minute for Ray's health check
def test_server_that_is_killed_is_started_again(cluster: TwoNodes, balancer: Balancer, models: Path) -> None:
    expected = hessian(models / "peaks.safetensors")
    load = Load(balancer.url, lambda found: is_close(found, expected))
    load.wait(CALLS)
    server = cluster.server(cluster.second)
    server.kill()
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            if httpx.get(f"{cluster.url(SECOND)}/readyz").status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, cluster.log()
        time.sleep(0.2)
    assert cluster.server(cluster.second).pid != server.pid
    load.wait(CALLS)
    assert load.end().keys() <= {"200", "503"}


@pytest.mark.whole
@pytest.mark.timeout(600)
@needs_shares
def test_a_node_is_added_when_requests_wait(cluster: TwoNodes, note: Note) -> None:
    """The file wants another node above 64 requests in progress on each; 160 wait at each of two slow servers."""
    cluster.add_third()
    urls = [cluster.url(address) for address in (FIRST, SECOND)]
    frame = safetensors.numpy.save({"inputs": np.random.default_rng(0).uniform(0.1, 0.2, (500, 8))})
    headers = {"content-type": "application/x-safetensors", "x-deadline-ms": "90000"}
    began, is_over, deadline = time.monotonic(), threading.Event(), time.monotonic() + 240

    async def ask(client: httpx.AsyncClient, url: str) -> None:
        while not is_over.is_set():
            reply = await client.post(f"{url}/v1/models/borehole/hessian", content=frame, headers=headers)
            assert reply.status_code == 200, reply.text

    async def watch() -> None:
        async with httpx.AsyncClient() as client:
            while not is_over.is_set():
                assert time.monotonic() < deadline, cluster.log()
                await asyncio.sleep(0.5)
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{cluster.url(THIRD)}/readyz")).status_code == 200:
                        is_over.set()

    async def work() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            await asyncio.gather(watch(), *(ask(client, url) for url in urls for _ in range(160)))

    with limited(cluster.server(cluster.first), 0.05), limited(cluster.server(cluster.second), 0.05):
        asyncio.run(work())
    note(f"a third node was ready {time.monotonic() - began:.0f} s after 320 requests began to wait")
    assert hessian_at(cluster.url(THIRD)).shape == (2, 2, 2, 1)


@pytest.mark.whole
def test_node_killed_under_load_costs_plain_clients_nothing(
    cluster: TwoNodes, balancer: Balancer, models: Path, note: Note
) -> None:
    expected = hessian(models / "peaks.safetensors")
    load = Load(balancer.url, lambda found: is_close(found, expected))
    load.wait(CALLS)
    cluster.kill(cluster.second)
    load.wait(2 * CALLS)
    statuses = load.end()
    note(f"a node was killed: {json.dumps(statuses)}")
    assert statuses.keys() <= {"200", "503"}
