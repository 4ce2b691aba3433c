"""The service on a Ray cluster of two nodes: right numbers, and nothing lost when a node dies under load."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import hessquik
from service.client import Client
from tests import oracle
from tests.live import ROOT

# One cluster for the module; warnings are about Ray's own code.
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore")]

CONFIG = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
TOLERANCE = 1e-10
HOST = "127.0.0.1"
CLIENTS = 4
#: Calls that every client makes before the node is killed, and after.
CALLS = 25


@pytest.fixture(name="options", scope="module")
def read_options() -> dict[str, Any]:
    """What the configuration file says of the deployment, but for GPUs: one replica on each node."""
    (deployment,) = CONFIG["applications"][0]["deployments"]
    options = {name: value for name, value in deployment.items() if name not in {"name", "autoscaling_config"}}
    return options | {"num_replicas": 2, "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 1}}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def node() -> dict[str, Any]:
    """A node on the loopback. Ports that are given need not be waited for, which takes long on a busy machine."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    return dict(zip(names, free_ports(len(names)), strict=True)) | {"num_cpus": 2, "node_ip_address": HOST}


class TwoNodes:
    """A cluster on this machine, the service deployed on it, and a node that may be killed."""

    def __init__(self, options: dict[str, Any], models: Path) -> None:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        from service.ray_serve import Replica

        self.cluster = Cluster(initialize_head=True, head_node_args=node() | {"include_dashboard": False})
        self.other = self.cluster.add_node(**node())
        ray.init(
            address=self.cluster.address, _node_ip_address=HOST, logging_level=logging.ERROR, log_to_driver=False
        )
        (port,) = free_ports(1)
        serve.start(http_options={"host": HOST, "port": port, "location": "HeadOnly"})
        serve.run(Replica.options(**options).bind({"models": models, "device": "cpu"}), route_prefix="/")
        self.url = f"http://{HOST}:{port}"

    def kill_other_node(self) -> None:
        """As a power cut would."""
        self.cluster.remove_node(self.other, allow_graceful=False)

    def close(self) -> None:
        """End everything."""
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(name="cluster", scope="module")
def start_cluster(options: dict[str, Any], shipped_models: Path) -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), path))))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's own switch between the loopback and the machine's address; it is read when Ray is imported.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        cluster = TwoNodes(options, shipped_models)
        yield cluster
        cluster.close()


def test_configuration_file_is_what_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    from service.settings import Settings

    schema = ServeDeploySchema.model_validate(CONFIG)
    (deployment,) = schema.applications[0].deployments
    assert deployment.ray_actor_options.num_gpus == 1
    assert deployment.graceful_shutdown_timeout_s > Settings().drain_s
    assert schema.http_options.request_timeout_s > Settings().max_deadline_ms / 1000
    assert deployment.max_ongoing_requests > Settings().max_queue_requests
    assert Settings.model_fields.keys() >= CONFIG["applications"][0]["args"]["settings"].keys()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "models").glob("*.safetensors")))
def test_cluster_answers_every_quantity(name: str, cluster: TwoNodes, shipped_models: Path) -> None:
    network = hessquik.load(shipped_models / f"{name}.safetensors").double()
    with Client(cluster.url) as client:
        model = client.model(name)
        random = np.random.default_rng(8)
        x, v = random.uniform(-1, 1, (5, model.describe()["d"])), random.normal(size=(2, model.describe()["d"]))
        answer = model.evaluate(
            x,
            ["value", "gradient", "hessian", "laplacian", "hessian_diagonal", "jvp", "hvp", "curvature"],
            directions=v,
            dtype="float64",
        )
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


def test_node_killed_under_load_loses_nothing(cluster: TwoNodes, shipped_models: Path) -> None:
    x = np.random.default_rng(9).uniform(-1, 1, (8, 2))
    network = hessquik.load(shipped_models / "peaks.safetensors").double()
    expected = oracle.derivatives(network, torch.from_numpy(x))[2]
    is_killed, answered, errors = threading.Event(), [0] * CLIENTS, []

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
            raise

    threads = [threading.Thread(target=keep_asking, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while min(answered) < CALLS and not errors:
        time.sleep(0.05)
    cluster.kill_other_node()
    is_killed.set()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    assert min(answered) >= 2 * CALLS
