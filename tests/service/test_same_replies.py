"""Each request gets the same reply over a connection and over ASGI."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

import hessquik
from hessquik import activations, layers, networks
from hessquik.networks import NN
from hessquik_client.errors import Overloaded, ServiceError, StartUpError, Unauthorized
from service.app import Application, create_app
from service.http.connection import Limits, Listener
from service.repository import Look
from service.settings import Settings
from service.tracing import Tracer
from tests.raw import Reply, replies
from tests.service.random_requests import Drawn, draw
from tests.whole import Note, choose

REQUESTS = choose(200, 2_000)
#: Fields that say something of the connection, of the moment, or of nothing.
OF_THE_CONNECTION = ("connection", "date", "server")
MODELS = Path(__file__).parent.parent.parent / "models"


def make_models(folder: Path) -> Path:
    """Save models of the sizes that the drawn requests have in mind."""
    torch.manual_seed(0)
    shutil.copy(MODELS / "peaks.safetensors", folder)
    vector = networks.fullyConnectedNN([3, 16, 4], act=activations.antiTanhActivation()).double()
    hessquik.save(vector, folder / "vector.safetensors")
    steep = NN(layers.singleLayer(2, 3, act=activations.expActivation())).double()
    hessquik.save(steep, folder / "steep.safetensors")
    return folder


def as_bytes(request: Drawn) -> bytes:
    fields = {"host": "x", "content-length": str(len(request.body)), **request.headers, "connection": "close"}
    lines = [f"{request.method} {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + request.body


async def over_a_connection(port: int, request: Drawn) -> Reply:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(as_bytes(request))
    data = await reader.read()
    writer.close()
    if request.method == "HEAD":
        data = data.replace(b"content-length", b"x-length")
    (reply,) = replies(data)
    return reply


async def over_asgi(app: Any, request: Drawn) -> Reply:
    """Ask as an ASGI server does, in pieces."""
    path, _, query = request.path.partition("?")
    fields = {"host": "x", "content-length": str(len(request.body)), **request.headers}
    scope = {
        "type": "http",
        "method": request.method,
        "path": path.replace("%2F", "/"),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
    }
    middle = len(request.body) // 2
    pieces = [request.body[middle:], request.body[:middle]]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await app(scope, receive, send)
    start, *bodies = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert not bodies[-1].get("more_body")
    return Reply(start["status"], headers, b"".join(message["body"] for message in bodies))


def comparable(reply: Reply) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return what has to be the same."""
    fields = {name.replace("x-length", "content-length"): value for name, value in reply.headers.items()}
    return reply.status, sorted((k, v) for k, v in fields.items() if k not in OF_THE_CONNECTION), reply.body


@dataclass(frozen=True)
class Served:
    """An application in this process, what runs it, and the spans that it made."""

    app: Application
    port: int
    runner: asyncio.Runner
    spans: InMemorySpanExporter


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = make_models(tmp_path_factory.mktemp("models"))
    settings = Settings(models=folder, device="cpu", workers=1, admin_keys=("admin",), tracing=True)  # type: ignore[arg-type]
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    app = create_app(settings)
    listener = Listener(app.front, Limits(**{name: getattr(settings, name) for name in Limits._fields}))
    state = SimpleNamespace(connections=set(), default_headers=[])

    async def start() -> asyncio.Server:
        loop = asyncio.get_running_loop()
        await app.start()
        return await loop.create_server(lambda: listener.connect(server_state=state), "127.0.0.1", 0)

    with asyncio.Runner() as runner:
        server = runner.run(start())
        yield Served(app, server.sockets[0].getsockname()[1], runner, spans)
        server.close()
        runner.run(app.stop())


@pytest.mark.slow
def test_a_connection_and_asgi_give_the_same_reply(served: Served, note: Note) -> None:
    """And each of both is followed by one span that says how it ended."""
    statuses: Counter[int] = Counter()
    random = Random(21)

    async def run() -> None:
        for number in range(REQUESTS):
            request = draw(random, number)
            one = await over_a_connection(served.port, request)
            other = await over_asgi(served.app, request)
            assert comparable(one) == comparable(other), request
            statuses[one.status] += 1

    served.spans.clear()
    served.runner.run(run())
    note(f"{REQUESTS} requests, by status: {dict(sorted(statuses.items()))}")
    assert statuses[200] > REQUESTS / 3
    assert {400, 404, 405, 406, 415, 422} <= statuses.keys()
    ended = [one.attributes or {} for one in served.spans.get_finished_spans() if one.kind is SpanKind.SERVER]
    assert Counter(one["http.response.status_code"] for one in ended) == {key: 2 * n for key, n in statuses.items()}
    assert set(Counter(one["hessquik.request_id"] for one in ended).values()) == {2}


def refuse_with(error: ServiceError) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise error

    return refuse


@pytest.mark.slow
def test_requests_for_an_evaluation_count_for_their_model_and_no_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every dialect, also those that are invalid, late or refused, be it before the body."""
    core, v2 = served.app.core, "/v2/models/peaks"
    x = {"name": "inputs", "shape": [1, 2], "datatype": "FP64", "data": [0.1, 0.2]}
    point, body = {"name": "peaks", "input": [[0.1, 0.2]]}, {"inputs": {"x": [0.1, 0.2]}}
    derivative = {**body, "jac_inputs": ["x"], "jac_outputs": ["value"]}
    inputs, many = {"inputs": [0.1, 0.2]}, {"inputs": [[0.1, 0.2]] * 20_000}

    def ask(method: str, path: str, document: Any = None, **headers: str) -> int:
        text = b"" if document is None else json.dumps(document).encode()
        fields = {"content-type": "application/json", "authorization": "Bearer admin", **headers}
        return served.runner.run(over_a_connection(served.port, Drawn(method, path, fields, text))).status

    def counted() -> Counter[int]:
        core.metrics.settle()
        totals = core.metrics._request_seconds.by(2, among=lambda labels: labels[1] == "peaks").totals()
        return Counter({status: round(total) for (status,), total in totals.items()})

    before = counted()
    for path in ("/v1/models/peaks", f"{v2}/ready", v2, f"{v2}/config", f"{v2}/stats", "/tesseract/peaks/health"):
        assert ask("GET", path) == 200, path
    for path, document in (
        ("/v1/models/peaks/load", {}),
        ("/v2/repository/models/peaks/load", {}),
        *((f"/{name}", {"name": "peaks"}) for name in ("ModelInfo", "InputSizes", "OutputSizes")),
        ("/tesseract/peaks/abstract_eval", {"inputs": {"x": {"shape": [2], "dtype": "float64"}}}),
    ):
        assert ask("POST", path, document) == 200, path
    with monkeypatch.context() as patch:
        patch.setattr(served.app.front, "_check_key", refuse_with(Unauthorized("expected a key")))
        assert ask("POST", "/v1/models/peaks/value", inputs) == 401
    assert counted() == before, "nor do those without a key"
    for path, document in (
        ("/v1/models/peaks/value", inputs),
        ("/v1/models/peaks/evaluate", {**inputs, "quantities": ["value"]}),
        (f"{v2}/infer", {"inputs": [x]}),
        ("/Evaluate", point),
        ("/tesseract/peaks/apply", body),
        ("/tesseract/peaks/jacobian", derivative),
    ):
        assert ask("POST", path, document) == 200, path
    assert ask("POST", "/v1/models/peaks/value", {"inputs": "no"}) == 422
    assert ask("POST", "/v1/models/peaks/value", many, **{"x-deadline-ms": "1"}) == 504
    assert counted() - before == {200: 6, 422: 1, 504: 1}

    monkeypatch.setattr(core.scheduler.queue, "expect_room", refuse_with(Overloaded("expected room in the queue")))
    for path, document in (
        ("/v1/models/peaks/value", inputs),
        ("/v1/models/peaks/value", many),
        ("/Evaluate", point),
    ):
        assert ask("POST", path, document) == 503, path
    assert (counted() - before)[503] == 3


#: Most Python calls of the front for a small request, most files whose functions run, and the kinds of values made.
MOST_CALLS, MOST_FILES = 70, 8
KINDS = {"Batch", "Call", "Job", "Question", "Reply", "Request"}
COUNTED = 50
ROOT = str(MODELS.parent)


def test_a_small_request_takes_few_steps(served: Served, monkeypatch: pytest.MonkeyPatch, note: Note) -> None:
    """Over one connection, whose head is remembered; what happens less often than once a request is left out."""
    monkeypatch.setattr(served.app.front, "_watchers", [])
    monkeypatch.setattr(served.app.core.links, "spin_s", 0.0)  # polling is a way to wait
    data = as_bytes(Drawn("POST", "/v1/models/peaks/hessian", {"content-type": "application/json"}, POINT))
    data = data.replace(b"close", b"keep-alive")
    calls: Counter[tuple[str, str]] = Counter()
    made: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        is_value = code.co_filename == "<string>"  # of a dataclass or a named tuple
        if event != "call" or not (is_value or code.co_filename.startswith(ROOT)) or code.co_filename == __file__:
            return
        calls[code.co_filename, code.co_qualname] += 1
        if is_value or code.co_name == "__init__":
            first = frame.f_locals[code.co_varnames[0]]
            made[first.__name__ if isinstance(first, type) else type(first).__name__] += 1

    async def run() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        for number in range(2 * COUNTED):
            if number == COUNTED:
                sys.setprofile(count)
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]))
        writer.close()

    try:
        served.runner.run(run())
    finally:
        sys.setprofile(None)
    usual = {key: times for key, times in calls.items() if times >= 0.9 * COUNTED}
    files = sorted({Path(file).stem for file, _ in usual if file != "<string>"})
    kinds = {name for name, times in made.items() if times >= 0.9 * COUNTED}
    total = sum(usual.values()) / COUNTED
    note(f"{total:.1f} calls in {len(files)} files: {', '.join(files)}; made: {', '.join(sorted(kinds))}")
    assert total <= MOST_CALLS
    assert len(files) <= MOST_FILES
    assert kinds == KINDS


POINT = b'{"inputs":[[0.5,0.25],[1,2]]}'
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize("ask", [over_a_connection, over_asgi])
def test_a_span_has_its_parent_its_times_and_its_parts(served: Served, ask: Any) -> None:
    request = Drawn("POST", "/v1/models/peaks/hessian", {"traceparent": f"00-{TRACE}-{PARENT}-01"}, POINT)
    served.spans.clear()
    began_ns = time.time_ns()
    reply = served.runner.run(ask(served.port if ask is over_a_connection else served.app, request))
    over_ns = time.time_ns()
    queue, compute, whole = served.spans.get_finished_spans()
    assert (queue.name, compute.name, whole.name) == ("queue", "compute", "POST /v1/models/{model}/hessian")
    assert whole.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/models/{model}/hessian",
        "http.response.status_code": 200,
        "hessquik.request_id": reply.headers["x-request-id"],
        "hessquik.model": "peaks",
        "hessquik.rows": 2,
    }
    assert whole.context is not None
    assert whole.parent is not None
    assert (f"{whole.context.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE, PARENT)
    for part in (queue, compute):
        assert part.parent is not None
        assert part.parent.span_id == whole.context.span_id
    slack_ns = 5_000_000  # two clocks
    times = [
        began_ns - slack_ns,
        whole.start_time,
        queue.start_time,
        queue.end_time,
        compute.end_time,
        whole.end_time,
    ]
    assert times == sorted(times, key=int)
    assert queue.end_time == compute.start_time
    assert int(whole.end_time or 0) <= over_ns + slack_ns


def test_the_list_of_the_folder_is_read_beside_the_event_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder on a slow disk must not stall other requests."""
    threads: list[threading.Thread] = []

    def scan(root: Path) -> Look:
        threads.append(threading.current_thread())
        return Look([], {}, set())

    monkeypatch.setattr("service.routes.inference_protocol.scan", scan)
    reply = served.runner.run(over_a_connection(served.port, Drawn("POST", "/v2/repository/index", {}, b"")))
    assert (reply.status, {one["name"] for one in json.loads(reply.body)}) == (200, {"peaks", "vector", "steep"})
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_a_watcher_that_fails_costs_no_reply(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of its own request nor of those that were computed in the same batch."""

    class Watcher:
        def ended(self, *_: Any) -> None:
            raise RuntimeError("the collector of spans is broken")

    monkeypatch.setattr(served.app.front, "_watchers", [Watcher()])
    request = Drawn("POST", "/v1/models/peaks/hessian", {}, POINT)

    async def work() -> list[Reply]:
        asked = asyncio.gather(*(over_a_connection(served.port, request) for _ in range(16)))
        return await asyncio.wait_for(asked, 10)

    assert {reply.status for reply in served.runner.run(work())} == {200}
    assert caplog.text.count("could not be logged or traced") == 16


def test_only_a_fault_of_ours_is_an_error_and_a_refusal_has_no_parts(served: Served) -> None:
    served.spans.clear()
    for path, body in (("/v1/models/none/value", POINT), ("/none", b""), ("/v1/models/peaks/value", b"{")):
        served.runner.run(over_a_connection(served.port, Drawn("POST", path, {"traceparent": "x"}, body)))
    spans = served.spans.get_finished_spans()
    assert [one.name for one in spans] == [
        "POST /v1/models/{model}/value",
        "POST unmatched",
        "POST /v1/models/{model}/value",
    ]
    assert all(one.parent is None and one.status.is_unset for one in spans)


def test_tracing_is_off_unless_asked_for_and_then_nothing_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.front.Tracer", None)
    assert create_app(Settings(device="cpu")).front._watchers == []


def test_a_collector_that_is_gone_does_not_hold_up_the_end() -> None:
    """The packages heed no limit: their exporter tries again for ten seconds."""
    ended = threading.Event()

    class Provider(TracerProvider):
        def force_flush(self, timeout_millis: int = 0) -> bool:
            return ended.wait(60)

    began = time.monotonic()
    Tracer(Provider()).close()
    assert time.monotonic() - began < 10
    ended.set()


def test_tracing_without_its_packages_ends_the_start_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartUpError, match=r"pip install 'hessquik-service\[otel\]'"):
        create_app(Settings(device="cpu", tracing=True))
