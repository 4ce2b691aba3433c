"""UM-Bridge: the protocol's own client, its errors word by word, and concurrent single points in shared batches."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
import umbridge

from service.app import create_app
from service.settings import Settings
from tests.clients.conftest import Zoo

pytestmark = pytest.mark.xdist_group("clients")

# float64 leaves 1e-16 per operation; the JSON carries every bit.
TOLERANCE = 1e-12
X, SENS, VEC = [0.3, -0.2, 0.5], [1.0, -2.0, 0.5, 3.0], [0.7, 0.1, -1.0]


def test_all_features_agree_with_autodiff(zoo: Zoo) -> None:
    model = umbridge.HTTPModel(zoo.url, "vector")
    expected = {name: part[0] for name, part in zoo.derivatives("vector", np.array([X])).items()}
    assert (model.get_input_sizes(), model.get_output_sizes()) == ([3], [4])
    assert all((model.supports_evaluate(), model.supports_gradient()))
    assert all((model.supports_apply_jacobian(), model.supports_apply_hessian()))
    np.testing.assert_allclose(model([X]), [expected["value"]], rtol=TOLERANCE)
    np.testing.assert_allclose(model.gradient(0, 0, [X], SENS), expected["gradient"] @ SENS, rtol=TOLERANCE)
    np.testing.assert_allclose(model.apply_jacobian(0, 0, [X], VEC), expected["gradient"].T @ VEC, rtol=TOLERANCE)
    hv = np.einsum("abj,j,b->a", expected["hessian"], SENS, VEC)
    np.testing.assert_allclose(model.apply_hessian(0, 0, 0, [X], SENS, VEC), hv, rtol=TOLERANCE)


def test_config_takes_version_and_dtype(zoo: Zoo) -> None:
    model = umbridge.HTTPModel(zoo.url, "vector")
    expected = zoo.derivatives("vector/1", np.array([X]))["value"]
    for version in (1, "1"):
        np.testing.assert_allclose(model([X], {"version": version}), expected, rtol=TOLERANCE)
    rounded = np.array(model([X], {"version": 1, "dtype": "float32"}))
    assert (rounded == rounded.astype(np.float32)).all()
    np.testing.assert_allclose(rounded, expected, rtol=1e-5)


def test_replies_have_exactly_the_protocols_keys(zoo: Zoo) -> None:
    info = httpx.get(f"{zoo.url}/Info")
    assert info.text == '{"protocolVersion":1.0,"models":["borehole","peaks","single","steep","trio","vector"]}'
    bodies = {
        "ModelInfo": {"support": dict.fromkeys(("Evaluate", "Gradient", "ApplyJacobian", "ApplyHessian"), True)},
        "InputSizes": {"inputSizes": [3]},
        "OutputSizes": {"outputSizes": [4]},
    }
    for path, body in bodies.items():
        assert httpx.post(f"{zoo.url}/{path}", json={"name": "vector"}).json() == body
    indices = {"outWrt": 0, "inWrt": 0, "inWrt1": 0, "inWrt2": 0}
    ask = {"name": "vector", "input": [X], "sens": SENS, "vec": VEC, **indices, "config": None}
    for path in ("Evaluate", "Gradient", "ApplyJacobian", "ApplyHessian"):
        # Clients in R and MATLAB send JSON as plain text.
        reply = httpx.post(f"{zoo.url}/{path}", content=json.dumps(ask), headers={"content-type": "text/plain"})
        assert reply.json().keys() == {"output"}, reply.text
    assert httpx.head(zoo.url).status_code < 500


GOOD = {"name": "vector", "input": [X], "outWrt": 0, "inWrt": 0, "inWrt1": 0, "inWrt2": 0, "sens": SENS, "vec": VEC}
WITHOUT = object()

REFUSED: dict[str, tuple[str, dict[str, object] | bytes, str, str]] = {
    "no JSON": ("Evaluate", b"{", "InvalidInput", "JSON object"),
    "a list": ("Evaluate", b"[]", "InvalidInput", "JSON object"),
    "no name": ("ModelInfo", b"{}", "InvalidInput", "name"),
    "unknown model before all else": ("ApplyHessian", b'{"name":"none"}', "ModelNotFound", "served model"),
    "unknown model with wrong config": ("Evaluate", b'{"name":"none","config":3}', "ModelNotFound", "served model"),
    "no input": ("Evaluate", {"input": WITHOUT}, "InvalidInput", "input: expected a list of 1 vector"),
    "two vectors": ("Evaluate", {"input": [X, X]}, "InvalidInput", "1 vector"),
    "too short": ("Evaluate", {"input": [[1, 2]]}, "InvalidInput", "input[0]: expected a list of 3 numbers"),
    "nested": ("Evaluate", {"input": [[X]]}, "InvalidInput", "3 numbers"),
    "empty": ("Evaluate", {"input": [[]]}, "InvalidInput", "3 numbers"),
    "string": ("Evaluate", {"input": [["1", 2, 3]]}, "InvalidInput", "a string"),
    "boolean": ("Evaluate", {"input": [[True, 2, 3]]}, "InvalidInput", "a boolean"),
    "null": ("Evaluate", {"input": [[None, 2, 3]]}, "InvalidInput", "null"),
    "NaN": ("Evaluate", b'{"name":"vector","input":[[NaN,1,2]]}', "InvalidInput", "finite"),
    "1e999": ("Evaluate", b'{"name":"vector","input":[[1e999,1,2]]}', "InvalidInput", "finite"),
    "input before index": ("Gradient", {"input": [], "outWrt": 7}, "InvalidInput", "input"),
    "index from 1": ("Gradient", {"outWrt": 1}, "InvalidInput", "outWrt: expected 0"),
    "negative index": ("ApplyJacobian", {"inWrt": -1}, "InvalidInput", "inWrt: expected 0"),
    "boolean index": ("ApplyJacobian", {"inWrt": False}, "InvalidInput", "inWrt: expected 0"),
    "no index": ("ApplyHessian", {"inWrt2": WITHOUT}, "InvalidInput", "inWrt2: expected 0"),
    "index before sens": ("ApplyHessian", {"inWrt1": 2, "sens": []}, "InvalidInput", "inWrt1"),
    "no sens": ("Gradient", {"sens": WITHOUT}, "InvalidInput", "sens: expected a list"),
    "long sens": ("ApplyHessian", {"sens": [1, 2, 3, 4, 5]}, "InvalidInput", "sens: expected a list of 4 numbers"),
    "short vec": ("ApplyJacobian", {"vec": [1, 2]}, "InvalidInput", "vec: expected a list of 3 numbers"),
    "short vec with Hessian": ("ApplyHessian", {"vec": 1.0}, "InvalidInput", "vec: expected a list of 3 numbers"),
    "unknown version": ("Evaluate", {"config": {"version": 9}}, "InvalidInput", "versions 1, 2"),
    "unknown dtype": ("Evaluate", {"config": {"dtype": "int8"}}, "InvalidInput", "float32 or float64"),
    "unknown setting": (
        "Evaluate",
        {"config": {"level": 1}},
        "InvalidInput",
        "version, dtype and outside at most, got level",
    ),
    "config no object": ("Evaluate", {"config": []}, "InvalidInput", "config"),
}


@pytest.mark.parametrize(("path", "body", "kind", "part"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_400_with_the_protocols_types(
    zoo: Zoo, path: str, body: dict[str, object] | bytes, kind: str, part: str
) -> None:
    if isinstance(body, dict):
        body = json.dumps({key: value for key, value in (GOOD | body).items() if value is not WITHOUT}).encode()
    reply = httpx.post(f"{zoo.url}/{path}", content=body)
    assert reply.status_code == 400, reply.text
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"type", "message"}
    assert error["type"] == kind
    assert part in error["message"]


def test_overflow_is_an_error_and_not_invalid_json(zoo: Zoo) -> None:
    reply = httpx.post(f"{zoo.url}/Evaluate", json={"name": "steep", "input": [[1e4, 1e4]]})
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "InvalidOutput"


def test_wrong_method_keeps_its_status(zoo: Zoo) -> None:
    reply = httpx.get(f"{zoo.url}/Evaluate")
    assert (reply.status_code, reply.json()["error"]["type"]) == (405, "MethodNotAllowed")


def test_keys_are_asked_for_in_the_dialects_words(tmp_path: Path) -> None:
    app = create_app(Settings(models=tmp_path, device="cpu", api_keys=("secret",)))

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            key = {"authorization": "Bearer secret"}
            return [
                await client.post("/Evaluate", json=GOOD),
                await client.get("/v2/models/vector"),
                await client.get("/v1/models"),
                await client.get("/Info", headers=key),
            ]

    umbridge_reply, v2_reply, native_reply, let_in = asyncio.run(ask())
    assert {reply.status_code for reply in (umbridge_reply, v2_reply, native_reply)} == {401}
    assert umbridge_reply.json()["error"]["type"] == "Unauthorized"
    assert isinstance(v2_reply.json()["error"], str)
    assert native_reply.json()["code"] == "unauthorized"
    assert let_in.json() == {"protocolVersion": 1.0, "models": []}


def test_threads_share_batches_and_every_number_is_right(zoo: Zoo) -> None:
    threads, calls = 64, 8
    points = np.random.default_rng(0).uniform(-2, 2, (threads, calls, 3))
    answers = np.full((threads, calls, 4), np.nan)
    model = umbridge.HTTPModel(zoo.url, "vector")
    sample = 'hessquik_batch_requests_{}{{quantities="value"}}'
    before = [zoo.server.metric(sample.format(part)) for part in ("sum", "count")]
    start = threading.Barrier(threads)

    def sample_points(row: int) -> None:
        start.wait()
        for call in range(calls):
            answers[row, call] = model([points[row, call].tolist()])[0]

    workers = [threading.Thread(target=sample_points, args=(row,)) for row in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    requests = zoo.server.metric(sample.format("sum")) - before[0]
    batches = zoo.server.metric(sample.format("count")) - before[1]
    expected = zoo.derivatives("vector", points.reshape(-1, 3))["value"].reshape(answers.shape)
    np.testing.assert_allclose(answers, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert requests == threads * calls
    assert requests / batches > 1, f"{requests} requests in {batches} batches"
