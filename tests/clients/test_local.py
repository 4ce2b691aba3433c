"""The served file, and a model in process that answers with the same bits."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

import hessquik
from hessquik_client import AsyncClient, Client, ClientError, InvalidInput, OutsideDomain, OutsideDomainWarning
from hessquik_client.errors import NotReady, Overloaded, UnexpectedReply
from hessquik_client.for_scipy import Objective
from hessquik_client.messages import Reply, parse_file
from hessquik_client.quantities import DIRECTIONAL, quantities_of
from service.front import Call
from service.http.messages import Budget, Head, Request
from service.repository import ModelFile
from service.routes.models import _send_file
from service.settings import Settings
from tests.clients.conftest import KEY, Zoo
from tests.live import LiveServer
from tests.whole import choose

pytestmark = pytest.mark.xdist_group("clients")

DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def client(zoo: Zoo) -> Iterator[Client]:
    with Client(zoo.url) as client:
        yield client


def test_the_served_file_comes_with_its_digest_and_version(zoo: Zoo) -> None:
    for version in ("1", "2", ""):
        query = f"?version={version}" if version else ""
        reply = httpx.get(f"{zoo.url}/v1/models/vector/file{query}")
        digest = hashlib.sha256(reply.content).digest()
        assert reply.status_code == 200
        assert reply.headers["x-model-version"] == (version or "2")
        assert reply.headers["repr-digest"] == f"sha-256=:{b64encode(digest).decode()}:"
        assert reply.headers["etag"] == f'"{digest.hex()}"'
        described = httpx.get(f"{zoo.url}/v1/models/vector{query}").json()
        assert described["sha256"] == digest.hex()
        assert reply.content == (zoo.server.models / "vector" / f"{version or 2}.safetensors").read_bytes()
    assert httpx.get(f"{zoo.url}/v1/models/none/file").json()["code"] == "model_not_found"
    assert httpx.get(f"{zoo.url}/v1/models/vector/file?version=9").json()["code"] == "version_not_found"
    assert httpx.get(f"{zoo.url}/v1/models/vector/file?what=9").json()["code"] == "invalid_input"
    assert httpx.post(f"{zoo.url}/v1/models/vector/file").json()["code"] == "method_not_allowed"


@pytest.mark.filterwarnings("ignore::hessquik_client.OutsideDomainWarning")
@pytest.mark.parametrize("name", ["vector", "single", "borehole", "trio"])
def test_a_local_model_answers_with_the_same_bits(client: Client, name: str) -> None:
    remote = client.model(name)
    here = remote.local()
    facts = remote.describe()
    d, m, quantities = facts["d"], facts["m"], quantities_of(facts["members"])
    for n, k in ((1, 1), (7, 2), (300, 3)):
        x = DRAW.normal(size=(n, d))
        own = DRAW.normal(size=(n, k, d))
        weights = (None, DRAW.normal(size=m), DRAW.normal(size=(n, m)))
        combinations = list(product(weights, (own, own[0]), (None, "float32", "float64")))
        for weight, directions, dtype in combinations[:: choose(2, 1)]:  # of every other one each occurs
            options = {"weights": weight, "dtype": dtype, "directions": directions}
            there, found = (model.evaluate(x, quantities, **options) for model in (remote, here))
            for quantity in quantities:
                assert found[quantity].dtype == there[quantity].dtype
                assert found[quantity].tobytes() == there[quantity].tobytes(), quantity
        for quantity in quantities:
            arguments = (x[0], own[0]) if quantity in DIRECTIONAL else (x[0],)
            assert (getattr(here, quantity)(*arguments) == getattr(remote, quantity)(*arguments)).all()


def test_large_batches_are_cut_as_for_the_service(client: Client) -> None:
    vector = client.model("vector")
    x, directions = DRAW.normal(size=(66, 3)), DRAW.normal(size=(1100, 3))
    assert (vector.local().hvp(x, directions, progress=True) == vector.hvp(x, directions)).all()


def test_errors_and_warnings_are_those_of_the_service(client: Client) -> None:
    remote = client.model("peaks")
    here = remote.local()
    bad = [[0.0, 1.0], [0.0, float("nan")]]
    for call in (
        lambda model: model.value(bad),
        lambda model: model.value([1.0]),
        lambda model: model.value(np.empty((0, 2))),
        lambda model: model.value([[1.0, 2.0]], weights=[1.0, 2.0]),
        lambda model: model.evaluate([1.0, 2.0], ["hvp"]),
        lambda model: model.value([0.0, 4.5], outside="refuse"),
    ):
        raised = []
        for model in (remote, here):
            with pytest.raises(ClientError) as caught:
                call(model)
            raised.append((type(caught.value), caught.value.detail, caught.value.extra))
        assert raised[0] == raised[1]
        assert raised[0][0] in {InvalidInput, OutsideDomain}
    with pytest.warns(OutsideDomainWarning):
        here.value([0.0, 4.5])
    assert here.describe()["name"] == "peaks"
    assert repr(here) == repr(remote).replace("Model(", "LocalModel(").replace("None", "'1'")


def test_adapters_take_a_local_model(client: Client) -> None:
    peaks = client.model("peaks")
    assert Objective(peaks.local())([0.5, -1.0]) == Objective(peaks)([0.5, -1.0])


def test_the_asynchronous_client_fetches_one_too(zoo: Zoo, client: Client) -> None:
    async def fetch() -> np.ndarray:
        async with AsyncClient(zoo.url) as other:
            return (await other.model("peaks").local()).hessian([0.5, -1.0])

    assert (asyncio.run(fetch()) == client.model("peaks").hessian([0.5, -1.0])).all()


def test_a_damaged_file_is_refused() -> None:
    digest = b64encode(hashlib.sha256(b"right").digest()).decode()
    good = Reply(200, {"repr-digest": f"sha-256=:{digest}:"}, b"right")
    assert parse_file(good) == b"right"
    for reply in (Reply(200, good.headers, b"wrong"), Reply(200, {}, b"right")):
        with pytest.raises(UnexpectedReply, match="SHA-256"):
            parse_file(reply)


def test_without_torch_the_error_says_what_to_install(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("hessquik_client.local"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'hessquik-service\[local\]'"):
        client.model("peaks").local()


def test_local_needs_torch_and_the_client_alone() -> None:
    code = (
        "import sys, hessquik_client.local; print(*{'fastapi', 'orjson', 'pydantic', 'uvicorn'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_keys_and_files_that_changed(guarded: LiveServer) -> None:
    path = guarded.models / "changing.safetensors"
    url = f"{guarded.url}/v1/models/changing/file"
    assert httpx.get(url).status_code == 401
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(url, headers=headers).content == path.read_bytes()
    hessquik.save(hessquik.load(path).double(), path)
    changed = httpx.get(url, headers=headers)
    assert (changed.status_code, changed.json()["code"]) == (503, "not_ready")
    path.unlink()
    assert httpx.get(url, headers=headers).status_code == 503


def test_a_file_is_counted_as_held_before_it_is_read(tmp_path: Path) -> None:
    """Else many requests would have many files in memory before the first is refused."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(bytes(100_000))
    size = path.stat().st_size
    file = ModelFile("large", 1, path, (str(path), 0, size, 0))
    facts = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    served = SimpleNamespace(file=file, facts=facts)
    front: Any = SimpleNamespace(budget=Budget(150_000), core=SimpleNamespace(settings=Settings()))

    async def ask() -> Request:
        request = Request.of(Head("GET", "", b"", {}), lambda *_: True)
        reply = await _send_file(Call(front, request), served)  # type: ignore[arg-type]
        assert b"".join(reply.body) == path.read_bytes()
        return request

    request = asyncio.run(ask())
    assert request.held_bytes == front.budget.held_bytes == size
    path.unlink()  # reading it would be another error
    with pytest.raises(Overloaded):
        asyncio.run(ask())
    front.budget.give(size)
    with pytest.raises(NotReady):
        asyncio.run(ask())
