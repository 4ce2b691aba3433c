"""Several servers on one machine behind the shipped balancer, and several front ends of one server."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.deployment.balanced import Balancer
from tests.deployment.load import CALLS, WAIT_S, Load, hessian, is_close
from tests.live import LiveServer
from tests.whole import Note

pytestmark = [
    pytest.mark.xdist_group("many devices"),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs Debian's package haproxy"),
]


class Node:
    """Two servers, each with its own worker, behind HAProxy."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.servers = [LiveServer(models) for _ in range(2)]
        for server in self.servers:
            server.wait_until_ready()
        addresses = [f"127.0.0.1:{server.port}" for server in self.servers]
        self.balancer = Balancer(addresses[0], addresses[1], folder / "haproxy")
        self.stack = contextlib.ExitStack()
        self.stack.callback(self.balancer.close)
        for server in self.servers:
            self.stack.callback(server.stop)


@pytest.fixture(name="node")
def start_node(shipped_models: Path, tmp_path: Path) -> Iterator[Node]:
    node = Node(shipped_models, tmp_path)
    with node.stack:
        yield node


@pytest.mark.parametrize(
    "end", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.whole)], ids=["drained", "killed"]
)
def test_server_that_ends_costs_plain_clients_nothing(
    end: signal.Signals, node: Node, shipped_models: Path, note: Note
) -> None:
    """Drained: nothing at all; killed: only answers or marked 503; with none left, marked 503."""
    expected = hessian(shipped_models / "peaks.safetensors")
    load = Load(node.balancer.url, lambda found: is_close(found, expected))
    load.wait(CALLS)
    for server in node.servers:
        assert server.metric("hessquik_rows_total") > 0, "both are asked"
    node.servers[0].process.send_signal(end)
    node.servers[0].process.wait(WAIT_S)
    load.wait(2 * CALLS)
    statuses = load.end()
    note(f"{end.name}: {json.dumps(statuses)}")
    assert statuses.keys() <= ({"200"} if end is signal.SIGTERM else {"200", "503"})
    node.servers[1].process.kill()
    deadline = time.monotonic() + WAIT_S
    while (reply := httpx.get(f"{node.balancer.url}/v1/models")).status_code == 200:
        assert time.monotonic() < deadline
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["status"] == 503


def test_front_end_that_is_killed_costs_clients_its_connections_alone(shipped_models: Path, tmp_path: Path) -> None:
    """One server with two front ends behind the balancer, for a machine on which one front end is the bottleneck."""
    expected = hessian(shipped_models / "peaks.safetensors")
    with LiveServer(shipped_models, settings={"processes": 2}) as server:
        address = f"127.0.0.1:{server.port}"
        with Balancer(address, address, tmp_path / "haproxy") as balancer:
            load = Load(balancer.url, lambda found: is_close(found, expected))
            load.wait(CALLS)
            children = psutil.Process(server.process.pid).children()
            front = next(one for one in children if "service.frontend" in one.cmdline())
            front.kill()
            load.wait(2 * CALLS)
            assert load.end().keys() <= {"200", "503"}
