"""Every kind of bad request gets its status, its code and a sentence, and the server goes on."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.live import LiveServer

JSON = {"Content-Type": "application/json"}

CASES: dict[str, tuple[str, str, dict[str, str], bytes, int, str, str]] = {
    "wrong model": (
        "POST",
        "/v1/models/none/value",
        JSON,
        b'{"inputs":[[1,2]]}',
        404,
        "model_not_found",
        "served model",
    ),
    "wrong version": (
        "POST",
        "/v1/models/peaks/value?version=9",
        JSON,
        b'{"inputs":[[1,2]]}',
        404,
        "version_not_found",
        "1",
    ),
    "wrong path": ("GET", "/v2000", {}, b"", 404, "not_found", "path"),
    "wrong method": ("GET", "/v1/models/peaks/value", {}, b"", 405, "method_not_allowed", "POST"),
    "wrong width": (
        "POST",
        "/v1/models/peaks/value",
        JSON,
        b'{"inputs":[[1,2,3]]}',
        422,
        "invalid_input",
        "points of 2 numbers",
    ),
    "ragged rows": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[[1,2],[1]]}', 422, "invalid_input", "row 1"),
    "empty inputs": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[]}', 422, "invalid_input", "got 0"),
    "empty row": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[[]]}', 422, "invalid_input", "points of 2"),
    "no inputs": ("POST", "/v1/models/peaks/value", JSON, b"{}", 422, "invalid_input", "got none"),
    "string": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[["1",2]]}', 422, "invalid_input", "a string"),
    "boolean": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[[true,2]]}', 422, "invalid_input", "a boolean"),
    "null": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[[null,2]]}', 422, "invalid_input", "null"),
    "NaN": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[[1,2],[NaN,2]]}', 422, "invalid_input", "row 1"),
    "1e999": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[[1e999,2]]}', 422, "invalid_input", "finite"),
    "not float32": (
        "POST",
        "/v1/models/peaks/value",
        JSON,
        b'{"inputs":[[1e39,2]],"dtype":"float32"}',
        422,
        "invalid_input",
        "float32",
    ),
    "unknown field": (
        "POST",
        "/v1/models/peaks/value",
        JSON,
        b'{"inputs":[[1,2]],"x":1}',
        422,
        "invalid_input",
        "fields",
    ),
    "unknown quantity": (
        "POST",
        "/v1/models/peaks/evaluate",
        JSON,
        b'{"inputs":[[1,2]],"quantities":["jacobian"]}',
        422,
        "invalid_input",
        "list",
    ),
    "no directions": (
        "POST",
        "/v1/models/peaks/evaluate",
        JSON,
        b'{"inputs":[[1,2]],"quantities":["hvp"]}',
        422,
        "invalid_input",
        "(k, 2)",
    ),
    "wrong weights": (
        "POST",
        "/v1/models/peaks/value",
        JSON,
        b'{"inputs":[[1,2]],"weights":[1,2]}',
        422,
        "invalid_input",
        "(1)",
    ),
    "malformed JSON": ("POST", "/v1/models/peaks/value", JSON, b'{"inputs":[[1,2]', 400, "malformed_body", "JSON"),
    "not an object": ("POST", "/v1/models/peaks/value", JSON, b"[[1,2]]", 400, "malformed_body", "a list"),
    "deep JSON": (
        "POST",
        "/v1/models/peaks/value",
        JSON,
        b'{"inputs":' + b"[" * 250_000,
        400,
        "malformed_body",
        "JSON",
    ),
    "not safetensors": (
        "POST",
        "/v1/models/peaks/value",
        {"Content-Type": "application/x-safetensors"},
        b"12345678",
        400,
        "malformed_body",
        "header",
    ),
    "wrong content type": (
        "POST",
        "/v1/models/peaks/value",
        {"Content-Type": "text/plain"},
        b"1,2",
        415,
        "unsupported_media_type",
        "application/json",
    ),
    "encoded": (
        "POST",
        "/v1/models/peaks/value",
        {**JSON, "Content-Encoding": "gzip"},
        b"\x1f\x8b",
        415,
        "unsupported_media_type",
        "Content-Encoding",
    ),
    "wrong accept": (
        "POST",
        "/v1/models/peaks/value",
        {**JSON, "Accept": "text/html"},
        b'{"inputs":[[1,2]]}',
        406,
        "not_acceptable",
        "application/json",
    ),
    "too large": (
        "POST",
        "/v1/models/peaks/value",
        JSON,
        b'{"inputs":[[' + b" " * (17 << 20) + b"1,2]]}",
        413,
        "body_too_large",
        "16777216",
    ),
    "too many rows": (
        "POST",
        "/v1/models/peaks/value",
        JSON,
        b'{"inputs":[' + b"[0,0]," * 65536 + b"[0,0]]}",
        422,
        "invalid_input",
        "65537",
    ),
    "bad deadline": (
        "POST",
        "/v1/models/peaks/value",
        {**JSON, "X-Deadline-Ms": "soon"},
        b'{"inputs":[[1,2]]}',
        422,
        "invalid_input",
        "X-Deadline-Ms",
    ),
    "no admin key": ("POST", "/v1/models/peaks/load", {}, b"", 403, "forbidden", "admin"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_bad_request_is_refused_by_name(server: LiveServer, case: tuple[Any, ...]) -> None:
    method, path, headers, body, status, code, words = case
    reply = httpx.request(method, server.url + path, headers=headers, content=body, timeout=30)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["code"] == code
    assert problem["status"] == status
    assert problem["request_id"] == reply.headers["x-request-id"]
    assert words in problem["detail"]
    assert len(reply.content) < 1024
    assert httpx.post(f"{server.url}/v1/models/peaks/value", json={"inputs": [0, 0]}).status_code == 200


def test_a_request_id_is_echoed_if_it_is_decent(server: LiveServer) -> None:
    given = httpx.get(f"{server.url}/livez", headers={"X-Request-Id": "run-7/step:42"})
    assert given.headers["x-request-id"] == "run-7/step:42"
    assert httpx.get(f"{server.url}/livez", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"
