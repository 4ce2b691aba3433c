"""Several servers on one machine behind the shipped balancer, and several front ends of one of them."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import safetensors.numpy

from hessquik_client import Client, Model
from hessquik_client.for_scipy import bounds
from tests.deployment.balanced import Balancer, needs_haproxy
from tests.deployment.load import CALLS, WAIT_S, Load, hessian, is_close
from tests.live import LiveServer
from tests.whole import Note

pytestmark = [
    pytest.mark.xdist_group("many devices"),
    *needs_haproxy,
]


#: What the shipped configuration can send again.
BUFFER_BYTES = 65_536
#: Plain clients that read a large reply each.
PLAIN = 6


class Node:
    """Two servers, each with its own worker and the second with two front ends, behind HAProxy."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.servers = [LiveServer(models, settings={"processes": processes}) for processes in (1, 2)]
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
def test_servers_and_front_ends_that_end_cost_plain_clients_nothing_but_their_connections(
    end: signal.Signals, node: Node, shipped_models: Path, tmp_path: Path, note: Note
) -> None:
    """Drained: nothing at all; killed: only answers or marked 503; with none left, marked 503.

    The other server has two front ends, for a machine on which one is the bottleneck: one of them is killed, too. It
    stands behind a balancer of its own, which may send what failed there to it again.
    """
    expected = hessian(shipped_models / "peaks.safetensors")
    load = Load(node.balancer.url, lambda found: is_close(found, expected))
    load.wait(CALLS)
    for server in node.servers:
        assert server.metric("hessquik_rows_total") > 0, "both are asked"
    check_large(node, 2_000)
    node.servers[0].process.send_signal(end)
    node.servers[0].process.wait(WAIT_S)
    load.wait(2 * CALLS)
    statuses = load.end()
    note(f"{end.name}: {json.dumps(statuses)}")
    assert statuses.keys() <= ({"200"} if end is signal.SIGTERM else {"200", "503"})
    address = f"127.0.0.1:{node.servers[1].port}"
    with Balancer(address, address, tmp_path / "front-ends") as balancer:
        load = Load(balancer.url, lambda found: is_close(found, expected))
        load.wait(CALLS)
        fronts(node.servers[1])[0].kill()
        load.wait(2 * CALLS)
        assert load.end().keys() <= {"200", "503"}
    ends = [psutil.Process(node.servers[1].process.pid), *fronts(node.servers[1])]
    for process in ends:
        process.kill()
    psutil.wait_procs(ends, WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while (reply := httpx.get(f"{node.balancer.url}/v1/models")).status_code == 200:
        assert time.monotonic() < deadline
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["status"] == 503


class Full:
    """A server that is ready and refuses every request but its probes, unless it has room."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.asked = 0
        self.has_room = False
        full = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                is_probe = self.path == "/readyz"
                full.asked += not is_probe
                self.send_response(200 if is_probe or full.has_room else 503)
                self.send_header("Retry-After", "1")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)


def test_a_refused_request_is_tried_on_the_other_server_and_then_once_more(tmp_path: Path) -> None:
    """Two servers that are full get three times the requests together, and one that has room answers all."""
    with contextlib.ExitStack() as stack:
        one, other = Full(stack), Full(stack)
        url = stack.enter_context(Balancer(one.address, other.address, tmp_path / "haproxy")).url
        client = stack.enter_context(httpx.Client())
        replies = [client.get(f"{url}/v1/models") for _ in range(10)]
        assert [(reply.status_code, reply.headers["retry-after"]) for reply in replies] == [(503, "1")] * 10
        assert one.asked + other.asked == 3 * 10
        assert min(one.asked, other.asked) >= 10, "each is tried for each request"
        other.has_room = True
        assert {client.get(f"{url}/v1/models").status_code for _ in range(10)} == {200}


def fronts(server: LiveServer) -> list[psutil.Process]:
    """Return the front ends of a server."""
    return [one for one in psutil.Process(server.process.pid).children() if "service.frontend" in one.cmdline()]


def points(model: Model, n: int) -> np.ndarray:
    within = bounds(model)
    return np.random.default_rng(5).uniform(within.lb, within.ub, (n, len(within.lb)))


def check_large(node: Node, n: int) -> None:
    """Check that bodies and replies of many buffers' size pass unchanged, as JSON and in binary."""
    with Client(node.balancer.url) as client, Client(node.servers[0].url) as direct:
        model, same = client.model("borehole"), direct.model("borehole")
        x = points(model, n)
        assert model.hessian(x).tobytes() == same.hessian(x).tobytes()
        body = {"inputs": x.tolist()}
        replies = [
            httpx.post(f"{url}/v1/models/borehole/gradient", json=body, timeout=60)
            for url in (node.balancer.url, node.servers[0].url)
        ]
    assert {reply.status_code for reply in replies} == {200}
    assert min(len(reply.request.content) for reply in replies) > BUFFER_BYTES
    assert replies[0].json()["gradient"] == replies[1].json()["gradient"]


@pytest.mark.whole
def test_server_that_is_killed_amid_large_replies_is_noticed(node: Node, note: Note) -> None:
    """Plain clients see that the reply was cut; ours asks again and gets every number."""
    check_large(node, 20_000)
    url = f"{node.balancer.url}/v1/models/borehole/hessian"
    with Client(node.servers[1].url) as direct:
        model = direct.model("borehole")
        x = points(model, 40_000)  # 20 MB of results
        expected = model.hessian(x)
    frame = safetensors.numpy.save({"inputs": x})
    headers = {"content-type": "application/x-safetensors", "accept": "application/x-safetensors"}
    begun, is_killed = threading.Barrier(PLAIN + 1), threading.Event()
    ends: Counter[str] = Counter()

    def read() -> None:
        received = bytearray()
        try:
            with httpx.stream("POST", url, content=frame, headers=headers, timeout=60) as reply:
                if reply.status_code != 200:
                    begun.wait(WAIT_S)
                    ends[f"{reply.status_code}"] += 1
                    return
                chunks = reply.iter_bytes(4096)
                received += next(chunks)
                begun.wait(WAIT_S)
                is_killed.wait(WAIT_S)
                for chunk in chunks:
                    received += chunk
            assert safetensors.numpy.load(bytes(received))["hessian"].tobytes() == expected.tobytes()
            ends["whole"] += 1
        except httpx.RemoteProtocolError:
            ends["cut"] += 1

    with ThreadPoolExecutor(PLAIN + 1) as pool:
        plain = [pool.submit(read) for _ in range(PLAIN)]
        begun.wait(WAIT_S)
        with Client(node.balancer.url, deadline_s=60) as client:
            ours = pool.submit(client.model("borehole").hessian, x)
            time.sleep(0.05)
            node.servers[0].process.kill()
            is_killed.set()
            assert ours.result(WAIT_S).tobytes() == expected.tobytes()
        for one in plain:
            one.result(WAIT_S)
    note(f"killed amid {PLAIN} replies of 20 MB: {json.dumps(ends)}")
    assert ends["cut"] > 0, "the server that was killed had replies left"
    assert ends["whole"] > 0
    assert ends.keys() <= {"cut", "whole"}
