"""The Python client: right numbers, typed errors, retries that are worth it, split batches, and a light import."""

from __future__ import annotations

import asyncio
import copy
import importlib.resources
import importlib.util
import os
import pickle
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import hessquik_client as package
from hessquik_client import AsyncClient, Client, ClientError, messages, parts, steps
from hessquik_client import errors as service_errors
from hessquik_client.errors import BY_CODE, ConnectionLost, DeadlineExceeded, UnexpectedReply
from hessquik_client.messages import Reply, Request
from hessquik_client.quantities import DIRECTIONAL, QUANTITIES
from hessquik_client.steps import Pause, RetryPolicy, Send, exchange
from tests.clients.conftest import ADMIN, Zoo
from tests.fault_proxy import RARE, SHARES, FaultProxy
from tests.unpaused import UnpausedClock
from tests.whole import IS_WHOLE, Note, choose

pytestmark = pytest.mark.xdist_group("clients")

TOLERANCE = 1e-12
X = np.random.default_rng(0).uniform(-1, 1, (7, 3))
WEIGHTS = np.random.default_rng(1).uniform(-1, 1, (7, 4))
DIRECTIONS = np.random.default_rng(2).uniform(-1, 1, (7, 2, 3))


@pytest.fixture(scope="module")
def client(zoo: Zoo) -> Iterator[Client]:
    with Client(zoo.url) as client:
        yield client


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_certificates_are_read_for_https_alone(
    kind: type[Client | AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them takes most of the time in which a client is made."""
    read: list[Any] = []
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda _, *given: read.append(given))
    kind("http://127.0.0.1:9")
    assert read == []
    kind("https://127.0.0.1:9")
    assert len(read) == 1


def test_import_loads_no_server_package() -> None:
    """Neither the server's packages nor those of any adapter."""
    heavy = {"torch", "fastapi", "starlette", "pydantic", "orjson", "uvicorn", "ray"} | {
        "scipy", "jax", "casadi", "cyipopt", "pyomo", "pytensor", "pymc", "openmdao", "pyarrow", "onnx", "sklearn",
    }  # fmt: skip
    assert all(importlib.util.find_spec(name) for name in heavy)
    # httpx imports rich where it is installed.
    code = "import sys; sys.modules['rich'] = None\n"
    code += f"import hessquik_client.client; sys.exit(','.join(sorted({heavy!r} & sys.modules.keys())) or 0)"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    # The check can fail: a module that does need one of them is found out.
    code = code.replace("hessquik_client.client", "service.codecs")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1


def test_exports_are_what_the_package_says() -> None:
    assert sorted(package.__all__) == list(package.__all__)
    assert set(package.__all__) >= {kind.__name__ for kind in BY_CODE.values()}


def test_every_code_of_the_service_has_a_class() -> None:
    codes = {kind.code for kind in _descendants(service_errors.ServiceError) - {UnexpectedReply}}
    # Nobody reads client_gone, and invalid_output is UM-Bridge's.
    assert BY_CODE.keys() == codes - {"client_gone", "invalid_output"}
    # One definition: what the server answers with is what the client raises.
    assert all(getattr(service_errors, kind.__name__) is getattr(package, kind.__name__) for kind in BY_CODE.values())


def _descendants(kind: type) -> set[type]:
    return {kind}.union(*(_descendants(child) for child in kind.__subclasses__()))


def test_quantities_agree_with_autodiff(zoo: Zoo, client: Client) -> None:
    vector = client.model("vector")
    expected = zoo.derivatives("vector", X)
    expected["laplacian"] = np.einsum("naaj->nj", expected["hessian"])
    for name in ("value", "gradient", "hessian", "laplacian"):
        got = getattr(vector, name)(X)
        np.testing.assert_allclose(got, expected[name], rtol=TOLERANCE, atol=TOLERANCE)
        assert (getattr(vector, name)(X[3]) == got[3]).all()
    out = vector.evaluate(X, ["jvp", "hvp", "curvature", "hessian_diagonal"], weights=WEIGHTS, directions=DIRECTIONS)
    hessian = np.einsum("nabj,nj->nab", expected["hessian"], WEIGHTS)
    gradient = np.einsum("naj,nj->na", expected["gradient"], WEIGHTS)
    assert (out.model, out.version) == ("vector", "2")
    np.testing.assert_allclose(out["jvp"][..., 0], np.einsum("na,nka->nk", gradient, DIRECTIONS), atol=TOLERANCE)
    np.testing.assert_allclose(out["hvp"][..., 0], np.einsum("nab,nkb->nka", hessian, DIRECTIONS), atol=TOLERANCE)
    np.testing.assert_allclose(
        out["curvature"][..., 0], np.einsum("nka,nab,nkb->nk", DIRECTIONS, hessian, DIRECTIONS), atol=TOLERANCE
    )
    np.testing.assert_allclose(out["hessian_diagonal"][..., 0], np.einsum("naa->na", hessian), atol=TOLERANCE)


def test_every_quantity_has_a_method(client: Client, zoo: Zoo) -> None:
    trio = client.model("trio")
    options = {"weights": WEIGHTS, "directions": DIRECTIONS}
    for name in QUANTITIES:
        expected = trio.evaluate(X, [name], **options)[name]  # type: ignore[arg-type]
        arguments = (X, DIRECTIONS) if name in DIRECTIONAL else (X,)
        assert (getattr(trio, name)(*arguments, weights=WEIGHTS) == expected).all()

    async def ask() -> dict[str, np.ndarray]:
        async with AsyncClient(zoo.url) as other:
            model = other.model("trio")
            return {
                name: await getattr(model, name)(*((X, DIRECTIONS) if name in DIRECTIONAL else (X,)))
                for name in QUANTITIES
            }

    whole = trio.evaluate(X, QUANTITIES, directions=DIRECTIONS)
    for name, array in asyncio.run(ask()).items():
        np.testing.assert_allclose(array, whole[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_quantity_that_was_not_asked_for_is_an_error() -> None:
    answer = package.Answer("peaks", "1", {"value": np.ones((2, 1)), "hvp": np.ones((2, 5, 2, 1))})
    with pytest.raises(AttributeError, match="hessian: expected a quantity that was asked for: value, hvp"):
        answer.hessian  # noqa: B018
    with pytest.raises(KeyError, match="hessian: expected a quantity that was asked for: value, hvp"):
        answer["hessian"]
    with pytest.raises(AttributeError, match="no attribute 'velocity'"):
        answer.velocity  # noqa: B018
    assert not hasattr(answer, "gradient")
    assert repr(answer) == "Answer(model='peaks', version='1', value=(2, 1), hvp=(2, 5, 2, 1))"
    for same in (copy.copy(answer), copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert (same.value == 1).all()


def test_what_is_shown_of_clients_and_models(zoo: Zoo) -> None:
    with Client(zoo.url, api_key="secret") as client:
        model = client.model("vector", version=2)
        assert repr(client) == f"Client({zoo.url!r})"
        assert repr(model) == f"Model('vector', version='2', url={zoo.url!r})"
        model.describe()
        assert repr(model) == f"Model('vector', version='2', d=3, m=4, dtype=float64, url={zoo.url!r})"
    assert repr(AsyncClient(zoo.url).model("x")) == f"AsyncModel('x', version=None, url={zoo.url!r})"


BAD_SETTINGS = {
    "url": {"url": "127.0.0.1:8000"},
    "api_key": {"api_key": "two\nlines"},
    "deadline_s": {"deadline_s": 0},
    "retries": {"retries": -1},
    "concurrency": {"concurrency": 0},
}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(("name", "settings"), BAD_SETTINGS.items(), ids=BAD_SETTINGS)
def test_settings_that_make_no_sense_are_refused(kind: type, name: str, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=name):
        kind(**{"url": "http://127.0.0.1:9", **settings})


def test_a_bar_needs_rich(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"pip install 'hessquik-service\[progress\]'"):
        client.model("vector").hessian(X, progress=True)
    assert client.model("vector").hessian(X).shape == (7, 3, 3, 4)


def test_options_are_checked(client: Client) -> None:
    with pytest.raises(TypeError, match="expected the options weights, dtype, outside, progress, got weight"):
        client.model("vector").value(X, weight=WEIGHTS)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="float32 or float64, got float16"):
        client.model("vector").value(X, dtype="float16")


def test_any_kind_of_numbers_is_taken(client: Client) -> None:
    vector = client.model("vector", version=1)
    expected = vector.value([0.5, -1.0, 2.0])
    for point in (np.array([0.5, -1, 2]), torch.tensor([0.5, -1, 2], requires_grad=True), (0.5, -1, 2)):
        assert (vector.value(point) == expected).all()
    assert vector.value([1, 2, 3]).shape == (4,)
    assert (vector.value(X[:, ::-1]) == vector.value(X[:, ::-1].copy())).all()
    single = client.model("single")
    assert single.value([1, 2]).dtype == np.float32
    assert single.value([1, 2], dtype=np.float64).dtype == np.float64
    answer = vector.value(X)
    answer += 1  # an answer belongs to the caller


def test_models_are_described(client: Client) -> None:
    assert [model["name"] for model in client.models()] == ["borehole", "peaks", "single", "steep", "trio", "vector"]
    facts = client.model("vector", version=1).describe()
    assert (facts["d"], facts["m"], facts["version"]) == (3, 4, "1")


ERRORS = {
    "model": (lambda c: c.model("none").value([1.0]), "ModelNotFound", 404),
    "name with a slash": (lambda c: c.model("a/../b").value([1.0]), "NotFound", 404),
    "version": (lambda c: c.model("vector", version=9).value([1.0, 2, 3]), "VersionNotFound", 404),
    "width": (lambda c: c.model("vector").value([1.0]), "InvalidInput", 422),
    "not finite": (lambda c: c.model("vector").value([np.nan, 1, 2]), "InvalidInput", 422),
    "no points": (lambda c: c.model("vector").value(np.empty((0, 3))), "InvalidInput", 422),
    "no directions": (lambda c: c.model("vector").evaluate([1, 2, 3], ["hvp"]), "InvalidInput", 422),
    "no admin key": (lambda c: c.unload("single"), "Forbidden", 403),
}


@pytest.mark.parametrize(("call", "name", "status"), ERRORS.values(), ids=ERRORS)
def test_errors_have_types(client: Client, call: object, name: str, status: int) -> None:
    with pytest.raises(ClientError) as caught:
        call(client)  # type: ignore[operator]
    assert (type(caught.value).__name__, caught.value.status) == (name, status)  # type: ignore[attr-defined]
    assert caught.value.request_id  # type: ignore[attr-defined]


def test_invalid_input_names_the_field_and_row(client: Client) -> None:
    points = X.copy()
    points[5, 1] = np.inf
    with pytest.raises(package.InvalidInput) as caught:
        client.model("vector").value(points)
    assert (caught.value.extra["field"], caught.value.extra["row"]) == ("inputs", 5)


def test_nonsense_is_refused_before_it_is_sent(client: Client) -> None:
    vector = client.model("vector")
    with pytest.raises(TypeError, match="a list of names"):
        vector.evaluate(X, "value")
    with pytest.raises(ValueError, match="names out of value"):
        vector.evaluate(X, ["velocity"])
    with pytest.raises(TypeError, match="real numbers"):
        vector.value(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"\(d,\) or \(n, d\)"):
        vector.value(X[None])
    with pytest.raises(ValueError, match="got none"):
        vector.evaluate(X, [])
    with pytest.raises(ValueError, match=r"directions: expected shape \(k, d\) or \(n, k, d\), got \(3,\)"):
        vector.evaluate(X, ["hvp"], directions=[1, 2, 3])
    with pytest.raises(ValueError, match="7 rows"):
        vector.value(X, weights=WEIGHTS[:6])
    with pytest.raises(ValueError, match="http"):
        Client("127.0.0.1:8000")


def test_admin_key_loads_and_unloads(zoo: Zoo) -> None:
    with Client(zoo.url, api_key=ADMIN) as client:
        assert client.unload("single")["state"] == "unloaded"
        with pytest.raises(package.ModelNotFound):
            client.model("single").value([1, 2])
        assert client.load("single")["state"] == "ready"


class Counting(httpx.HTTPTransport):
    """Counts requests by method, and the most that were under way at once."""

    def __init__(self) -> None:
        super().__init__()
        self.methods: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._now = self.most = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.methods[request.method] += 1
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return super().handle_request(request)
        finally:
            with self._lock:
                self._now -= 1


def test_large_batches_are_split_and_joined(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = np.tile(X, (30, 1)), np.tile(WEIGHTS, (30, 1))
    names = ["value", "hessian", "hvp"]

    def evaluate(client: Client, **options: object) -> package.Answer:
        return client.model("vector").evaluate(x, names, weights=weights, directions=DIRECTIONS[0], **options)  # type: ignore[arg-type]

    with Client(zoo.url, transport=(whole := Counting())) as client:
        expected = evaluate(client)
    assert whole.methods == {"GET": 1, "POST": 1}
    monkeypatch.setattr(parts, "PART_BYTES", 4000)
    with Client(zoo.url, transport=(split := Counting()), concurrency=3) as client:
        got = evaluate(client)
    # 8 · (3 + 4) bytes there and 8 · (1 + 9 + 2·3) back make 21 rows of 4,000 bytes.
    assert split.methods["POST"] == 10
    assert split.most <= 3
    for name in names:
        assert (got[name] == expected[name]).all()

    async def evaluate_async() -> package.Answer:
        async with AsyncClient(zoo.url, concurrency=3) as client:
            model = client.model("vector")
            return await model.evaluate(x, names, weights=weights, directions=DIRECTIONS[0])

    got = asyncio.run(evaluate_async())
    for name in names:
        assert (got[name] == expected[name]).all()


#: Points, directions of all or per point, and the limits (rows, directions, body, reply) that have to cut them.
CUTS = {
    "66 points × 1,000": ((66, 1000), False, {}),
    "one point × 5,000": ((1, 5000), False, {}),
    "own directions": ((40, 1000), True, {"rows": 1500, "directions": 300}),
    "small bodies": ((9, 64), True, {"body_bytes": 5000}),
    "small replies": ((9, 64), False, {"reply_bytes": 6000}),
    "one by one": ((3, 2), True, {"rows": 1}),
}


@pytest.mark.parametrize(("sizes", "has_own", "limits"), CUTS.values(), ids=CUTS)
def test_directions_are_split_too(
    zoo: Zoo, sizes: tuple[int, int], has_own: bool, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = sizes
    random = np.random.default_rng(k)
    x = random.uniform(-1, 1, (n, 3))
    directions = random.uniform(-1, 1, (n, k, 3) if has_own else (k, 3))
    along = np.broadcast_to(directions, (n, k, 3))
    derivatives = zoo.derivatives("vector", x)
    expected = {
        "gradient": derivatives["gradient"],
        "jvp": np.einsum("naj,nka->nkj", derivatives["gradient"], along),
        "hvp": np.einsum("nabj,nkb->nkaj", derivatives["hessian"], along),
        "curvature": np.einsum("nka,nabj,nkb->nkj", along, derivatives["hessian"], along, optimize=True),
    }
    real = messages.parse_facts

    def limited(*arguments: object) -> tuple[dict[str, object], messages.Facts]:
        document, facts = real(*arguments)  # type: ignore[arg-type]
        return document, replace(facts, **limits)

    monkeypatch.setattr(steps, "parse_facts", limited)
    sent: list[tuple[int, int, tuple[str, ...]]] = []
    build = messages.build_request

    def noted(model: str, version: str | None, question: messages.Question, facts: messages.Facts) -> Request:
        sent.append((question.rows, question.k, question.quantities))
        request = build(model, version, question, facts)
        assert len(request.body) <= facts.body_bytes
        assert request.most_bytes <= facts.reply_bytes
        assert question.k <= facts.directions
        assert question.rows * question.k <= facts.rows
        return request

    monkeypatch.setattr(steps, "build_request", noted)
    with Client(zoo.url) as client:
        out = client.model("vector").evaluate(x, list(expected), directions=directions)
        for name, array in expected.items():
            np.testing.assert_allclose(out[name], array, rtol=TOLERANCE, atol=TOLERANCE * k)
        if n == 1:
            assert client.model("vector").hvp(x[0], directions).shape == (k, 3, 4)
    # Each direction of each point once; what needs none is asked with the first of them alone.
    whole = [part for part in sent if "gradient" in part[2]]
    assert len(sent) > 1
    assert sum(rows for rows, _, _ in whole) == n
    assert sum(rows * along for rows, along, _ in sent) == n * k * (2 if n == 1 else 1)


def test_a_large_answer_is_in_memory_once(zoo: Zoo) -> None:
    """A product with 1,000 directions at 300 points: 29 MB, which come in parts."""
    random = np.random.default_rng(0)
    x, directions = random.uniform(-1, 1, (300, 3)), random.uniform(-1, 1, (1000, 3))
    with Client(zoo.url) as client:
        model = client.model("vector")
        model.value(x[:2])
        part_bytes = 1 << 20
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "PART_BYTES", part_bytes)
            tracemalloc.start()
            try:
                answer = model.hvp(x, directions)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
    assert answer.nbytes == 300 * 1000 * 3 * 4 * 8
    # The answer, and four parts that are under way, each as pieces, as a body and as arrays.
    assert peak < answer.nbytes + 4 * 4 * part_bytes


def test_one_failing_part_fails_the_batch(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 400)
    points = np.tile(X, (10, 1))
    points[66] = np.nan
    with Client(zoo.url) as client, pytest.raises(package.InvalidInput):
        client.model("vector").value(points)

    async def evaluate() -> None:
        async with AsyncClient(zoo.url) as client:
            await client.model("vector").value(points)

    with pytest.raises(package.InvalidInput):
        asyncio.run(evaluate())


def test_progress_is_drawn_on_request(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 400)
    client.model("vector").evaluate(X, ["hessian"])
    assert capsys.readouterr().out == ""
    client.model("vector").evaluate(X, ["hessian"], progress=True)
    assert "7/7 points" in capsys.readouterr().out
    client.model("vector").hvp(X, DIRECTIONS[0], progress=True)
    assert "14/14 points × directions" in capsys.readouterr().out


def test_async_client_has_the_same_methods(zoo: Zoo, client: Client) -> None:
    async def ask() -> list[np.ndarray]:
        async with AsyncClient(zoo.url, api_key=ADMIN) as other:
            model = other.model("vector")
            assert (await model.describe())["d"] == 3
            assert len(await other.models()) == 6
            assert (await other.unload("single"))["state"] == "unloaded"
            assert (await other.load("single"))["state"] == "ready"
            with pytest.raises(package.ModelNotFound):
                await other.model("none").value([1.0])
            single = [model.value(x) for x in X]
            return [
                np.stack(await asyncio.gather(*single)),
                await model.gradient(X),
                await model.hessian(X),
                await model.laplacian(X),
            ]

    names = ("value", "gradient", "hessian", "laplacian")
    for name, got in zip(names, asyncio.run(ask()), strict=True):
        assert (got == getattr(client.model("vector"), name)(X)).all()


def _run(policy: RetryPolicy, replies: Iterator[Reply | ClientError]) -> tuple[Reply | ClientError, list[float]]:
    """Carry out an exchange without input, output or waiting: what came of it, and its pauses."""
    conversation, outcome, pauses = exchange(Request("GET", "/"), policy), None, []
    while True:
        try:
            step = conversation.send(outcome)
        except StopIteration as end:
            return end.value, pauses
        except ClientError as error:
            return error, pauses
        if isinstance(step, Pause):
            pauses.append(step.seconds)
            outcome = None
        else:
            assert isinstance(step, Send)
            outcome = next(replies)


def reply(status: int, **headers: str) -> Reply:
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, b"{}")


FAILED = Reply(500, {}, b'{"code": "evaluation_failed", "detail": "x", "request_id": "x"}')
RETRIED = {"lost": ConnectionLost("x"), "503": reply(503), "504": reply(504), "proxy's 500": reply(500)}
FINAL = {"500": FAILED, "404": reply(404), "late": DeadlineExceeded("x", status=0)}


@pytest.mark.parametrize("fault", RETRIED.values(), ids=RETRIED)
def test_what_may_pass_is_tried_again_with_growing_jitter(fault: Reply | ClientError) -> None:
    outcome, pauses = _run(RetryPolicy(), iter([fault, fault, fault, reply(200)]))
    assert isinstance(outcome, Reply)
    assert len(pauses) == 3
    assert all(0 <= pause <= 0.05 * 2**k for k, pause in enumerate(pauses))
    outcome, pauses = _run(RetryPolicy(), iter([fault] * 4))
    assert isinstance(outcome, ClientError)


@pytest.mark.parametrize("fault", FINAL.values(), ids=FINAL)
def test_what_will_not_pass_is_not_tried_again(fault: Reply | ClientError) -> None:
    outcome, pauses = _run(RetryPolicy(), iter([fault]))
    assert isinstance(outcome, ClientError)
    assert pauses == []


def test_retry_after_is_honoured_within_the_deadline() -> None:
    _, pauses = _run(RetryPolicy(), iter([reply(503, retry_after="2"), reply(200)]))
    assert 2 <= pauses[0] <= 2.05
    outcome, pauses = _run(RetryPolicy(deadline_s=1.5), iter([reply(503, retry_after="2"), reply(200)]))
    assert isinstance(outcome, ClientError)
    assert pauses == []


def test_an_outage_brings_a_tenth_more_requests_at_most() -> None:
    policy, sent = RetryPolicy(), 0
    for _ in range(1000):
        _, pauses = _run(policy, iter([reply(503)] * 4))
        sent += 1 + len(pauses)
    assert 1000 < sent <= 1000 * 1.1 + 10


def test_deadline_and_key_are_sent(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[httpx.Request] = []
    seconds = count(0.0, 0.01)  # of a machine that is never slow
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: next(seconds)))

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(503, headers={"retry-after": "0"})

    with Client(zoo.url, api_key="key", deadline_s=7, transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(UnexpectedReply):
            client.model("vector").value([1, 2, 3])
        assert len(seen) == 4
        deadlines = [int(request.headers["x-deadline-ms"]) for request in seen]
        assert deadlines == sorted(deadlines, reverse=True)
        assert 6000 < deadlines[-1] <= deadlines[0] <= 7000
        assert seen[0].headers["authorization"] == "Bearer key"


def test_an_answer_to_something_else_is_refused() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b"<html>")

    with Client("http://service", transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(UnexpectedReply, match="status 200"):
            client.model("vector").value([1, 2, 3])
        with pytest.raises(UnexpectedReply):
            client.models()


def test_service_that_is_not_there() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with Client(url, retries=1) as client, pytest.raises(ConnectionLost):
            client.model("peaks").value([0, 0])


def test_deadline_is_kept_and_typed(zoo: Zoo) -> None:
    with Client(zoo.url, deadline_s=0.01) as client:
        model = client.model("vector")
        monopoly = np.zeros((40_000, 3))
        with pytest.raises(DeadlineExceeded):
            model.hessian(monopoly)


def test_a_connection_that_breaks_when_the_time_is_up_is_too_late() -> None:
    conversation = exchange(Request("GET", "/"), RetryPolicy(deadline_s=0.001))
    next(conversation)
    time.sleep(0.002)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.001 s"):
        conversation.send(ConnectionLost("x"))


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_reply_that_the_service_ends_at_the_deadline_is_too_late(kind: type) -> None:
    """The service keeps the same deadline as the client, from when it has read the request."""

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            head = connection.recv(65536).lower()
            if not head:  # the client's time was over before it could send a byte
                return
            deadline_ms = int(head.split(b"x-deadline-ms:")[1].split(b"\r\n")[0])
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
            time.sleep(deadline_ms / 1000)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        served = threads.submit(serve, listener)
        # Not a whole number of milliseconds: rounded down, the service would be first by 0.9 ms.
        url, limits = f"http://127.0.0.1:{listener.getsockname()[1]}", {"deadline_s": 0.3009, "retries": 0}

        def ask() -> None:
            with Client(url, **limits) as client:
                client.models()

        async def ask_async() -> None:
            async with AsyncClient(url, **limits) as client:
                await client.models()

        with pytest.raises(DeadlineExceeded):
            ask() if kind is Client else asyncio.run(ask_async())
        served.result()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_every_call_over_a_bad_network_ends_right_or_typed_and_in_time(zoo: Zoo, kind: type, note: Note) -> None:
    """Delays, drips, resets, truncation, endless replies, 503 storms, nonsense and silence; none is idle."""
    calls = choose(200, 2500)
    deadline_s, slack_s, users = 2.0, 1.0, 8
    points = np.random.default_rng(calls).uniform(-1, 1, (calls, 3))
    with Client(zoo.url) as client:
        expected = client.model("vector").gradient(points)
    outcomes: list[str] = []
    took: list[float] = []

    def judge(row: int, got: object, began: float) -> None:
        took.append(clock.seconds - began)
        if isinstance(got, BaseException):
            outcomes.append(type(got).__name__ if isinstance(got, ClientError) else f"untyped {got!r}")
        else:
            outcomes.append("right" if (got == expected[row]).all() else "wrong")

    with FaultProxy(zoo.server.port, seed=calls) as proxy, UnpausedClock() as clock:
        if kind is Client:
            with Client(proxy.url, deadline_s=deadline_s) as client:
                model = client.model("vector")

                def call(row: int) -> None:
                    began = clock.seconds
                    try:
                        got: object = model.gradient(points[row])
                    except Exception as error:
                        got = error
                    judge(row, got, began)

                with ThreadPoolExecutor(users) as threads:
                    list(threads.map(call, range(calls)))
        else:

            async def call_all() -> None:
                async with AsyncClient(proxy.url, deadline_s=deadline_s) as client:
                    model, rows = client.model("vector"), iter(range(calls))

                    async def use() -> None:
                        for row in rows:
                            began = clock.seconds
                            try:
                                got: object = await model.gradient(points[row])
                            except Exception as error:
                                got = error
                            judge(row, got, began)

                    await asyncio.gather(*(use() for _ in range(users)))

            asyncio.run(call_all())
    tally = Counter(outcomes)
    assert len(outcomes) == calls
    typed = {kind.__name__ for kind in BY_CODE.values()} | {"ConnectionLost", "UnexpectedReply"}
    assert tally.keys() <= {"right"} | typed, tally
    assert tally["right"] > 0.8 * calls
    assert max(took) <= deadline_s + slack_s
    # Rare faults may not have their turn in the short form.
    assert set(proxy.counts) >= set(SHARES) - (set() if IS_WHOLE else RARE), proxy.counts
    summary = ", ".join(f"{count} {outcome}" for outcome, count in tally.most_common())
    note(f"{calls} calls: {summary}; longest {max(took):.2f} s of {deadline_s} s")


def test_py_typed_ships() -> None:
    for package_name in ("hessquik_client", "service"):
        assert (importlib.resources.files(package_name) / "py.typed").is_file()


def test_the_client_beside_a_folder_named_service(tmp_path: Path) -> None:
    """A project may have a package of its own that is named service."""
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "__init__.py").write_text("own = True\n")
    code = "import service, hessquik_client.for_scipy; from hessquik_client import Client; print(service.own)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    run = [sys.executable, "-c", code]
    ended = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_service_client_is_the_same_package() -> None:
    from service.client.errors import InvalidInput

    from service import client as alias
    from service.client import for_scipy

    assert alias is package
    assert InvalidInput is package.InvalidInput
    assert for_scipy is importlib.import_module("hessquik_client.for_scipy")
    assert for_scipy.__name__ == for_scipy.__spec__.name == "hessquik_client.for_scipy"
    with pytest.raises(ModuleNotFoundError, match="hessquik_client"):
        importlib.import_module("service.client.no_such_module")
