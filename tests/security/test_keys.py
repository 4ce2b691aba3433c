"""Every route needs its key, whatever the verb, the form of the path and the Host."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import time
from collections.abc import Iterator
from itertools import product

import pytest

from service.app import create_app
from service.assets import ASSETS
from service.settings import Settings
from tests.live import LiveServer
from tests.raw import Reply, ask, check_error, post, receive_all, replies, request
from tests.security.conftest import KEYS
from tests.security.test_limits import VALUE, chunked
from tests.whole import Note, choose

VERBS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")
FORMS = {
    "as it is": lambda path: path,
    "slash after": lambda path: path + "/",
    "two slashes": lambda path: "/" + path,
    "dot": lambda path: "/." + path,
    "up": lambda path: "/livez/.." + path,
    "after an open one": lambda path: "/livez" + path,
    "encoded letter": lambda path: path[:-1] + f"%{ord(path[-1]):02x}",
    "encoded slash": lambda path: "/" + path[1:].replace("/", "%2f"),
    "capitals": lambda path: path.upper(),
    "parameter": lambda path: path + ";/livez",
    "query": lambda path: path + "?x=/livez",
    "absolute": lambda path: "http://localhost/livez/.." + path,
    "absolute, right": lambda path: "http://x" + path,
    "nul": lambda path: path + "%00/livez",
    "backslash": lambda path: "/livez\\.." + path,
}
HOSTS = (
    "localhost", "x", "", "/livez", "/livez?", "/livez#", "localhost/livez", "localhost:80/livez", "127.0.0.1",
    "[::1]", "[::1]:80", "localhost:99999", "localhost:x", "a b", "é", "%2flivez", "@/livez", "user@host",
    "http://x/livez", "x?/livez", "x#/livez", "x\\livez", "..", "*", "x, y", "x;y", "0", "-", "." * 200, "livez",
)  # fmt: skip
OPEN = {"/livez", "/readyz", *ASSETS}


def paths() -> list[str]:
    """Return every path of the application, with a model's name in it."""
    found = create_app(Settings(device="cpu")).front.table()
    filled = {re.sub(r"\{[^}]*\}", "1", path.replace("{model}", "peaks")) for path in found}
    return sorted(filled | {"/openapi.json", "/docs", "/metrics", "/nothing", "/"})


def flood(port: int, asked: list[tuple[str, str, str]]) -> Iterator[tuple[tuple[str, str, str], Reply]]:
    """Yield the reply to each (verb, path, host), over persistent connections."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        for verb, path, host in asked:
            connection.putrequest(verb, path, skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", host.encode("latin-1"))
            connection.putheader("Content-Length", "0")
            connection.endheaders()
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            yield (verb, path, host), Reply(response.status, headers, response.read())
            if response.will_close:
                connection.close()


def test_no_route_answers_without_a_key(locked: LiveServer, note: Note) -> None:
    asked = [
        (verb, form(path), host)
        for path, verb, form, host in product(
            (path for path in paths() if path not in OPEN), VERBS, FORMS.values(), choose(HOSTS[:1], HOSTS)
        )
    ]
    asked += [("GET", path, host) for path, host in product(paths(), HOSTS) if path not in OPEN]
    asked += [("POST", path, host) for path, host in product(paths(), HOSTS) if path not in OPEN]
    let_in = []
    for what, reply in flood(locked.port, asked):
        # Some forms are no HTTP, and the rest is refused before it is looked at.
        if reply.status not in (400, 401):
            let_in.append((what, reply.status))
        elif what[0] != "HEAD":
            check_error(reply)
    note(f"{len(asked)} requests without a key, {len(let_in)} let in")
    assert let_in == []


def test_open_paths_need_none_and_keys_open_the_others(locked: LiveServer) -> None:
    """Control: the same requests find a route without a key."""
    asked = [("GET", path, "x") for path in sorted(OPEN)]
    assert {reply.status for _, reply in flood(locked.port, asked)} == {200}
    for key in ("user-key-1", "user-key-2", "admin-key"):
        reply = ask(locked.port, request("GET", "/v1/models", Authorization=f"Bearer {key}"))
        assert reply.status == 200


@pytest.mark.parametrize(
    "value",
    [
        "", "Bearer", "Bearer ", "Bearer user-key", "Bearer user-key-11", "Bearer USER-KEY-1", "Basic user-key-1",
        "user-key-1", "Bearer user-key-1,user-key-2", "Bearer user-key-1 user-key-2", "Bearer \xe9", "Bearer *",
        "Bearer null", "Bearer " + "a" * 4000,
    ],
)  # fmt: skip
def test_wrong_keys_do_not_open(locked: LiveServer, value: str) -> None:
    reply = ask(locked.port, request("GET", "/v1/models", Authorization=value))
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    check_error(reply)
    assert b"key-1" not in reply.body


@pytest.mark.parametrize("name", ["X_Api_Key", "Proxy_Authorization", "Cookie", "X_Authorization"])
def test_keys_in_other_fields_do_not_open(locked: LiveServer, name: str) -> None:
    assert ask(locked.port, request("GET", "/v1/models", **{name: "Bearer user-key-1"})).status == 401
    assert (
        ask(locked.port, request("GET", "/v1/models?key=user-key-1&authorization=Bearer%20user-key-1")).status == 401
    )


def test_a_key_in_a_trailer_does_not_open(locked: LiveServer) -> None:
    data = (
        b"POST /v1/models/peaks/value HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'10\r\n{"inputs":[1,2]}\r\n0\r\nAuthorization: Bearer user-key-1\r\n\r\n'
    )
    assert ask(locked.port, data).status == 401


@pytest.mark.parametrize("action", ["load", "unload"])
def test_a_users_key_does_not_change_models(locked: LiveServer, action: str) -> None:
    reply = ask(locked.port, request("POST", f"/v1/models/peaks/{action}", Authorization="Bearer user-key-1"))
    assert (reply.status, reply.json()["code"]) == (403, "forbidden")
    assert ask(locked.port, request("GET", "/v1/models/peaks", Authorization="Bearer user-key-1")).status == 200


@pytest.mark.parametrize("action", ["load", "unload"])
def test_nobody_changes_models_where_no_admin_key_is_set(narrow: LiveServer, action: str) -> None:
    for form in FORMS.values():
        reply = ask(narrow.port, request("POST", form(f"/v1/models/peaks/{action}"), Authorization="Bearer x"))
        assert reply.status in (400, 403, 404, 405), reply
    assert ask(narrow.port, request("GET", "/v1/models/peaks")).status == 200


def test_keys_are_in_no_log_line_and_no_representation(locked: LiveServer) -> None:
    secrets = [key for keys in KEYS.values() for key in keys.split(",")]
    text = "\n".join(locked.log) + repr(Settings(**KEYS)) + str(Settings(**KEYS).model_dump())  # type: ignore[arg-type]
    assert not any(secret in text for secret in secrets)


def test_a_missing_key_is_counted_under_the_route(locked: LiveServer) -> None:
    def counts() -> list[float]:
        sample = 'hessquik_requests_total{route="%s",status="401"}'
        return [locked.metric(sample % route, "user-key-1") for route in ("/v1/models/{model}/value", "/v1/models")]

    value, models = counts()
    point = b'{"inputs":[0.5,0.25]}'
    for data in (post(VALUE, point), chunked(VALUE, point, 7), request("GET", "/v1/models")):
        assert ask(locked.port, data).status == 401
    assert counts() == [value + 2, models + 1]


def test_a_head_that_was_read_before_means_what_it_meant_and_no_other(locked: LiveServer) -> None:
    data = post(VALUE, b'{"inputs":[0.5,0.25]}', Connection="keep-alive")
    with socket.create_connection(("127.0.0.1", locked.port), 10) as connection:
        for key in ("user-key-1", "wrong", "", "user-key-1") * 3:
            field = f"Authorization: Bearer {key}\r\n".encode() if key else b""
            connection.sendall(data.replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n", 1))
            time.sleep(0.03)
        connection.sendall(post(VALUE, b"{}"))
        statuses = [reply.status for reply in replies(receive_all(connection))]
    assert statuses == [200, 401, 401, 200] * 3 + [401]
