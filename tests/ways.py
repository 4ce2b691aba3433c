"""The ways to send one question: every dialect and encoding."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import safetensors.numpy
import torch

from hessquik import Evaluator, storage

Numbers = dict[str, np.ndarray]
Way = Callable[[httpx.Client, np.ndarray], Numbers]
MODEL, QUANTITIES = "peaks", ("value", "gradient", "hessian")
POINTS = np.random.default_rng(7).uniform(-2, 2, (67, 2))


def send(client: httpx.Client, path: str, body: Any, media_type: str = "application/json", **fields: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = client.post(path, content=data, headers={"content-type": media_type, **fields})
    assert reply.status_code == 200, reply.text
    return reply.content


def native_json(client: httpx.Client, x: np.ndarray) -> Numbers:
    reply = send(client, f"/v1/models/{MODEL}/evaluate", {"inputs": x.tolist(), "quantities": QUANTITIES})
    return {name: np.array(json.loads(reply)[name]) for name in QUANTITIES}


def native_safetensors(client: httpx.Client, x: np.ndarray) -> Numbers:
    body = safetensors.numpy.save({"inputs": x}, {"quantities": ",".join(QUANTITIES)})
    media_type = "application/x-safetensors"
    found: Numbers = safetensors.numpy.load(
        send(client, f"/v1/models/{MODEL}/evaluate", body, media_type, accept=media_type)
    )
    return found


def a_route_each(client: httpx.Client, x: np.ndarray) -> Numbers:
    body = {"inputs": x.tolist()}
    return {name: np.array(json.loads(send(client, f"/v1/models/{MODEL}/{name}", body))[name]) for name in QUANTITIES}


def inference_json(client: httpx.Client, x: np.ndarray) -> Numbers:
    inputs = {"name": "inputs", "shape": x.shape, "datatype": "FP64", "data": x.tolist()}
    body = {"inputs": [inputs], "outputs": [{"name": name} for name in QUANTITIES]}
    outputs = json.loads(send(client, f"/v2/models/{MODEL}/infer", body))["outputs"]
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in outputs}


def inference_binary(client: httpx.Client, x: np.ndarray) -> Numbers:
    inputs = {"name": "inputs", "shape": x.shape, "datatype": "FP64", "parameters": {"binary_data_size": x.nbytes}}
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in QUANTITIES]
    head = json.dumps({"inputs": [inputs], "outputs": outputs}).encode()
    fields = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    reply = client.post(f"/v2/models/{MODEL}/infer", content=head + x.tobytes(), headers=fields)
    assert reply.status_code == 200, reply.text
    size = int(reply.headers["inference-header-content-length"])
    found, at = {}, size
    for one in json.loads(reply.content[:size])["outputs"]:
        end = at + one["parameters"]["binary_data_size"]
        found[one["name"]] = np.frombuffer(reply.content[at:end]).reshape(one["shape"])
        at = end
    return found


def umbridge(client: httpx.Client, x: np.ndarray) -> Numbers:
    """Return values and gradients of the only output, requested one point at a time."""
    about = {"name": MODEL, "config": {}}
    values = [json.loads(send(client, "/Evaluate", {**about, "input": [row]}))["output"] for row in x.tolist()]
    asked = {**about, "outWrt": 0, "inWrt": 0, "sens": [1.0]}
    gradients = [json.loads(send(client, "/Gradient", {**asked, "input": [row]}))["output"] for row in x.tolist()]
    return {"value": np.array(values).reshape(-1, 1), "gradient": np.array(gradients).reshape(-1, 2, 1)}


def tesseract(client: httpx.Client, x: np.ndarray, encoding: str = "json") -> Numbers:
    buffer = x.tolist() if encoding == "json" else base64.b64encode(x.tobytes()).decode()
    data = {"buffer": buffer, "encoding": encoding}
    array = {"object_type": "array", "shape": x.shape, "dtype": "float64", "data": data}
    (reply,) = json.loads(send(client, f"/tesseract/{MODEL}/apply", {"inputs": {"x": array}})).values()
    numbers = reply["data"]["buffer"]
    if encoding == "base64":
        numbers = np.frombuffer(base64.b64decode(numbers))
    return {"value": np.array(numbers).reshape(reply["shape"])}


def tesseract_base64(client: httpx.Client, x: np.ndarray) -> Numbers:
    return tesseract(client, x, "base64")


WAYS = (
    *(native_json, native_safetensors, a_route_each, inference_json, inference_binary),
    *(umbridge, tesseract, tesseract_base64),
)


def in_process(shipped_models: Path, backend: str | None = None) -> Numbers:
    network = storage.load(shipped_models / f"{MODEL}.safetensors")
    found = Evaluator(network, dtype=torch.float64, backend=backend)(torch.from_numpy(POINTS), QUANTITIES)
    return {name: getattr(found, name).numpy() for name in QUANTITIES}


def expect_same_bits(found: Numbers, expected: Numbers) -> None:
    for name, array in found.items():
        assert array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes(), name


def expect_same_bits_by(way: Way, client: httpx.Client, rows: int, expected: Numbers) -> None:
    """Send ``POINTS`` one way, some rows at a time, and expect the bits of the engine in this process."""
    parts = [way(client, np.ascontiguousarray(POINTS[at : at + rows])) for at in range(0, len(POINTS), rows)]
    expect_same_bits({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, expected)
