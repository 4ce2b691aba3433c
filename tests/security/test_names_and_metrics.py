"""Names of models are looked up in a table, and never become a part of a path or of a label."""

from __future__ import annotations

import json
import random
import re
from itertools import combinations, product
from pathlib import Path
from urllib.parse import quote

import pytest

from hessquik_client.quantities import QUANTITIES
from tests.live import LiveServer, wait_until
from tests.raw import ask, check_error, exchange, post, request
from tests.security.test_keys import flood
from tests.whole import Note, choose

NAMES = [
    "..", "...", "....//", "%2e%2e", "%2e%2e%2f", "%252e%252e%252f", "..%2f", "..%5c", "..\\", "%c0%ae%c0%ae%2f",
    "%00", "peaks%00", "peaks%00.txt", "%0d%0aX:%20y", "peaks;", "peaks;x=y", "peaks%23", "peaks%3f", "~", "~root",
    "$HOME", "`id`", "$(id)", "|id", "peaks.safetensors", "models%2fpeaks", ".%2fpeaks", "Peaks", "PEAKS",
    "pea\u212as",
    "%ef%bc%8e%ef%bc%8e", "con", "nul", "-", "_", ".", "a" * 64, "a" * 65, "a" * 256, "a" * 8000, "%ff", "%80", "%",
    "%zz", "%u002e", "file:", "http:", "file%3a%2f%2f%2fetc%2fpasswd", "etc%2fpasswd", "%2fetc%2fpasswd", "__class__",
    "{0}", "{{7*7}}", "%7b%7d", "'", "\"", "' OR 1=1", "<script>", "%3cscript%3e", "\u202e", "null", "undefined", "0",
    "-1", "1e999", "NaN", "true",
]  # fmt: skip
ACTIONS = ("", "/value", "/load", "/unload", "/value?version=..%2f..", "/value?version=1%00")


@pytest.mark.parametrize("action", ACTIONS)
def test_hostile_names_are_not_found(server: LiveServer, action: str) -> None:
    key = {"Authorization": "Bearer admin"}
    for name in NAMES:
        path = f"/v1/models/{name.encode('utf-8').decode('latin-1')}{action}"
        method = "GET" if action == "" else "POST"
        if " " in path or '"' in path:
            path = path.replace(" ", "%20").replace('"', "%22")
        reply = ask(server.port, request(method, path, **key))
        assert reply.status in (400, 404, 422), (name, reply)
        check_error(reply)
        if len(name) > 6:
            assert name.encode() not in reply.body, "the name is echoed"


def test_no_file_is_opened_for_a_name(shipped_models: Path, note: Note) -> None:
    command = ("-m", "tests.chaos.faulty_serve", "auditing")
    key = {"Authorization": "Bearer admin"}
    with LiveServer(shipped_models, settings={"admin_keys": "admin"}, command=command) as live:
        for warm in ("/v1/nothing/here", "/v1/models/none", "/v1/models/none/load", "/v1/models/none/unload"):
            ask(live.port, request("POST" if "load" in warm else "GET", warm, **key))  # all that is read late
        load(live)
        before = opened(live)
        load(live)
        of_a_load = opened(live)[len(before) :]
        before = opened(live)
        for name, action in product(NAMES, ACTIONS):
            path = quote(f"/v1/models/{name}{action}", safe="/%?=;.:~$'\"<>{}()|`\\_-")
            ask(live.port, request("POST" if action else "GET", path.replace('"', "%22"), **key))
        load(live)
        assert opened(live)[len(before) :] == of_a_load
        note(f"{len(NAMES) * len(ACTIONS)} hostile names opened no file; control: {len(of_a_load)}")
        assert any("peaks.safetensors" in line for line in of_a_load), "the control"


def load(live: LiveServer) -> None:
    """Load a model, and wait until this is in the log, and with it all that was opened before."""
    lines = len(live.log)
    assert ask(live.port, request("POST", "/v1/models/peaks/load", Authorization="Bearer admin")).status == 200
    wait_until(lambda: any("load peaks: status 200" in line for line in live.log[lines:]))


def opened(live: LiveServer) -> list[str]:
    """Return the files that the front end has opened so far."""
    return [line for line in live.log if line.startswith("opened ")]


def test_metrics_have_no_series_more_after_a_scan(server: LiveServer, note: Note) -> None:
    def series() -> set[str]:
        text = ask(server.port, request("GET", "/metrics")).body.decode()
        return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}

    verbs = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD")
    list(flood(server.port, [(verb, path, "x") for verb in verbs for path in ("/none", "/v1/models/none")]))
    list(flood(server.port, [("POST", "/v1/models/none/value", "x")]))
    ask(server.port, request("GET", "/metrics"))
    before = series()
    random_, count = random.Random(3), choose(2000, 10_000)
    word = "abcdefghijklmnopqrstuvwxyz0123456789._-"

    def path() -> str:
        name = "".join(random_.choices(word, k=random_.randrange(1, 30)))
        return random_.choice(["/{}", "/v1/{}", "/v1/models/{}", "/v1/models/{}/value"]).format(name)

    for _ in flood(server.port, [(random_.choice(verbs), path(), "x") for _ in range(count)]):
        pass
    after = series()
    known = re.compile(r'status="(200|4\d\d)"')
    new = {name for name in after - before if not known.search(name)}
    note(f"{count} random paths and names: {len(after - before)} series more of {len(after)}")
    assert not new
    assert len(after - before) <= 20, "a status seen for the first time on a known route, and its kind"
    assert not any("random" in name for name in after)


def test_every_set_of_quantities_is_counted_under_few_labels(server: LiveServer) -> None:
    body = {"inputs": [0.5] * 8, "directions": [[1] * 8]}
    counts = choose((1, 2, len(QUANTITIES) - 1, len(QUANTITIES)), (1, 2, 3, len(QUANTITIES) - 1, len(QUANTITIES)))
    sets = [names for count in counts for names in combinations(QUANTITIES, count)]
    for names in sets:
        reply = ask(
            server.port,
            post("/v1/models/borehole_ensemble/evaluate", json.dumps({**body, "quantities": names}).encode()),
        )
        assert reply.status == 200, reply
    text = ask(server.port, request("GET", "/metrics")).body.decode()
    assert len(sets) > choose(60, 180)
    assert set(re.findall(r'hessquik_batch_rows_count{quantities="([^"]*)"}', text)) == {*QUANTITIES, "several"}


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"nonsense",
        request("GET", "/" + "a" * 20_000),
        b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000,
    ],
    ids=["bare line feeds", "nonsense", "long", "long and not whole"],
)
def test_what_is_refused_before_it_is_a_request_is_counted(server: LiveServer, data: bytes) -> None:
    sample = 'hessquik_requests_total{route="refused",status="400"}'
    before = server.metric(sample)
    assert b"malformed_body" in exchange(server.port, data + b"\r\n\r\n", 5)
    assert server.metric(sample) == before + 1
