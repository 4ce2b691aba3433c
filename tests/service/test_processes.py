"""``hessquik serve --processes 2``: two front ends that are one service."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import hessquik
from service.supervisor import add_up
from tests.live import LiveServer, wait_until
from tests.service.faulty_worker import HELD
from tests.service.gate import Gate
from tests.service.seeded import network, value, write_first

ADMIN = {"Authorization": "Bearer admin"}
FAULTY = ("-m", "tests.service.faulty_serve")
WAIT_S = 60.0


#: Connections of the test that runs.
OPEN: list[http.client.HTTPConnection] = []


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


class Front:
    """A connection to one front end."""

    def __init__(self, port: int) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.http.connect()
        OPEN.append(self.http)
        self.port = self.http.sock.getsockname()[1]
        self.pid = 0

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        text = None if body is None else json.dumps(body)
        self.http.request(method, path, text, {"Content-Type": "application/json", **(headers or {})})
        reply = self.http.getresponse()
        data = reply.read()
        is_json = "json" in reply.headers["content-type"]
        return reply.status, json.loads(data) if is_json else data.decode()

    def ask(self, point: tuple[float, float] = (1.0, 1.0)) -> tuple[int, Any]:
        return self.call("POST", "/v1/models/net/value", {"inputs": point})


def front_processes(server: LiveServer) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.process.pid).children() if is_front(child)]


def is_front(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, say
        return any("service.frontend" in part for part in process.cmdline())
    return False


def connect(server: LiveServer, count: int = 2) -> list[Front]:
    """Return a connection to each front end: the system chooses, so connections are made until all have one."""
    found: dict[int, Front] = {}
    for _ in range(200):
        front = Front(server.port)
        front.call("GET", "/livez")
        for process in front_processes(server):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(one.raddr and one.raddr[1] == front.port for one in process.net_connections()):
                    front.pid = process.pid
        if front.pid in found:
            front.http.close()
        found.setdefault(front.pid, front)
        if len(found) == count:
            return list(found.values())
    raise AssertionError(f"expected connections to {count} front ends, got {len(found)}")


def start(folder: Path, batch_timeout_s: float) -> LiveServer:
    settings = {"admin_keys": "admin", "processes": 2, "batch_timeout_s": batch_timeout_s}
    return LiveServer(folder, settings=settings, command=FAULTY)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, gate: Gate) -> Iterator[LiveServer]:
    """Yield a server for tests that leave it in working order."""
    with start(write_first(tmp_path_factory.mktemp("models")), 1.5) as live:
        yield live


@pytest.fixture
def server(served: LiveServer) -> LiveServer:
    """Return the shared server, with one model of one version, whatever earlier tests left."""
    write_first(served.models)
    served.wait_until_ready()
    front = Front(served.port)
    for name in {model["name"] for model in front.call("GET", "/v1/models")[1]["models"]} - {"net"}:
        front.call("POST", f"/v1/models/{name}/unload", headers=ADMIN)
    assert front.call("POST", "/v1/models/net/load", headers=ADMIN)[0] == 200
    return served


@pytest.fixture
def folder(server: LiveServer) -> Path:
    """Return the folder that the shared server serves."""
    return server.models


@pytest.fixture
def own(tmp_path: Path, gate: Gate) -> Iterator[LiveServer]:
    """Yield a server for one test, which may end it, and hold its worker for as long as it takes."""
    with start(write_first(tmp_path), 120) as live:
        yield live


def ready(front: Front) -> bool:
    return front.call("GET", "/readyz")[0] == 200


def test_both_send_the_served_file(server: LiveServer, folder: Path) -> None:
    path, moved = folder / "net" / "1.safetensors", folder / "net.safetensors"
    data, fronts = path.read_bytes(), connect(server)

    def files() -> list[tuple[int, bytes]]:
        replies = []
        for front in fronts:
            front.http.request("GET", "/v1/models/net/file")
            reply = front.http.getresponse()
            replies.append((reply.status, reply.read()))
        return replies

    assert files() == [(200, data)] * 2
    path.rename(moved)  # the same bytes, so that nothing is loaded
    try:
        assert fronts[0].call("POST", "/v1/models/net/load", headers=ADMIN)[0] == 200
        assert files() == [(200, data)] * 2
    finally:
        moved.rename(path)


def test_load_unload_and_metrics_act_on_both(server: LiveServer, folder: Path) -> None:
    one, other = connect(server)
    assert one.pid != other.pid
    sample = 'hessquik_requests_total{route="/v1/models/{model}/value",status="200"} '

    def counts() -> list[float]:
        texts = [front.call("GET", "/metrics")[1] for front in (one, other)]
        assert all('hessquik_workers{state="ready"} 1.0' in text for text in texts)
        return [float(text.partition(sample)[2].split("\n")[0] or 0) for text in texts]

    before = counts()
    for front in (one, other):
        status, reply = front.ask()
        assert (status, reply["value"][0]) == (200, pytest.approx(value(1), rel=1e-12))
    for seed in range(2, 8):
        hessquik.save(network(seed), folder / "net" / "1.safetensors")
        status, _ = one.call("POST", "/v1/models/net/load", headers=ADMIN)
        assert status == 200
        for front in (other, one):  # at once, without a wait
            status, reply = front.ask()
            assert (status, reply["value"][0]) == (200, pytest.approx(value(seed), rel=1e-12))
        one, other = other, one
    (folder / "net" / "2.safetensors").write_bytes(b"nonsense")
    status, reply = one.call("POST", "/v1/models/net/load", headers=ADMIN)
    assert (status, reply["code"]) == (422, "model_refused")
    (folder / "net" / "2.safetensors").unlink()
    hessquik.save(network(9), folder / "net" / "2.safetensors")
    assert one.call("POST", "/v1/models/net/load", headers=ADMIN)[0] == 200
    assert one.call("POST", "/v1/models/net/unload?version=2", headers=ADMIN)[0] == 200
    for front in (one, other):
        assert front.ask()[1]["value"][0] == pytest.approx(value(7), rel=1e-12)
    (folder / "net" / "2.safetensors").unlink()
    assert one.call("POST", "/v1/models/other/load", headers=ADMIN)[0] == 404
    assert one.call("POST", "/v1/models/net/unload", headers=ADMIN)[0] == 200
    assert [front.ask()[0] for front in (one, other)] == [404, 404]
    assert other.call("POST", "/v1/models/net/unload", headers=ADMIN)[0] == 404
    assert other.call("POST", "/v1/models/net/load", headers=ADMIN)[0] == 200
    assert [front.ask()[0] for front in (one, other)] == [200, 200]

    assert counts() == [count + 18.0 for count in before]


def test_readiness_is_that_of_the_workers_in_both(server: LiveServer) -> None:
    fronts = connect(server)
    assert all(map(ready, fronts))
    (worker,) = server.workers()
    worker.send_signal(signal.SIGSTOP)
    wait_until(lambda: not any(map(ready, fronts)))
    wait_until(lambda: all(map(ready, fronts)))  # when it was replaced
    assert [front.ask()[0] for front in fronts] == [200, 200]


def test_a_front_end_that_is_killed_is_replaced_and_the_other_serves_on(server: LiveServer, folder: Path) -> None:
    victim, other = connect(server)
    other.call("POST", "/v1/models/net/unload", headers=ADMIN)
    hessquik.save(network(5), folder / "kept.safetensors")
    assert other.call("POST", "/v1/models/kept/load", headers=ADMIN)[0] == 200
    hessquik.save(network(6), folder / "kept.safetensors")  # not loaded: nobody may serve it
    answered: list[int] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            answered.append(other.call("POST", "/v1/models/kept/value", {"inputs": [1.0, 1.0]})[0])

    victim.call("POST", "/v1/models/kept/value", {"inputs": [1.0, 1.0]})
    sample = 'hessquik_model_requests_total{model="kept",status="200"}'
    began_s, before = server.metric("hessquik_start_time_seconds"), server.metric(sample)
    asking = threading.Thread(target=keep_asking)
    asking.start()
    lines = len(server.log)
    psutil.Process(victim.pid).kill()
    wait_until(
        lambda: len(front_processes(server)) == 2 and victim.pid not in [p.pid for p in front_processes(server)]
    )
    is_over.set()
    asking.join()
    assert set(answered) == {200}
    wait_until(lambda: any("the front end serves" in line for line in server.log[lines:]))
    assert server.metric(sample) >= before + len(answered)
    assert server.metric("hessquik_front_restarts_total") > 0
    assert server.metric("hessquik_start_time_seconds") == began_s
    fronts = connect(server)
    assert victim.pid not in [front.pid for front in fronts]
    for front in fronts:
        wait_until(lambda front=front: ready(front))
        status, reply = front.call("POST", "/v1/models/kept/value", {"inputs": [1.0, 1.0]})
        assert (status, reply["value"][0]) == (200, pytest.approx(value(5), rel=1e-12))
        assert front.ask()[0] == 404, "what was unloaded stays so in a new front end"


@pytest.mark.whole
def test_a_front_end_that_hangs_is_replaced(server: LiveServer) -> None:
    """Until then its connections wait, since the system gives it some of the new ones, too."""
    victim, other = connect(server)
    process = psutil.Process(victim.pid)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert any(f"front end {victim.pid} has not answered for" in line for line in server.log)
    assert other.ask()[0] == 200
    wait_until(lambda: len(front_processes(server)) == 2)
    assert [front.ask()[0] for front in connect(server)] == [200, 200]


def test_what_a_killed_front_end_held_is_freed(server: LiveServer, folder: Path, gate: Gate) -> None:
    """A worker forgets a model that was replaced while a front end that is gone used it."""
    restarts = server.metric("hessquik_worker_restarts_total")
    victim, other = connect(server)
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(victim.ask, (HELD, 0.0))
        with gate.held():
            psutil.Process(victim.pid).kill()
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                held.result()
    hessquik.save(network(3), folder / "net" / "1.safetensors")
    assert other.call("POST", "/v1/models/net/load", headers=ADMIN)[0] == 200
    assert other.ask()[1]["value"][0] == pytest.approx(value(3), rel=1e-12)
    assert server.metric("hessquik_worker_restarts_total") == restarts


def test_a_stop_drains_both_and_leaves_nothing_behind(own: LiveServer, gate: Gate) -> None:
    fronts = connect(own)
    children = psutil.Process(own.process.pid).children(recursive=True)
    with ThreadPoolExecutor(3) as threads:
        accepted = [threads.submit(front.ask, (HELD, 1.0)) for front in fronts]
        with gate.held():
            wait_until(lambda: own.metric("hessquik_queue_requests") == 2)
            stopped = threads.submit(own.stop)
            wait_until(lambda: not own.is_listening())
        gate.let_go()
        assert stopped.result() == 0
        assert [one.result()[0] for one in accepted] == [200, 200]
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not [line for line in own.log if " WARNING " in line or " ERROR " in line or "Traceback" in line]


def test_metrics_are_added_up_but_for_what_all_say_alike() -> None:
    one = b'# TYPE a counter\na_total 1\n# TYPE hessquik_workers gauge\nhessquik_workers{state="ready"} 2\n'
    other = b'# TYPE hessquik_workers gauge\nhessquik_workers{state="ready"} 2\n# TYPE a counter\na_total 2\na_x 5\n'
    assert add_up([one, other]).decode().splitlines() == [
        "# TYPE a counter",
        "a_total 3.0",
        "a_x 5.0",
        "# TYPE hessquik_workers gauge",
        'hessquik_workers{state="ready"} 2.0',
    ]
    assert add_up([]) == add_up([b"", add_up([])]) == b""


def test_nothing_outlives_a_supervisor_that_is_killed(server: LiveServer) -> None:
    """Last of the server's tests."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) == 3
    server.workers()[0].send_signal(signal.SIGSTOP)
    server.process.kill()
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert alive == []
