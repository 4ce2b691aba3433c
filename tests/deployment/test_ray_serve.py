"""The service on a Ray cluster of two nodes: right numbers, and nothing lost when a node dies under load."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml

import hessquik
from service.client import Client
from service.settings import Settings
from tests import oracle
from tests.live import ROOT

pytestmark = pytest.mark.xdist_group("ray")

CONFIG = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
QUANTITIES = ["value", "gradient", "hessian", "laplacian", "hessian_diagonal", "jvp", "hvp", "curvature"]
TOLERANCE = 1e-10
CLIENTS = 4
#: Calls that every client makes before the node is killed, and after.
CALLS = 25
START_S = 150.0


class TwoNodes:
    """The process that runs the cluster, and where the service answers."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.deployment.two_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
        )
        watchdog = threading.Timer(START_S, self._process.kill)
        watchdog.start()
        self.url = self._read()
        watchdog.cancel()
        assert self.url.startswith("http"), log.read_text()[-4000:]

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill_a_node(self) -> None:
        """Kill all processes of a node at once, as a power cut would."""
        assert self._process.stdin is not None
        self._process.stdin.write("kill\n")
        self._process.stdin.flush()
        assert self._read() == "killed"

    def close(self) -> None:
        """End everything."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.stdout.close()
            self._log.close()


@pytest.fixture(name="cluster", scope="module")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    cluster = TwoNodes(tmp_path_factory.mktemp("ray") / "log")
    yield cluster
    cluster.close()


@pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is imported
def test_configuration_file_is_what_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(CONFIG)
    (deployment,) = schema.applications[0].deployments
    assert deployment.ray_actor_options.num_gpus == 1
    assert deployment.graceful_shutdown_timeout_s > Settings().drain_s
    assert schema.http_options.request_timeout_s > Settings().max_deadline_ms / 1000
    assert deployment.max_ongoing_requests > Settings().max_queue_requests
    assert Settings.model_fields.keys() >= CONFIG["applications"][0]["args"]["settings"].keys()


@pytest.mark.filterwarnings("ignore::service.client.OutsideDomainWarning")
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "models").glob("*.safetensors")))
def test_cluster_answers_every_quantity(name: str, cluster: TwoNodes, shipped_models: Path) -> None:
    network = hessquik.load(shipped_models / f"{name}.safetensors").double()
    random = np.random.default_rng(8)
    x, v = random.uniform(-1, 1, (5, network.dim_input())), random.normal(size=(2, network.dim_input()))
    with Client(cluster.url) as client:
        answer = client.model(name).evaluate(x, QUANTITIES, directions=v, dtype="float64")
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
        assert oracle.difference(torch.from_numpy(answer[quantity]), tensor) <= TOLERANCE, quantity


def rows_by_replica(cluster: TwoNodes, x: np.ndarray) -> set[float]:
    """Return the rows that each replica has computed by its own count, after enough calls to reach all of them."""
    with Client(cluster.url) as client, httpx.Client(base_url=cluster.url) as plain:
        # An odd number of calls, so that no two replicas have computed the same.
        for _ in range(41):
            client.model("peaks").value(x)
        texts = [plain.get("/metrics").raise_for_status().text for _ in range(40)]
    return {
        float(match[1]) for text in texts for match in re.finditer(r"^hessquik_rows_total (.+)$", text, re.MULTILINE)
    }


def test_node_killed_under_load_loses_nothing(cluster: TwoNodes, shipped_models: Path) -> None:
    network = hessquik.load(shipped_models / "peaks.safetensors").double()
    x = np.random.default_rng(9).uniform(-1, 1, (8, network.dim_input()))
    expected = oracle.derivatives(network, torch.from_numpy(x))[2]
    is_killed = threading.Event()
    answered, errors = [0] * CLIENTS, []

    def keep_asking(client_index: int) -> None:
        try:
            with Client(cluster.url, deadline_s=60, retries=20) as client:
                peaks, calls_left = client.model("peaks"), CALLS
                while calls_left:
                    calls_left -= is_killed.is_set()
                    hessian = peaks.evaluate(x, ["hessian"], dtype="float64")["hessian"]
                    assert oracle.difference(torch.from_numpy(hessian), expected) <= TOLERANCE
                    answered[client_index] += 1
        except BaseException as error:
            errors.append(error)

    assert len(rows_by_replica(cluster, x)) == 2
    threads = [threading.Thread(target=keep_asking, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while min(answered) < CALLS and not errors:
        time.sleep(0.02)
    cluster.kill_a_node()
    is_killed.set()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert min(answered) >= 2 * CALLS
