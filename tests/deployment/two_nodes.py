"""Runs the service on a Ray cluster of two nodes on this machine, as a process that a test talks to by lines.

It says where the service answers; told ``kill``, it ends the second node as a power cut would and says ``killed``;
at the end of its input it ends everything. A process of its own, since Ray reads its environment when it is imported
and leaves threads behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from typing import Any

import yaml

from tests.live import ROOT

HOST = "127.0.0.1"
CONFIG = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def describe_node() -> dict[str, Any]:
    """A node on the loopback. Ports that are given need not be waited for, which takes long on a busy machine."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    return dict(zip(names, free_ports(len(names)), strict=True)) | {"num_cpus": 2, "node_ip_address": HOST}


def main() -> None:
    """Start, obey, end."""
    # Ray writes to standard output now and then: what the test reads has a way of its own.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's own switch between the loopback and the machine's address.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Else this machine's replica would answer everything, and the one to be killed nothing.
    os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from service.ray_serve import Replica

    # As the configuration file says, but for GPUs and scaling: one replica on each node.
    (deployment,) = CONFIG["applications"][0]["deployments"]
    options = {name: value for name, value in deployment.items() if name not in {"name", "autoscaling_config"}}
    options |= {"num_replicas": 2, "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=describe_node() | {"include_dashboard": False})
    other = cluster.add_node(**describe_node())
    ray.init(address=cluster.address, _node_ip_address=HOST, logging_level=logging.ERROR, log_to_driver=False)
    (port,) = free_ports(1)
    serve.start(http_options={"host": HOST, "port": port, "location": "HeadOnly"})
    serve.run(Replica.options(**options).bind({"models": ROOT / "models", "device": "cpu"}), route_prefix="/")
    replies.write(f"http://{HOST}:{port}\n")
    for line in sys.stdin:
        assert line == "kill\n", line
        cluster.remove_node(other, allow_graceful=False)
        replies.write("killed\n")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
