"""Open Inference Protocol: Triton's clients as they come, what KServe's reads, and each malformed body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, aio
from tritonclient.utils import InferenceServerException

from tests.clients.conftest import ADMIN, Zoo

pytestmark = pytest.mark.xdist_group("clients")

TOLERANCE = 1e-12
X = np.random.default_rng(0).uniform(-1, 1, (5, 3))
# More than can be computed within a millisecond.
MANY = np.repeat(X, 4000, 0)
WEIGHTS = np.array([[1.0, -2.0, 0.5, 3.0]])
DIRECTIONS = np.random.default_rng(1).uniform(-1, 1, (5, 2, 3))


@pytest.fixture
def client(zoo: Zoo) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(zoo.url.removeprefix("http://"))
    yield client
    client.close()


def tensor(name: str, array: np.ndarray, is_binary: bool) -> InferInput:
    datatype = {"float64": "FP64", "float32": "FP32", "int32": "INT32"}[array.dtype.name]
    return InferInput(name, list(array.shape), datatype).set_data_from_numpy(array, binary_data=is_binary)


def expected(zoo: Zoo) -> dict[str, np.ndarray]:
    parts = zoo.derivatives("vector", X)
    weighted = np.einsum("nabj,nj->nab", parts["hessian"], np.broadcast_to(WEIGHTS, (5, 4)))
    return parts | {
        "laplacian": np.einsum("naaj->nj", parts["hessian"]),
        "hessian_diagonal": np.einsum("naaj->naj", parts["hessian"]),
        "jvp": np.einsum("naj,nka->nkj", parts["gradient"], DIRECTIONS),
        "hvp": np.einsum("nab,nkb->nka", weighted, DIRECTIONS)[..., None],
    }


@pytest.mark.parametrize("sends_binary", [True, False])
@pytest.mark.parametrize("wants_binary", [True, False])
def test_triton_client_gets_every_quantity(
    zoo: Zoo, client: InferenceServerClient, sends_binary: bool, wants_binary: bool
) -> None:
    for names, extra in (
        (("hessian", "value", "gradient", "laplacian", "hessian_diagonal"), ()),
        (("jvp",), (("directions", DIRECTIONS),)),
        (("hvp",), (("directions", DIRECTIONS), ("weights", np.repeat(WEIGHTS, 5, 0)))),
    ):
        inputs = [tensor(name, array, sends_binary) for name, array in (("inputs", X), *extra)]
        outputs = [InferRequestedOutput(name, binary_data=wants_binary) for name in names]
        result = client.infer("vector", inputs, outputs=outputs, request_id="call-7")
        reply = result.get_response()
        assert [output["name"] for output in reply["outputs"]] == list(names)
        assert (reply["model_name"], reply["model_version"], reply["id"]) == ("vector", "2", "call-7")
        for name in names:
            np.testing.assert_allclose(
                result.as_numpy(name), expected(zoo)[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
            )


def test_binary_and_json_may_be_mixed_and_are_the_same_numbers(client: InferenceServerClient) -> None:
    outputs = [InferRequestedOutput("gradient", binary_data=True), InferRequestedOutput("value", binary_data=False)]
    inputs = [tensor("inputs", X, True), tensor("weights", np.repeat(WEIGHTS, 5, 0), False)]
    mixed = client.infer("vector", inputs, outputs=outputs)
    swapped = [InferRequestedOutput("gradient", binary_data=False), InferRequestedOutput("value", binary_data=True)]
    other = client.infer("vector", inputs[::-1], outputs=swapped)
    for name in ("gradient", "value"):
        assert (mixed.as_numpy(name) == other.as_numpy(name)).all()


def test_no_outputs_means_the_value(zoo: Zoo, client: InferenceServerClient) -> None:
    result = client.infer("vector", [tensor("inputs", X, True)])
    assert [output["name"] for output in result.get_response()["outputs"]] == ["value"]
    np.testing.assert_allclose(result.as_numpy("value"), expected(zoo)["value"], rtol=TOLERANCE)


def test_versions_dtypes_and_the_clients_time_limit(zoo: Zoo, client: InferenceServerClient) -> None:
    first = client.infer("vector", [tensor("inputs", X, True)], model_version="1", timeout=5_000_000)
    np.testing.assert_allclose(first.as_numpy("value"), zoo.derivatives("vector/1", X)["value"], rtol=TOLERANCE)
    rounded = client.infer("vector", [tensor("inputs", X, True)], parameters={"dtype": "float32"})
    assert rounded.as_numpy("value").dtype == np.float32
    whole = client.infer("vector", [tensor("inputs", np.ones((2, 3), np.int32), True)])
    np.testing.assert_allclose(whole.as_numpy("value"), zoo.derivatives("vector", np.ones((2, 3)))["value"])
    with pytest.raises(InferenceServerException, match="deadline"):
        client.infer(
            "vector", [tensor("inputs", MANY, True)], outputs=[InferRequestedOutput("hessian")], timeout=1000
        )


def test_metadata_configuration_and_index(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("vector", "1")
    assert not client.is_model_ready("none")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("vector")
    assert (metadata["name"], metadata["versions"]) == ("vector", ["1", "2"])
    shapes = {part["name"]: part["shape"] for part in metadata["inputs"] + metadata["outputs"]}
    assert shapes == {
        "inputs": [-1, 3],
        "weights": [-1, 4],
        "directions": [-1, -1, 3],
        "value": [-1, 4],
        "gradient": [-1, 3, 4],
        "hessian": [-1, 3, 3, 4],
        "laplacian": [-1, 4],
        "hessian_diagonal": [-1, 3, 4],
        "jvp": [-1, -1, 4],
        "hvp": [-1, -1, 3, 4],
        "curvature": [-1, -1, 4],
        "hessian_packed": [-1, 6, 4],
        "domain_distance": [-1],
    }
    assert {part["datatype"] for part in client.get_model_metadata("single")["outputs"]} == {"FP32"}
    configuration = client.get_model_config("vector", "1")
    assert configuration["max_batch_size"] > 1
    # What the configuration calls dims is the metadata's shape without the rows.
    assert {part["name"]: [-1, *part["dims"]] for part in configuration["input"] + configuration["output"]} == shapes
    index = client.get_model_repository_index()
    assert {"name": "vector", "version": "2", "state": "READY", "reason": ""} in index


def test_statistics_count_requests_points_and_batches(client: InferenceServerClient) -> None:
    before = client.get_inference_statistics("vector", "1")["model_stats"]
    client.infer("vector", [tensor("inputs", X, True)], model_version="1")
    hessian = [InferRequestedOutput("hessian")]
    with pytest.raises(InferenceServerException, match="deadline"):
        client.infer("vector", [tensor("inputs", MANY, True)], model_version="1", outputs=hessian, timeout=1000)
    (after,) = client.get_inference_statistics("vector", "1")["model_stats"]
    assert after["inference_count"] - before[0]["inference_count"] == 5
    assert after["execution_count"] > before[0]["execution_count"]
    for name in ("success", "fail"):
        counts = [one["inference_stats"][name]["count"] for one in (before[0], after)]
        assert counts[1] - counts[0] == 1
    assert after["inference_stats"]["compute_infer"]["ns"] > 0
    assert {one["name"] for one in client.get_inference_statistics()["model_stats"]} >= {"vector", "peaks"}


def test_unload_and_load_need_the_admin_key(client: InferenceServerClient) -> None:
    key = {"Authorization": f"Bearer {ADMIN}"}
    with pytest.raises(InferenceServerException, match="admin key"):
        client.unload_model("single")
    client.unload_model("single", headers=key)
    assert not client.is_model_ready("single")
    states = {one["name"]: one["state"] for one in client.get_model_repository_index()}
    assert (states["single"], states["peaks"]) == ("UNAVAILABLE", "READY")
    with pytest.raises(InferenceServerException, match="own folder"):
        client.load_model("single", headers=key, config="{}")
    client.load_model("single", headers=key)
    assert client.is_model_ready("single")
    with pytest.raises(InferenceServerException, match="holds"):
        client.load_model("none", headers=key)


def test_asyncio_client(zoo: Zoo) -> None:
    async def ask() -> np.ndarray:
        async with aio.InferenceServerClient(zoo.url.removeprefix("http://")) as client:
            assert await client.is_model_ready("vector")
            asked = (client.infer("vector", [tensor("inputs", X[row : row + 1], True)]) for row in range(5))
            results = await asyncio.gather(*asked)
            return np.concatenate([result.as_numpy("value") for result in results])

    np.testing.assert_allclose(asyncio.run(ask()), expected(zoo)["value"], rtol=TOLERANCE)


def test_kserve_finds_the_members_it_reads(zoo: Zoo) -> None:
    assert httpx.get(f"{zoo.url}/v2/health/live").json() == {"live": True}
    assert httpx.get(f"{zoo.url}/v2/health/ready").json() == {"ready": True}
    assert httpx.get(f"{zoo.url}/v2/models/peaks/ready").json() == {"name": "peaks", "ready": True}
    body = {"inputs": [{"name": "inputs", "shape": [1, 2], "datatype": "FP64", "data": [0.1, 0.2]}]}
    reply = httpx.post(f"{zoo.url}/v2/models/peaks/infer", json=body).json()
    assert reply.keys() == {"model_name", "model_version", "outputs"}
    (output,) = reply["outputs"]
    assert output.keys() == {"name", "datatype", "shape", "data"}
    np.testing.assert_allclose(output["data"], zoo.derivatives("peaks", np.array([[0.1, 0.2]]))["value"][0])


def test_raw_body_is_points_in_the_models_type(zoo: Zoo) -> None:
    header = {"Inference-Header-Content-Length": "0"}
    reply = httpx.post(f"{zoo.url}/v2/models/vector/infer", content=X.tobytes(), headers=header)
    assert reply.headers["content-type"] == "application/octet-stream"
    length = int(reply.headers["inference-header-content-length"])
    got = np.frombuffer(reply.content[length:]).reshape(5, 4)
    np.testing.assert_allclose(got, expected(zoo)["value"], rtol=TOLERANCE)


def test_overflow_is_null_in_json_and_bits_in_binary(zoo: Zoo, client: InferenceServerClient) -> None:
    steep = tensor("inputs", np.array([[1e4, 1e4], [0.0, 0.0]]), True)
    outputs = [InferRequestedOutput("value", binary_data=True)]
    binary = client.infer("steep", [steep], outputs=outputs).as_numpy("value")
    assert list(np.isfinite(binary).all(1)) == [False, True]
    body = {"inputs": [{"name": "inputs", "shape": [1, 2], "datatype": "FP64", "data": [1e4, 1e4]}]}
    data = httpx.post(f"{zoo.url}/v2/models/steep/infer", json=body).json()["outputs"][0]["data"]
    assert None in data


ONE = {"name": "inputs", "shape": [1, 3], "datatype": "FP64", "data": [1, 2, 3]}
BINARY = {"name": "inputs", "shape": [1, 3], "datatype": "FP64", "parameters": {"binary_data_size": 24}}
RAW = np.ones(3).tobytes()

REFUSED: dict[str, tuple[object, bytes | None, int, str]] = {
    "no JSON": (b"{", None, 400, "JSON object"),
    "a list": ([], None, 400, "JSON object"),
    "no inputs": ({}, None, 400, "list of tensors"),
    "NaN": (json.dumps({"inputs": [ONE | {"data": [1, 2, float("nan")]}]}).encode(), None, 400, "finite"),
    "wrong name": ({"inputs": [ONE | {"name": "x"}]}, None, 400, "expected the tensors"),
    "twice": ({"inputs": [ONE, ONE]}, None, 400, "each once"),
    "only weights": ({"inputs": [ONE | {"name": "weights"}]}, None, 400, "inputs"),
    "wrong datatype": ({"inputs": [ONE | {"datatype": "BYTES"}]}, None, 400, "datatype"),
    "datatype no string": ({"inputs": [ONE | {"datatype": []}]}, None, 400, "datatype"),
    "wrong shape": ({"inputs": [ONE | {"shape": [3, 1]}]}, None, 400, "points of 3 numbers"),
    "shape and data differ": ({"inputs": [ONE | {"shape": [2, 3]}]}, None, 400, "expected 6 numbers"),
    "negative shape": ({"inputs": [ONE | {"shape": [-1, 3]}]}, None, 400, "whole numbers"),
    "huge shape": ({"inputs": [BINARY | {"shape": [2**62, 2**62]}]}, RAW, 400, "bytes of binary data"),
    "too many bytes": ({"inputs": [BINARY]}, RAW + b"x", 400, "after the last"),
    "too few bytes": ({"inputs": [BINARY]}, RAW[1:], 400, "24 bytes"),
    "size and shape differ": ({"inputs": [BINARY | {"shape": [2, 3]}]}, RAW, 400, "48 bytes"),
    "data and bytes": ({"inputs": [BINARY | {"data": [1, 2, 3]}]}, RAW, 400, "no other data"),
    "shared memory": ({"inputs": [ONE | {"parameters": {"shared_memory_region": "a"}}]}, None, 400, "shared memory"),
    "unknown output": ({"inputs": [ONE], "outputs": [{"name": "y"}]}, None, 400, "names out of value"),
    "output twice": ({"inputs": [ONE], "outputs": [{"name": "value"}] * 2}, None, 400, "each once"),
    "directions missing": ({"inputs": [ONE], "outputs": [{"name": "jvp"}]}, None, 400, "directions"),
    "classification": (
        {"inputs": [ONE], "outputs": [{"name": "value", "parameters": {"classification": 2}}]},
        None,
        400,
        "classification",
    ),
    "id no string": ({"inputs": [ONE], "id": 3}, None, 400, "id"),
    "flag no boolean": ({"inputs": [ONE], "parameters": {"binary_data_output": 1}}, None, 400, "true or false"),
    "wrong dtype": ({"inputs": [ONE], "parameters": {"dtype": "int8"}}, None, 400, "float32 or float64"),
    "wrong timeout": ({"inputs": [ONE], "parameters": {"timeout": -1}}, None, 400, "microseconds"),
}


@pytest.mark.parametrize(("document", "binary", "status", "part"), REFUSED.values(), ids=REFUSED)
def test_malformed_requests_are_refused_with_one_string(
    zoo: Zoo, document: object, binary: bytes | None, status: int, part: str
) -> None:
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    headers = {} if binary is None else {"Inference-Header-Content-Length": str(len(head))}
    reply = httpx.post(f"{zoo.url}/v2/models/vector/infer", content=head + (binary or b""), headers=headers)
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"error"}
    assert part in reply.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/vector/versions/9/infer", 404),
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/none/stats", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/vector/infer", 405),
        ("POST", "/v2/models/vector/infer", 400),
    ],
)
def test_wrong_paths_have_the_dialects_body(zoo: Zoo, method: str, path: str, status: int) -> None:
    headers = {"Inference-Header-Content-Length": "-1"} if status == 400 else {}
    reply = httpx.request(method, zoo.url + path, headers=headers)
    assert reply.status_code == status
    assert isinstance(reply.json()["error"], str)
