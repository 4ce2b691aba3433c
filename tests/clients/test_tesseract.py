"""The Tesseract dialect: the stock client of tesseract-core, its JAX and torch bindings, and refusals in its form."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tesseract_core import Tesseract

from tests.clients.conftest import KEY, Zoo
from tests.live import LiveServer

pytestmark = pytest.mark.xdist_group("clients")

X = np.random.default_rng(8).normal(size=(5, 3))
V = np.random.default_rng(9).normal(size=(5, 3))
C = np.random.default_rng(10).normal(size=(5, 4))
W = np.array([1.0, -2.0, 0.5, 0.25])
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def vector(zoo: Zoo) -> Iterator[Tesseract]:
    with Tesseract.from_url(f"{zoo.url}/tesseract/vector") as tesseract:
        yield tesseract


@pytest.fixture(scope="module")
def truth(zoo: Zoo) -> dict[str, np.ndarray]:
    return zoo.derivatives("vector", X)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_stock_client_finds_what_there_is(vector: Tesseract) -> None:
    assert vector.health() == {"status": "ok"}
    endpoints = {"apply", "jacobian", "jacobian_vector_product", "vector_jacobian_product", "abstract_eval", "health"}
    assert set(vector.available_endpoints) == endpoints
    assert vector.server_capabilities.output_formats == ("json", "json+base64")
    schemas = vector.openapi_schema["components"]["schemas"]
    assert schemas["ApplyInputSchema"]["differentiable_arrays"] == {"x": {"dtype": "float64", "shape": [None, 3]}}
    assert schemas["ApplyOutputSchema"]["differentiable_arrays"] == {
        "value": {"dtype": "float64", "shape": [None, 4]}
    }


def test_the_document_of_a_model_is_whole(vector: Tesseract) -> None:
    document = vector.openapi_schema
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert {"Apply_InputSchema", "Apply_OutputSchema", "TesseractArray"} <= named
    assert named <= document["components"]["schemas"].keys()
    assert "{model}" not in json.dumps(document["paths"])
    for endpoint in ("apply", "jacobian", "jacobian_vector_product", "vector_jacobian_product", "abstract_eval"):
        assert "requestBody" in document["paths"][f"/{endpoint}"]["post"]


@pytest.mark.parametrize("encoding", [None, "json", "json+base64"])
def test_every_endpoint_agrees_with_autodiff(vector: Tesseract, truth: dict[str, np.ndarray], encoding: Any) -> None:
    tesseract = vector if encoding is None else vector.with_encoding(output_format=encoding)
    inputs = {"x": X}
    close(tesseract.apply(inputs)["value"], truth["value"])
    jacobian = tesseract.jacobian(inputs, ["x"], ["value"])["value"]["x"]
    expected = np.zeros((5, 4, 5, 3))
    for row in range(5):
        expected[row, :, row] = truth["gradient"][row].T
    close(jacobian, expected)
    found = tesseract.jacobian_vector_product(inputs, ["x"], ["value"], {"x": V})
    close(found["value"], np.einsum("naj,na->nj", truth["gradient"], V))
    found = tesseract.vector_jacobian_product(inputs, ["x"], ["value"], {"value": C})
    close(found["x"], np.einsum("naj,nj->na", truth["gradient"], C))


def test_one_point_has_no_n_axis(vector: Tesseract, truth: dict[str, np.ndarray]) -> None:
    one = {"x": X[0]}
    close(vector.apply(one)["value"], truth["value"][0])
    close(vector.jacobian(one, ["x"], ["value"])["value"]["x"], truth["gradient"][0].T)
    close(vector.jacobian_vector_product(one, ["x"], ["value"], {"x": V[0]})["value"], V[0] @ truth["gradient"][0])
    close(vector.vector_jacobian_product(one, ["x"], ["value"], {"value": C[0]})["x"], truth["gradient"][0] @ C[0])


def test_apply_has_every_quantity_also_of_weighted_outputs(vector: Tesseract, truth: dict[str, np.ndarray]) -> None:
    asked = {"x": X, "outputs": ["hessian", "laplacian", "gradient"]}
    found = vector.apply(asked)
    assert list(found) == asked["outputs"]
    close(found["hessian"], truth["hessian"])
    close(found["laplacian"], np.einsum("naaj->nj", truth["hessian"]))
    found = vector.apply({**asked, "weights": W})
    close(found["hessian"][..., 0], truth["hessian"] @ W)
    close(found["gradient"][..., 0], truth["gradient"] @ W)
    vjp = vector.vector_jacobian_product({"x": X, "weights": W}, ["x"], ["value"], {"value": np.full((5, 1), 2.0)})
    close(vjp["x"], 2 * truth["gradient"] @ W)
    shapes = vector.abstract_eval(
        {"x": {"shape": X.shape, "dtype": "float64"}, "outputs": ["value", "hessian", "hessian_packed"]}
    )
    assert {name: (tuple(one["shape"]), one["dtype"]) for name, one in shapes.items()} == {
        "value": ((5, 4), "float64"),
        "hessian": ((5, 3, 3, 4), "float64"),
        "hessian_packed": ((5, 6, 4), "float64"),
    }


def test_large_batches_go_in_base64_and_in_lists(zoo: Zoo, vector: Tesseract) -> None:
    x = np.random.default_rng(0).normal(size=(20_000, 3))
    expected = zoo.derivatives("vector", x[:50])["value"]
    found = vector.apply({"x": x})["value"]
    np.testing.assert_allclose(found[:50], expected, rtol=TOLERANCE, atol=TOLERANCE)
    plain = {"object_type": "array", "shape": x.shape, "dtype": "float64"}
    body = {"inputs": {"x": {**plain, "data": {"buffer": x.tolist(), "encoding": "json"}}}}
    reply = httpx.post(f"{zoo.url}/tesseract/vector/apply", json=body, timeout=30)
    assert (np.array(reply.json()["value"]["data"]["buffer"]) == found).all()


def test_the_protocols_own_words_are_kept(zoo: Zoo) -> None:
    """Compared with replies of tesseract-core 1.15's own server."""
    url = f"{zoo.url}/tesseract/peaks"
    array = {"object_type": "array", "shape": [1, 2], "dtype": "float64"}
    body = {"inputs": {"x": {**array, "data": {"buffer": [[0.5, -1.0]], "encoding": "json"}}}}
    for headers, media_type, encoding in (
        ({}, "application/json", "json"),
        ({"accept": "application/json+base64"}, "application/json+base64", "base64"),
        ({"accept": "application/*; gpu_transport=none"}, "application/json", "json"),
    ):
        reply = httpx.post(f"{url}/apply?run_id=one", json=body, headers=headers)
        assert reply.headers["content-type"] == media_type
        value = reply.json()["value"]
        assert value.keys() == {"object_type", "shape", "dtype", "data"}
        assert (value["object_type"], value["shape"], value["dtype"]) == ("array", [1, 1], "float64")
        assert value["data"].keys() == {"buffer", "encoding"}
        assert value["data"]["encoding"] == encoding
    assert httpx.post(f"{url}/apply", json=body, headers={"accept": "text/html"}).status_code == 406


def array(
    buffer: Any, encoding: str = "json", shape: Any = (1, 3), dtype: Any = "float64", **data: Any
) -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype, "data": {"buffer": buffer, "encoding": encoding, **data}}


GOOD = array([[1.0, 2.0, 3.0]])
JVP = {"jvp_inputs": ["x"], "jvp_outputs": ["value"]}
REFUSED: dict[str, tuple[str, Any, list[Any]]] = {
    "no object": ("apply", [1], ["body"]),
    "no inputs": ("apply", {}, ["body", "inputs"]),
    "no x": ("apply", {"inputs": {}}, ["body", "inputs", "x"]),
    "another member": ("apply", {"inputs": {"x": GOOD, "y": 1}}, ["body", "inputs"]),
    "another body": ("apply", {"inputs": {"x": GOOD}, "more": 1}, ["body"]),
    "width": ("apply", {"inputs": {"x": [[1.0, 2.0]]}}, ["body", "inputs", "x"]),
    "not finite": ("apply", {"inputs": {"x": array(b64encode(np.full(3, np.nan)).decode(), "base64")}},
                   ["body", "inputs", "x"]),
    "no base64": ("apply", {"inputs": {"x": array("!!", "base64")}}, ["body", "inputs", "x", "data", "buffer"]),
    "half a number": ("apply", {"inputs": {"x": array("AAAA", "base64")}}, ["body", "inputs", "x", "data", "buffer"]),
    "list for base64": ("apply", {"inputs": {"x": array([1], "base64")}}, ["body", "inputs", "x", "data", "buffer"]),
    "too few": ("apply", {"inputs": {"x": array("AAAAAAAA9D8=", "base64")}}, ["body", "inputs", "x"]),
    "file": ("apply", {"inputs": {"x": array("/etc/passwd:0", "binref")}}, ["body", "inputs", "x", "data"]),
    "device": ("apply", {"inputs": {"x": array("a:b:0:8", "cuda_ipc")}}, ["body", "inputs", "x", "data"]),
    "compression": ("apply", {"inputs": {"x": array("AA==", "base64", compression="lz4")}},
                    ["body", "inputs", "x", "data"]),
    "objects": ("apply", {"inputs": {"x": array("AA==", "base64", dtype="object")}},
                ["body", "inputs", "x", "dtype"]),
    "rows of weights": ("vector_jacobian_product",
                        {"inputs": {"x": GOOD, "weights": [[1.0] * 4] * 2}, "vjp_inputs": ["x"],
                         "vjp_outputs": ["value"], "cotangent_vector": {"value": [[1.0]]}},
                        ["body", "inputs", "weights"]),
    "no point": ("jacobian", {"inputs": {"x": []}, "jac_inputs": ["x"], "jac_outputs": ["value"]},
                 ["body", "inputs", "x"]),
    "shape": ("apply", {"inputs": {"x": array([[1.0]], shape=[-1, 3])}}, ["body", "inputs", "x", "shape"]),
    "huge shape": ("apply", {"inputs": {"x": array([[1.0]], shape=[2**39, 2**39])}}, ["body", "inputs", "x"]),
    "huge shape of nothing": ("apply", {"inputs": {"x": array([], shape=[0, 2**39, 2**39])}},
                              ["body", "inputs", "x"]),
    "huge number": ("abstract_eval", {"inputs": {"x": {"shape": [2**70, 3], "dtype": float("nan")}}},
                    ["body", "inputs", "x", "shape"]),
    "booleans": ("apply", {"inputs": {"x": [[True, 1.0, 2.0]]}}, ["body", "inputs", "x"]),
    "output": ("apply", {"inputs": {"x": GOOD, "outputs": ["hvp"]}}, ["body", "inputs", "outputs"]),
    "spread": ("apply", {"inputs": {"x": GOOD, "outputs": ["value_std"]}}, ["body", "inputs", "outputs"]),
    "unhashable": ("apply", {"inputs": {"x": GOOD, "outputs": [{}]}}, ["body", "inputs", "outputs"]),
    "twice": ("apply", {"inputs": {"x": GOOD, "outputs": ["value", "value"]}}, ["body", "inputs", "outputs"]),
    "weights": ("apply", {"inputs": {"x": GOOD, "weights": [1.0]}}, ["body", "inputs", "weights"]),
    "outside": ("apply", {"inputs": {"x": GOOD, "outside": "perhaps"}}, ["body", "inputs", "outside"]),
    "jac names": ("jacobian", {"inputs": {"x": GOOD}, "jac_inputs": ["y"], "jac_outputs": ["value"]},
                  ["body", "jac_inputs"]),
    "jvp names": ("jacobian_vector_product",
                  {"inputs": {"x": GOOD}, **JVP, "jvp_outputs": [], "tangent_vector": {"x": GOOD}},
                  ["body", "jvp_outputs"]),
    "no tangent": ("jacobian_vector_product", {"inputs": {"x": GOOD}, **JVP}, ["body", "tangent_vector"]),
    "tangent": ("jacobian_vector_product", {"inputs": {"x": GOOD}, **JVP, "tangent_vector": {"x": [1.0, 2.0, 3.0]}},
                ["body", "tangent_vector", "x"]),
    "cotangent": ("vector_jacobian_product",
                  {"inputs": {"x": GOOD}, "vjp_inputs": ["x"], "vjp_outputs": ["value"],
                   "cotangent_vector": {"value": [[1.0]]}},
                  ["body", "cotangent_vector", "value"]),
    "abstract": ("abstract_eval", {"inputs": {"x": {"shape": [7, 2], "dtype": "float64"}}},
                 ["body", "inputs", "x", "shape"]),
}  # fmt: skip


@pytest.mark.parametrize(("endpoint", "body", "place"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_its_place(zoo: Zoo, endpoint: str, body: Any, place: list[Any]) -> None:
    reply = httpx.post(f"{zoo.url}/tesseract/vector/{endpoint}", content=json.dumps(body))
    assert reply.status_code == 422, reply.text
    (fault,) = reply.json()["detail"]
    assert fault.keys() == {"type", "loc", "msg", "input"}
    assert fault["loc"] == place, fault
    assert "expected" in fault["msg"]


def test_narrow_whole_numbers_are_multiplied_without_overflow(zoo: Zoo) -> None:
    def pull(cotangent: Any, weights: Any) -> Any:
        body = {"inputs": {"x": GOOD, "weights": weights}, "vjp_inputs": ["x"], "vjp_outputs": ["value"]}
        body["cotangent_vector"] = {"value": cotangent}
        return httpx.post(f"{zoo.url}/tesseract/vector/vector_jacobian_product", json=body).json()["x"]["data"]

    def narrow(shape: list[int]) -> dict[str, Any]:
        return array(b64encode(bytes([100] * max(shape))).decode(), "base64", shape=shape, dtype="int8")

    as_base64 = array(b64encode(np.full(4, 1e4)).decode(), "base64", shape=[4])
    assert pull(narrow([1, 1]), narrow([4])) == pull([[1]], as_base64)
    assert pull([[2**62]], [4] * 4) == pull([[1]], [2.0**64] * 4)


def test_other_errors_are_one_string(zoo: Zoo, vector: Tesseract) -> None:
    url = f"{zoo.url}/tesseract"
    assert httpx.post(f"{url}/vector/apply", content="{").status_code == 422
    for reply, status in (
        (httpx.post(f"{url}/none/apply", json={"inputs": {"x": [0.0]}}), 404),
        (httpx.get(f"{url}/none/health"), 404),
        (httpx.get(f"{url}/none/openapi.json"), 404),
        (httpx.post(f"{url}/vector/nothing", json={}), 404),
        (httpx.get(f"{url}/vector/apply"), 405),
    ):
        assert (reply.status_code, reply.json().keys()) == (status, {"detail"})
        assert isinstance(reply.json()["detail"], str)
    with pytest.raises(ValidationError, match="expected points of 3 numbers each"):
        vector.apply({"x": np.zeros((2, 2))})
    long = '{"inputs":{"x":{"shape":[1],"dtype":"float64","data":{"encoding":"base64","buffer":"' + "A" * 70_000
    for end in ("", '\\u0041"}}}}', '"}}}'):
        assert httpx.post(f"{url}/vector/apply", content=long + end).status_code == 422


def test_a_jacobian_of_a_batch_that_is_too_large_is_refused(zoo: Zoo) -> None:
    body = {"inputs": {"x": np.zeros((4000, 3)).tolist()}, "jac_inputs": ["x"], "jac_outputs": ["value"]}
    reply = httpx.post(f"{zoo.url}/tesseract/vector/jacobian", json=body)
    assert (reply.status_code, reply.json().keys()) == (413, {"detail"})


def test_points_outside_are_refused_where_that_is_wanted(zoo: Zoo) -> None:
    body = {"inputs": {"x": [[0.0, 0.0], [0.0, 9.0]], "outside": "refuse"}}
    reply = httpx.post(f"{zoo.url}/tesseract/peaks/apply", json=body)
    (fault,) = reply.json()["detail"]
    assert (reply.status_code, fault["type"], fault["loc"]) == (422, "outside_domain", ["body", "inputs", "x"])


def test_numbers_that_are_not_finite_are_null_in_lists_and_bits_in_base64(zoo: Zoo) -> None:
    steep = Tesseract.from_url(f"{zoo.url}/tesseract/steep")
    found = steep.apply({"x": np.full((1, 2), 1e4)})["value"]
    assert not np.isfinite(found).all()
    reply = httpx.post(f"{zoo.url}/tesseract/steep/apply", json={"inputs": {"x": [[1e4, 1e4]]}}).json()
    assert None in reply["value"]["data"]["buffer"][0]


def test_keys_are_asked_for(guarded: LiveServer) -> None:
    url = f"{guarded.url}/tesseract/peaks"
    for path in ("health", "openapi.json"):
        assert httpx.get(f"{url}/{path}").status_code == 401
    reply = httpx.post(f"{url}/apply", json={"inputs": {"x": [0.0, 0.0]}})
    assert (reply.status_code, reply.json().keys()) == (401, {"detail"})
    assert httpx.get(f"{url}/health", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_torch_differentiates_through_it(zoo: Zoo, vector: Tesseract) -> None:
    from tesseract_torch import apply_tesseract

    x = torch.tensor(X, requires_grad=True)
    apply_tesseract(vector, {"x": x})["value"].mul(torch.from_numpy(C)).sum().backward()
    close(x.grad.numpy(), np.einsum("naj,nj->na", zoo.derivatives("vector", X)["gradient"], C))


def test_jax_differentiates_through_it(vector: Tesseract, truth: dict[str, np.ndarray]) -> None:
    import jax
    from tesseract_jax import apply_tesseract

    with jax.enable_x64(True):
        f = jax.jit(lambda x: apply_tesseract(vector, {"x": x})["value"])
        value, tangent = jax.jvp(f, (X,), (V,))
        close(np.asarray(value), truth["value"])
        close(np.asarray(tangent), np.einsum("naj,na->nj", truth["gradient"], V))
        gradient = jax.grad(lambda x: (C * f(x)).sum())(X)
        close(np.asarray(gradient), np.einsum("naj,nj->na", truth["gradient"], C))
