"""Requests generated from the OpenAPI document: every answer is one that it declares, and every number right."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hessquik import EnsembleEvaluator, Evaluator, storage
from hessquik.ensemble import evaluator_of
from hessquik_client.domain import Domain
from hessquik_client.quantities import DOMAIN_DISTANCE, QUANTITIES, quantities_of
from service.app import create_app
from service.settings import Settings
from tests.live import LiveServer
from tests.oracle import derivatives
from tests.raw import LEAKS, Reply, send_over
from tests.security.conftest import SPARE
from tests.security.generate import JSON, KEYS, SAFETENSORS, Document, Model, Request, other_requests, questions
from tests.whole import Note, choose

TOLERANCE = 1e-10
SETTINGS = Settings(device="cpu", api_keys=KEYS[:1], admin_keys=KEYS[1:])  # type: ignore[arg-type]
DOCUMENT = Document(create_app(SETTINGS).openapi())
#: The native ones; those of the dialects have tests of their own beside their clients.
NATIVE = ("/v1/", "/livez", "/readyz", "/metrics")
OPERATIONS = [
    (path, method) for path, methods in DOCUMENT["paths"].items() if path.startswith(NATIVE) for method in methods
]
#: How many of each operation: of those that compute, and of the others.
COUNTS = choose((100, 12), (3_900, 250))
ACTIONS = [path for path, method in OPERATIONS if "requestBody" in DOCUMENT["paths"][path][method]]


@dataclass
class Reference:
    """The models, computed in this process.

    Attributes:
        models: By name.
        evaluators: By name and dtype.
        domains: By name.
    """

    models: list[Model] = field(default_factory=list)
    evaluators: dict[tuple[str, str], Evaluator | EnsembleEvaluator] = field(default_factory=dict)
    domains: dict[str, Domain] = field(default_factory=dict)

    def answers(self, model: str, given: dict[str, Any], action: str) -> dict[str, Any]:
        """Return the right answer to a question, an array per quantity."""
        asked = given.get("quantities", ["value"]) if action == "evaluate" else [action]
        dtype = given.get("dtype", "float64")
        asked = [name for name in QUANTITIES if name in asked]
        inputs, weights, directions = (
            None if name not in given else torch.from_numpy(np.asarray(given[name], dtype))
            for name in ("inputs", "weights", "directions")
        )
        assert inputs is not None
        if {"jvp", "hvp", "curvature"}.isdisjoint(asked):
            directions = None
        is_single = inputs.ndim == 1
        points = torch.atleast_2d(inputs)
        # The service has a row of them for every point; those that points share may be summed in another order.
        if weights is not None and weights.ndim == 1:
            weights = weights.repeat(len(points), 1)
        if directions is not None and directions.ndim == 2:
            directions = directions.repeat(len(points), 1, 1)
        computed = [name for name in asked if name != DOMAIN_DISTANCE]
        found = self.evaluators[model, dtype](points, computed, weights, directions) if computed else None
        arrays = {name: getattr(found, name).numpy() for name in computed}
        arrays[DOMAIN_DISTANCE] = self.domains[model].distance(points.numpy())
        return {name: np.asarray(arrays[name][0 if is_single else slice(None)]) for name in asked}


@pytest.fixture(scope="module")
def reference(shipped_models: Path) -> Iterator[Reference]:
    """Yield the answers of the shipped models at the points of requests, compared with automatic differentiation."""
    found, threads = Reference(), torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers
    for number, path in enumerate(sorted(shipped_models.glob("*.safetensors"))):
        saved = storage.parse(path.read_bytes())
        random_ = np.random.default_rng(number)
        lower, upper = (np.array(saved.metadata[key]) for key in ("lower_bounds", "upper_bounds"))
        points = random_.uniform(lower, upper, (64, len(lower))).astype(np.float32).astype(np.float64)
        for dtype in (torch.float32, torch.float64):
            found.evaluators[path.stem, str(dtype).removeprefix("torch.")] = evaluator_of(saved.network, dtype=dtype)
        evaluate = found.evaluators[path.stem, "float64"]
        domain = Domain.of(saved.metadata)
        assert domain is not None
        found.domains[path.stem] = domain
        asked = quantities_of(len(getattr(evaluate, "members", "1")))
        found.models.append(Model(path.stem, evaluate.d, evaluate.m, points, asked))
        value, gradient, hessian = derivatives(saved.network.double(), torch.from_numpy(points))
        directions = torch.from_numpy(random_.normal(size=(3, evaluate.d)))
        hvp = torch.einsum("nabm,kb->nkam", hessian, directions)
        truth = {
            "value": value, "gradient": gradient, "hessian": hessian, "laplacian": hessian.diagonal(0, 1, 2).sum(-1),
            "hessian_diagonal": hessian.diagonal(0, 1, 2).mT,
            "jvp": torch.einsum("nam,ka->nkm", gradient, directions),
            "hvp": hvp, "curvature": torch.einsum("nkam,ka->nkm", hvp, directions),
            "hessian_packed": hessian[:, *torch.tril_indices(evaluate.d, evaluate.d)],
        }  # fmt: skip
        computed = evaluate(torch.from_numpy(points), list(truth), None, directions)
        for name, right in truth.items():
            error = float((getattr(computed, name) - right).abs().max() / right.abs().max())
            assert error <= TOLERANCE, (path.stem, name, error)
    yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def connection(locked: LiveServer) -> Iterator[http.client.HTTPConnection]:
    """Yield one connection for all tests."""
    connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=30)
    yield connection
    connection.close()


def send(connection: http.client.HTTPConnection, request: Request) -> Reply:
    return send_over(connection, request.method, request.path, request.body, dict(request.headers))


def strict(data: bytes) -> Any:
    """Parse strict JSON, which has no NaN."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"expected JSON, got {word}")

    return json.loads(data, parse_constant=refuse)


def validators() -> dict[tuple[str, str, str, str], Any]:
    """Return a validator for each declared reply, by path, method, status and media type; ``None`` for others."""
    return {
        (path, method, status, media_type): jsonschema.Draft202012Validator(
            {**content["schema"], "components": DOCUMENT["components"]}
        )
        if media_type.endswith("json")
        else None
        for path, method in OPERATIONS
        for status, response in DOCUMENT["paths"][path][method]["responses"].items()
        for media_type, content in response["content"].items()
    }


VALIDATORS = validators()


def check(path: str, method: str, request: Request, reply: Reply, reference: Reference) -> None:
    """Assert that an answer is declared, fits its schema, discloses nothing of the machine, and is right."""
    media_type = reply.headers["content-type"].partition(";")[0]
    what = (path, method, str(reply.status), media_type)
    assert what in VALIDATORS, f"not declared: {what}, {reply}"
    validator = VALIDATORS[what]
    if validator is not None:
        document = strict(reply.body)
        validator.validate(document)
        assert reply.status < 400 or document.get("status", reply.status) == reply.status
    if reply.status >= 400:
        assert LEAKS.search(reply.body) is None, reply
    if request.given is None:
        return
    assert reply.status == 200, (request, reply)
    asked = dict(request.given)
    model = asked.pop("model").name
    right = reference.answers(model, asked, path.rsplit("/", 1)[1])
    if media_type == SAFETENSORS:
        got = safetensors.numpy.load(reply.body)
        assert {name: (array.dtype, array.tobytes()) for name, array in got.items()} == {
            name: (array.dtype, array.tobytes()) for name, array in right.items()
        }
        return
    assert document["model"] == model
    assert document.keys() == {"model", "version", *right}
    for name, array in right.items():
        numbers = np.array(document[name], np.float64)  # null becomes NaN
        expected = np.where(np.isfinite(array), array.astype(np.float64), np.nan)
        assert numbers.shape == expected.shape, (name, numbers.shape)
        assert numbers.tobytes() == expected.tobytes() or np.array_equal(numbers, expected, equal_nan=True), name


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda part: part)
def test_every_answer_is_declared_and_right(
    locked: LiveServer,
    connection: http.client.HTTPConnection,
    reference: Reference,
    path: str,
    method: str,
    note: Note,
) -> None:
    seen: Counter[str] = Counter()
    names = [SPARE] if path.endswith(("/load", "/unload")) else [model.name for model in reference.models]
    requests = (
        questions(DOCUMENT, path, reference.models)
        if path in ACTIONS
        else other_requests(DOCUMENT, path, method, names)
    )

    @seed(len(path))
    @settings(
        max_examples=COUNTS[path not in ACTIONS],
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        request = data.draw(requests)
        reply = send(connection, request)
        check(path, method, request, reply, reference)
        seen[str(reply.status)] += 1
        seen["compared"] += request.given is not None

    ask()
    note(f"{method.upper()} {path}: {sum(seen.values()) - seen['compared']} requests, {dict(sorted(seen.items()))}")
    if path in ACTIONS:
        assert {"200", "401", "404", "422"} <= seen.keys()
        assert seen["compared"] > 0.2 * COUNTS[0]
    assert locked.metric("hessquik_worker_restarts_total", KEYS[0]) == 0
    assert not any("Traceback" in line for line in locked.log)


def test_wrong_answers_are_caught(connection: http.client.HTTPConnection, reference: Reference) -> None:
    """Control: the answer to a good request, changed in one thing at a time."""
    model = reference.models[0]
    path = "/v1/models/{model}/hessian"
    body = json.dumps({"inputs": model.points[:2].tolist()}).encode()
    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": JSON}
    asked = {"model": model, "inputs": model.points[:2]}
    request = Request("POST", path.replace("{model}", model.name), headers, body, asked)
    good = send(connection, request)
    check(path, "post", request, good, reference)
    document = good.json()
    first = document["hessian"][0][0][0]
    document["hessian"][0][0][0] = [np.nextafter(first[0], np.inf), *first[1:]]
    changed = {
        "status": Reply(418, good.headers, good.body),
        "undeclared error": Reply(500, good.headers, good.body),
        "media type": Reply(200, good.headers | {"content-type": "text/html"}, good.body),
        "last bit": Reply(200, good.headers, json.dumps(document).encode()),
        "no number": Reply(200, good.headers, good.body.replace(b"[[[[", b'[[[["', 1).replace(b",", b'",', 3)),
        "NaN": Reply(200, good.headers, json.dumps(document | {"hessian": [[[[float("nan")]]]]}).encode()),
        "a quantity more": Reply(200, good.headers, json.dumps(document | {"value": [[1.0]]}).encode()),
        "no body": Reply(200, good.headers, b""),
    }
    for reply in changed.values():
        with pytest.raises((AssertionError, jsonschema.ValidationError, ValueError)):
            check(path, "post", request, reply, reference)
