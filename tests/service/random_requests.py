"""Requests of all dialects drawn at random: most fit a model, many are spoiled in one place, some are long."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import safetensors.numpy

JSON, SAFETENSORS = "application/json", "application/x-safetensors"
#: Models, and their inputs and outputs.
MODELS = {"peaks": (2, 1), "vector": (3, 4), "steep": (2, 3)}
QUANTITIES = (
    "value", "gradient", "hessian", "laplacian", "jvp", "hvp", "curvature", "hessian_diagonal", "hessian_packed",
)  # fmt: skip
#: Rows of the longest bodies, which are read slice by slice.
LONG_ROWS = 3000
#: Values of wrong types and sizes.
WRONG: tuple[Any, ...] = (
    None, True, 0, -1.5, 1e400, 10**400, float("nan"), "", "x", [], [[]], [[[1]]], {}, {"a": 1}, [True],
    ["1", 2], [[1], [2, 3]],
)  # fmt: skip
#: Heads' fields, and values that are refused or that change the reply.
FIELDS = {
    "accept": (
        SAFETENSORS, JSON, "*/*", "text/html", "application/json;q=0", "application/json;q=0.1, */*;q=0.9",
        "application/json+base64",
    ),
    "content-type": (JSON, SAFETENSORS, "text/plain", "application/json; charset=utf-8", ""),
    "content-encoding": ("identity", "gzip", ""),
    "x-deadline-ms": ("20000", "0", "x", "99999999999"),
    "inference-header-content-length": ("0", "5", "x", "99999"),
    "authorization": ("Bearer a", "Basic a", ""),
    "traceparent": ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x"),
}  # fmt: skip
QUERIES = (
    "version=1", "version=7", "version=", "version=x", "dtype=float32", "quantities=value,gradient", "a=1",
    "version=1&version=1", "outside=refuse", "run_id=a", "%00", "&".join(f"a{n}=1" for n in range(20)),
)  # fmt: skip
GETS = (
    "/", "/docs", "/livez", "/readyz", "/openapi.json", "/v1/models", "/v1/models/{model}", "/v1/models/{model}/file",
    "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{model}", "/v2/models/{model}/ready", "/Info",
    "/v2/models/{model}/config", "/v2/models/{model}/versions/1", "/v2/models/{model}/versions/1/ready",
    "/tesseract/{model}/health", "/tesseract/{model}/openapi.json", "/none", "/v1/models/{model}/none", "/v2/none",
    "/tesseract/none", "/v1/models/none/value", "/v1/models/a%2Fb",
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A request.

    Attributes:
        method: Of it.
        path: With its query.
        headers: Besides host and length.
        body: Of it.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def draw(random: Random, number: int) -> Drawn:
    """Draw a request; each has a unique id, which refusals repeat."""
    make = random.choice((_native, _native, _native, _binary, _inference, _bridge, _tesseract, _tesseract, _other))
    request = make(random)
    headers = {"x-request-id": f"drawn-{number}", **request.headers}
    method, path, body = request.method, request.path, request.body
    if random.random() < 0.15:
        name = random.choice(tuple(FIELDS))
        headers[name] = random.choice(FIELDS[name])
    if random.random() < 0.1:
        path += ("&" if "?" in path else "?") + random.choice(QUERIES)
    if random.random() < 0.05:
        method = random.choice(("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "POST"))
    if random.random() < 0.05:
        body = random.choice((b"", body[: len(body) // 2], body + b"}", b"[1]", b"null", b"\xff\xfe", b"[" * 2000))
    if random.random() < 0.03:
        path = path.replace("/v1/models/", "/v1/models/no").replace("/v2/models/", "/v2/models/no")
    return replace(request, method=method, path=path, headers=headers, body=body)


def _points(random: Random, d: int, rows: int) -> Any:
    """Draw points, or one that has no axis of rows."""
    one = [[round(random.uniform(-2, 2), random.randrange(17)) for _ in range(d)] for _ in range(rows)]
    return one[0] if rows == 1 and random.random() < 0.5 else one


def _rows(random: Random) -> int:
    return LONG_ROWS if random.random() < 0.05 else random.choice((1, 1, 2, 5))


def _spoil(random: Random, document: dict[str, Any]) -> bytes:
    """Put something wrong in one place in one request of four."""
    if random.random() < 0.25:
        name = random.choice((*document, "unknown", "inputss"))
        document = {**document, name: random.choice(WRONG)}
    return json.dumps(document).encode()


def _native(random: Random) -> Drawn:
    model, (d, m) = random.choice(tuple(MODELS.items()))
    rows, action = _rows(random), random.choice((*QUANTITIES, "evaluate", "evaluate"))
    document: dict[str, Any] = {"inputs": _points(random, d, rows)}
    if action == "evaluate" and random.random() < 0.8:
        document["quantities"] = random.sample(QUANTITIES, random.choice((1, 2, 3)))
    if action in ("jvp", "hvp", "curvature") or (action == "evaluate" and random.random() < 0.7):
        document["directions"] = [[random.gauss(0, 1) for _ in range(d)] for _ in range(random.choice((1, 2)))]
    if random.random() < 0.3:
        document["weights"] = [random.gauss(0, 1) for _ in range(m)]
    if random.random() < 0.3:
        document["dtype"] = random.choice(("float32", "float64"))
    if random.random() < 0.2:
        document["outside"] = random.choice(("allow", "refuse"))
    headers = {"content-type": JSON} | ({"accept": SAFETENSORS} if random.random() < 0.2 else {})
    return Drawn("POST", f"/v1/models/{model}/{action}", headers, _spoil(random, document))


def _binary(random: Random) -> Drawn:
    model, (d, _) = random.choice(tuple(MODELS.items()))
    dtype = random.choice((np.float32, np.float64, np.float64, np.int32))
    name = random.choice(("inputs", "inputs", "inputs", "x"))
    body = safetensors.numpy.save({name: np.array(_points(random, d, _rows(random)), dtype)})
    query = random.choice(("", "?quantities=value,hessian", "?dtype=float32&quantities=laplacian", "?quantities=x"))
    headers = {"content-type": SAFETENSORS} | ({"accept": SAFETENSORS} if random.random() < 0.7 else {})
    return Drawn("POST", f"/v1/models/{model}/evaluate{query}", headers, body)


def _inference(random: Random) -> Drawn:
    model, (d, _) = random.choice(tuple(MODELS.items()))
    rows = _rows(random)
    points = np.array(_points(random, d, rows)).reshape(rows, d)
    tensor: dict[str, Any] = {"name": "inputs", "shape": [rows, d], "datatype": "FP64"}
    is_binary = random.random() < 0.4
    if is_binary:
        tensor["parameters"] = {"binary_data_size": points.nbytes}
    else:
        tensor["data"] = random.choice((points.tolist(), points.ravel().tolist()))
    document: dict[str, Any] = {"inputs": [tensor]}
    if random.random() < 0.5:
        names = random.sample(("value", "gradient", "hessian", "laplacian"), 2)
        wanted = {"parameters": {"binary_data": True}} if random.random() < 0.4 else {}
        document["outputs"] = [{"name": names[0]}, {"name": names[1], **wanted}]
    if random.random() < 0.3:
        document["id"] = "a"
    text = _spoil(random, document)
    headers = {"inference-header-content-length": str(len(text))} if is_binary else {}
    version = random.choice(("", "", "/versions/1", "/versions/9"))
    return Drawn(
        "POST", f"/v2/models/{model}{version}/infer", headers, text + (points.tobytes() if is_binary else b"")
    )


def _bridge(random: Random) -> Drawn:
    model, (d, m) = random.choice(tuple(MODELS.items()))
    document: dict[str, Any] = {
        "name": model, "input": [_points(random, d, 2)[0]], "outWrt": 0, "inWrt": 0, "inWrt1": 0, "inWrt2": 0,
        "sens": [random.gauss(0, 1) for _ in range(m)], "vec": [random.gauss(0, 1) for _ in range(d)],
        "config": random.choice((None, {}, {"version": 1}, {"version": "1", "dtype": "float32"}, {"x": 1}, 1)),
    }  # fmt: skip
    names = ("Evaluate", "Gradient", "ApplyJacobian", "ApplyHessian", "ModelInfo", "InputSizes", "OutputSizes")
    return Drawn("POST", f"/{random.choice(names)}", {}, _spoil(random, document))


def _tesseract(random: Random) -> Drawn:
    model, (d, m) = random.choice(tuple(MODELS.items()))
    rows = min(_rows(random), 1000)
    x = np.array(_points(random, d, rows))
    is_base64 = random.random() < 0.4

    def array(values: Any) -> dict[str, Any]:
        buffer = b64encode(values.tobytes()).decode() if is_base64 else values.tolist()
        data = {"buffer": buffer, "encoding": "base64" if is_base64 else "json"}
        return {"object_type": "array", "shape": list(values.shape), "dtype": "float64", "data": data}

    inputs: dict[str, Any] = {"x": array(x) if random.random() < 0.8 else x.tolist()}
    if random.random() < 0.3:
        inputs["weights"] = array(np.array([random.gauss(0, 1) for _ in range(m)]))
    kind, endpoint = random.choice(
        (("", "apply"), ("", "apply"), ("jac", "jacobian"), ("jvp", "jacobian_vector_product"),
         ("vjp", "vector_jacobian_product"))
    )  # fmt: skip
    document: dict[str, Any] = {"inputs": inputs}
    if kind:
        document |= {f"{kind}_inputs": ["x"], f"{kind}_outputs": ["value"]}
    elif random.random() < 0.6:
        inputs["outputs"] = random.sample(("value", "gradient", "hessian", "laplacian"), 2)
    if kind == "jvp":
        document["tangent_vector"] = {"x": array(x + 1)}
    if kind == "vjp":
        shape = (*x.shape[:-1], 1 if "weights" in inputs else m)
        document["cotangent_vector"] = {"value": array(np.full(shape, 0.5))}
    if random.random() < 0.1:
        inputs[random.choice(("x", "outside", "more"))] = random.choice(WRONG)
    return Drawn("POST", f"/tesseract/{model}/{endpoint}", {}, _spoil(random, document))


def _other(random: Random) -> Drawn:
    path = random.choice(GETS).replace("{model}", random.choice((*MODELS, "none")))
    headers = random.choice(({}, {"accept-encoding": "gzip"}, {"if-none-match": "*"}))
    if random.random() < 0.15:
        path = random.choice(("/v2/repository/index", "/v1/models/peaks/load", "/v2/repository/models/peaks/unload"))
        return Drawn("POST", path, headers, random.choice((b"", b"{}", b'{"ready":true}', b"x")))
    return Drawn("GET", path, headers, b"")
