"""The pages' files, and the document that describes the interface."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from openapi_spec_validator import validate

from service.app import OPEN_PATHS, create_app
from service.assets import ASSETS, load
from service.settings import Settings
from tests.live import LiveServer

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", ASSETS)
def test_file_is_served_with_its_safeguards(server: LiveServer, path: str) -> None:
    with httpx.Client(base_url=server.url) as http:
        plain = http.get(path, headers={"Accept-Encoding": "identity"})
        again = http.get(path, headers={"If-None-Match": plain.headers["etag"]})
        packed = http.get(path, headers={"Accept-Encoding": "gzip"})
    assert plain.status_code == 200
    assert plain.content == packed.content == gzip.decompress(load(path).packed)
    assert packed.headers["content-encoding"] == "gzip"
    assert (again.status_code, again.content) == (304, b"")
    for reply in (plain, again, packed):
        assert reply.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"


@pytest.mark.parametrize("path", [path for path, (package, _) in ASSETS.items() if package == "service"])
def test_own_files_name_no_other_host(path: str) -> None:
    text = re.sub(r"//.*|/\*.*?\*/", "", load(path).plain.decode().replace('xmlns="http://www.w3.org/2000/svg"', ""))
    assert "http:" not in text
    assert "https:" not in text


def test_every_file_of_the_pages_is_served() -> None:
    folder = Path(__file__).parents[2] / "service" / "explorer"
    assert {file for package, file in ASSETS.values() if package == "service"} == {
        f"explorer/{path.name}" for path in folder.iterdir()
    }
    assert frozenset(ASSETS) < OPEN_PATHS


def test_path_beside_the_files_is_not_served(server: LiveServer) -> None:
    for path in ("/explorer/", "/explorer/../app.py", "/explorer/%2e%2e/app.py", "/explorer/none.js"):
        assert httpx.get(server.url + path).status_code == 404


@pytest.fixture(scope="module")
def openapi(server: LiveServer) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/openapi.json").json())


def test_document_is_valid_openapi(openapi: dict[str, Any]) -> None:
    validate(openapi)


def test_document_has_every_path(openapi: dict[str, Any], tmp_path: Path) -> None:
    routes = create_app(Settings(models=tmp_path, device="cpu")).front.table()
    assert set(openapi["paths"]) == routes.keys() - ASSETS.keys() - {"/openapi.json"}
    for path, methods in openapi["paths"].items():
        assert {method.upper() for method in methods} == routes[path]
    assert {"/v1/models/{model}/hessian", "/Evaluate", "/v2/models/{model}/infer"} <= openapi["paths"].keys()


def test_document_asks_for_keys_only_where_the_service_does() -> None:
    assert "security" not in create_app(Settings(device="cpu")).openapi()
    document = create_app(Settings(device="cpu", api_keys=("one",))).openapi()  # type: ignore[arg-type]
    assert document["security"] == [{"key": []}]
    is_open = {path for path, methods in document["paths"].items() if methods.get("get", {}).get("security") == []}
    assert is_open == {"/livez", "/readyz"}


BODIES: dict[str, Any] = {
    "one point": {"inputs": [0.5, -1.0]},
    "a batch": {"inputs": [[0.5, -1.0], [1, 2]]},
    "whole numbers": {"inputs": [[1, 2]]},
    "everything": {
        "inputs": [[0.5, -1.0]],
        "quantities": ["value", "hvp"],
        "weights": [2.0],
        "directions": [[1.0, 0.0]],
        "dtype": "float32",
    },
    "nulls for what is left out": {"inputs": [[1, 2]], "weights": None, "dtype": None, "quantities": None},
    "no inputs": {},
    "empty inputs": {"inputs": []},
    "empty row": {"inputs": [[]]},
    "a string": {"inputs": [["1", 2]]},
    "a boolean": {"inputs": [[True, 2]]},
    "null in a row": {"inputs": [[None, 2]]},
    "too deep": {"inputs": [[[1, 2]]]},
    "a number for inputs": {"inputs": 1},
    "an unknown field": {"inputs": [[1, 2]], "x": 1},
    "an unknown quantity": {"inputs": [[1, 2]], "quantities": ["jacobian"]},
    "a quantity twice": {"inputs": [[1, 2]], "quantities": ["value", "value"]},
    "no quantity": {"inputs": [[1, 2]], "quantities": []},
    "a name for quantities": {"inputs": [[1, 2]], "quantities": "value"},
    "an unknown dtype": {"inputs": [[1, 2]], "dtype": "float16"},
    "flat directions": {"inputs": [[1, 2]], "quantities": ["jvp"], "directions": [1.0, 0.0]},
    "a list": [[1, 2]],
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_document_and_service_agree_on_a_body(openapi: dict[str, Any], server: LiveServer, body: Any) -> None:
    reply = httpx.post(f"{server.url}/v1/models/peaks/evaluate", json=body, timeout=60)
    assert is_valid(openapi, "EvaluateRequest", body) == (reply.status_code == 200), reply.text
    if reply.status_code == 200:
        assert is_valid(openapi, "Answer", reply.json())
    else:
        assert is_valid(openapi, "Problem", reply.json())
        declared = openapi["paths"]["/v1/models/{model}/evaluate"]["post"]["responses"][str(reply.status_code)]
        assert f"`{reply.json()['code']}`" in declared["description"]


def test_document_and_service_agree_on_the_most_points(openapi: dict[str, Any], server: LiveServer) -> None:
    """The document of a service of few points is the one that is validated: many take seconds."""
    document = create_app(Settings(device="cpu", max_rows=3)).openapi()
    for rows in (3, 4):
        assert is_valid(document, "EvaluateRequest", {"inputs": [[0, 0]] * rows}) == (rows <= 3)
    most = Settings().max_rows
    for served in ("EvaluateRequest", "QuantityRequest"):
        assert openapi["components"]["schemas"][served]["properties"]["inputs"]["anyOf"][1]["maxItems"] == most
    for rows, status in ((most, 200), (most + 1, 422)):
        body = {"inputs": [[0, 0]] * rows}
        assert httpx.post(f"{server.url}/v1/models/peaks/evaluate", json=body, timeout=60).status_code == status


REPLIES = {
    "/v1/models": "ModelList",
    "/v1/models/peaks": "ModelDetails",
    "/livez": "Liveness",
    "/readyz": "Readiness",
}


@pytest.mark.parametrize(("path", "model"), REPLIES.items(), ids=REPLIES.values())
def test_reply_fits_the_document(openapi: dict[str, Any], server: LiveServer, path: str, model: str) -> None:
    reply = httpx.get(server.url + path).json()
    assert is_valid(openapi, model, reply)
    known = openapi["components"]["schemas"][model]["properties"]
    assert set(reply) <= set(known)


def test_examples_are_answered(openapi: dict[str, Any], server: LiveServer) -> None:
    for model, action in {"QuantityRequest": "hessian", "EvaluateRequest": "evaluate"}.items():
        example = openapi["components"]["schemas"][model]["example"]
        reply = httpx.post(f"{server.url}/v1/models/peaks/{action}", json=example)
        assert reply.status_code == 200
        assert np.isfinite(
            np.array(next(value for key, value in reply.json().items() if key in {"value", "hessian"}))
        ).all()


def is_valid(openapi: dict[str, Any], model: str, instance: Any) -> bool:
    """Return whether an instance fits one of the document's schemas."""
    schema = {"$ref": f"#/components/schemas/{model}", "components": openapi["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(json.loads(json.dumps(instance)))
