"""Starting, configuring and watching ``hessquik serve``: flags, variables, keys that change, and its logs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner, Result

from hessquik_client.errors import StartUpError
from service import cli, devices, logs
from service.app import create_app
from service.http.messages import Head, Request
from service.keys import Keys
from service.periodic import repeat
from service.server import bind, listen, url
from service.settings import Settings, explain
from service.supervisor import reserve, supervise
from tests.live import LiveServer
from tests.whole import choose

WAIT_S = 20.0
POINT = {"inputs": [[0.1, 0.2], [0.3, 0.4]]}
#: Reasons for a name without an address; the second where the machine has no network.
UNKNOWN = "name or service not known|temporary failure in name resolution"


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["serve", *arguments])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("HESSQUIK_MAX_ROW", "HESSQUIK_MAX_ROWS"),
        ("HESSQUIK_APIKEYS", "HESSQUIK_API_KEYS"),
        ("HESSQUIK_KEYS", "HESSQUIK_API_KEYS"),
        ("hessquik_devise", "HESSQUIK_DEVICE"),
    ],
)
def test_an_unknown_variable_refuses_the_start(name: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    done = serve()
    assert done.exit_code == 2
    assert f"{name} is no setting; the nearest is {nearest}" in done.output


@pytest.mark.parametrize("name", ["HESSQUIK_API_KEY", "HESSQUIK_KEY"])
def test_a_clients_key_does_not_start_a_service_that_needs_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.app.create_app", lambda *_: pytest.fail("the service starts"))
    monkeypatch.setenv(name, "a")
    done = serve()
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert f"got a client's {name} and no API keys; set HESSQUIK_API_KEYS" in done.output
    assert "port" in serve("--port", "x", "--api-keys", "b").output  # beside keys it is no fault


@pytest.mark.parametrize("name", sorted(Settings.model_fields.keys() - {"models"}))
def test_every_setting_is_a_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that none takes is refused by the setting's name; a switch takes none."""
    flag = f"--{name.replace('_', '-')}"
    if Settings.model_fields[name].annotation is bool:
        done = serve(flag, "--port", "x")
        assert (done.exit_code, "hessquik: port:" in done.output) == (2, True)
    elif name in {"host", "device", "api_keys", "admin_keys"}:  # any text will do
        done = serve(flag, "x", "--port", "x")
        assert (done.exit_code, "hessquik: port:" in done.output) == (2, True)
    else:
        done = serve(flag, "/nowhere")
        assert (done.exit_code, f"hessquik: {name}:" in done.output) == (2, True)


def test_a_flag_wins_over_a_variable_and_that_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hessquik_api_keys").write_text("file\n")
    (tmp_path / "hessquik_admin_keys").write_text("file\n")
    (tmp_path / "hessquik_max_rows").write_text("7\n")
    monkeypatch.setenv("HESSQUIK_SECRETS", str(tmp_path))
    monkeypatch.setenv("HESSQUIK_ADMIN_KEYS", "variable")
    monkeypatch.setenv("HESSQUIK_MAX_ROWS", "8")
    settings = Settings.of({"max_rows": "9"})
    assert [key.get_secret_value() for key in (*settings.api_keys, *settings.admin_keys)] == ["file", "variable"]
    assert settings.max_rows == 9
    (tmp_path / "hessquik_api_keys").write_text("other")
    assert settings.again().api_keys[0].get_secret_value() == "other"
    assert settings.again().max_rows == 9
    assert "file" not in str(settings.shown())


def test_a_number_without_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, field in Settings.model_fields.items():
        if field.annotation in (int, float):
            for value in ("inf", "-inf", "nan", "1" + "0" * 22, "-1"):
                with pytest.raises(ValueError, match=name) as caught:
                    Settings.of({name: value})
                assert "\n" not in explain(caught.value)
    for few in ("1e-9", "0.04"):
        with pytest.raises(ValueError, match="expected 0 or at least"):
            Settings.of({"watch_s": few})
    assert Settings.of({"watch_s": "0", "drain_s": "0"}).watch_s == 0


def keys_of(settings: Settings) -> list[str]:
    return [key.get_secret_value() for key in settings.api_keys]


def test_keys_are_separated_by_commas_and_white_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hessquik_api_keys"
    for text in ("a,b", "a\nb\n", "a\r\nb\r\n", " a,\tb ,", "\ufeffa\nb"):
        path.write_text(text, "utf-8")
        assert keys_of(Settings(secrets=tmp_path)) == ["a", "b"], text
        monkeypatch.setenv("HESSQUIK_API_KEYS", text.removeprefix("\ufeff"))
        assert keys_of(Settings()) == ["a", "b"], text
        monkeypatch.delenv("HESSQUIK_API_KEYS")


def test_an_empty_value_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hessquik_api_keys").write_text("a")
    for name in ("secrets", "host", "api_keys"):
        monkeypatch.setenv(f"HESSQUIK_{name.upper()}", "")
    settings = Settings()
    assert (settings.secrets, settings.host, settings.api_keys) == (None, "127.0.0.1", ())
    assert keys_of(Settings(secrets=tmp_path)) == ["a"]
    assert "port:" in serve("--secrets", "", "--host", "", "--port", "x").output


@pytest.mark.parametrize("names", ["API_KEYS", "ADMIN_KEYS"])
def test_what_holds_no_key_though_it_says_something_is_refused(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"HESSQUIK_{names}", " ,")
    done = serve()
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert "expected keys" in done.output


#: Files in the folder of secrets that cannot be what was meant, and the words for them.
BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "expected text in UTF-8"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "expected a file"),
    "folder": (Path.mkdir, "expected a file"),
    "pipe": (os.mkfifo, "expected a file"),
    "commas": (lambda path: path.write_text(",\n"), "expected keys"),
    "almost the name": (
        lambda path: path.with_name("hessquik_api_key").write_text("b"), "the nearest is HESSQUIK_API_KEYS",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_of_keys_refuses_the_start_and_leaves_the_keys_of_a_running_service(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, words = BAD_FILES[what]
    path = tmp_path / "hessquik_api_keys"
    path.write_text("a")
    keys = Keys(Settings.of({"secrets": str(tmp_path)}))
    path.unlink()
    spoil(path)
    keys.ask()
    keys.follow()
    assert keys.is_known(b"a")
    assert not keys.is_known(b"b")
    assert f"the keys stay as they are, they cannot be read: {words}".partition(": ")[0] in caplog.text
    assert words in caplog.text
    done = serve("--secrets", str(tmp_path))
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert words in done.output


def test_a_folder_of_secrets_that_cannot_be_looked_at_is_refused_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one in a folder that is closed to the service; a name that is too long stands for it."""
    folder = f"{tmp_path}/{'x' * 300}"
    done = serve("--secrets", folder)
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert f"hessquik: expected a file that can be read at {folder}, got: File name too long" in done.output
    (tmp_path / "hessquik_api_keys").write_text("a")
    keys = Keys(Settings.of({"secrets": str(tmp_path)}))
    keys._settings._flags["secrets"] = folder
    keys.reload()
    assert keys.is_known(b"a")
    assert f"stay as they are, they cannot be read: expected a file that can be read at {folder}" in caplog.text


def test_a_folder_of_secrets_without_keys_is_a_warning_and_no_folder_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Compose mounts empty files where there are no keys."""
    for name in ("api", "admin"):
        (tmp_path / f"hessquik_{name}_keys").write_text("")
    caplog.set_level(logging.INFO, "service.logs")
    for settings in (Settings(secrets=tmp_path), Settings(), Settings(api_keys="a")):
        logs.log_start(settings)
    said = [(one.levelname, one.getMessage()) for one in caplog.records if "no API keys" in one.getMessage()]
    assert said == [
        ("WARNING", f"no API keys in {tmp_path}: every request is answered"),
        ("INFO", "no API keys: every request is answered"),
    ]


def test_what_is_done_periodically_goes_on_after_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("fail")
        raise OSError("no luck")

    async def work() -> None:
        repeating = asyncio.ensure_future(repeat(0.0, fail, lambda: done.append("other")))
        while len(done) < 6:
            await asyncio.sleep(0)
        repeating.cancel()

    asyncio.run(work())
    assert done[:4] == ["fail", "other"] * 2
    assert caplog.text.count("OSError: no luck") >= 2


def has_ipv6() -> bool:
    """Return whether this machine has an IPv6 address of its own; many a container has none."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.parametrize("is_shared", [False, True])
def test_an_address_means_the_same_for_one_and_for_several_front_ends(is_shared: bool) -> None:
    """:: takes IPv4, too; a name stands for its IPv4 address."""
    addresses = [("localhost", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")]
    if has_ipv6():
        addresses += [("::", "127.0.0.1"), ("::", "::1")]
    for host, reached in addresses:
        with bind(host, 0, is_shared) as sock:
            sock.listen()
            socket.create_connection((reached, sock.getsockname()[1]), 5).close()
            assert url(sock).startswith("http://[::1]:" if host == "::" else "http://127.0.0.1:")


def test_an_address_that_front_ends_will_share_is_refused_to_other_services() -> None:
    """Also before they listen; ours may have it."""
    with reserve("127.0.0.1", 0) as kept:
        port = kept.getsockname()[1]
        for claim in (reserve, listen):
            with pytest.raises(StartUpError, match="Address already in use"):
                claim("127.0.0.1", port)
        with bind("127.0.0.1", port, is_shared=True) as front:
            front.listen()
            with pytest.raises(StartUpError, match=f"got host 0.0.0.0 and port {port}"):
                reserve("0.0.0.0", port)
    with pytest.raises(StartUpError, match=r"got host a\.\.b and port 0"):
        listen("a..b", 0)


def test_several_front_ends_without_opentelemetry_are_refused_as_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    settings = Settings(tracing=True, processes=2, port=0, device="cpu")
    for start in (supervise, create_app):
        with pytest.raises(StartUpError, match="expected OpenTelemetry"):
            start(settings)


def test_a_driver_that_hangs_ends_the_start_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **_: object) -> None:
        assert command[1] == "-P", "or a torch.py of the current folder would be run"
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(devices, "subprocess", SimpleNamespace(run=hang, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(devices.Path, "exists", lambda _: True)
    with pytest.raises(StartUpError, match="expected a driver that names its CUDA devices within 120 s"):
        devices.resolve_devices("auto", 1)


@pytest.mark.parametrize(
    ("host", "reason", "processes"),
    [
        ("127.0.0.1", "address already in use", 1),
        ("127.0.0.1", "address already in use", 2),
        pytest.param("none.invalid", UNKNOWN, 1, marks=pytest.mark.whole),
        ("none.invalid", UNKNOWN, 2),
    ],
)
def test_an_address_that_cannot_be_had_ends_the_start_with_one_line(
    host: str, reason: str, processes: int, shipped_models: Path
) -> None:
    """Of errors; what was logged before it is information."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--host", host, "--port", str(port), "--device", "cpu", "--processes", str(processes)]
        command = [sys.executable, "-m", "service", "serve", str(shipped_models), *flags]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 3
    (line,) = (line for line in ended.stderr.splitlines() if " INFO " not in line)
    assert f"expected an address of this machine and a free port, got host {host} and port {port}: " in line
    assert ended.stderr.endswith(f"{line}\n")
    assert re.search(reason, line.lower())
    assert ended.stdout == ""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_start_that_fails_says_so_in_the_format_of_the_log(processes: int, tmp_path: Path) -> None:
    flags = ["--port", "0", "--device", "cpu", "--log-format", "json", "--processes", str(processes)]
    command = [sys.executable, "-m", "service", "serve", str(tmp_path / "nowhere"), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 3
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    (error,) = (line for line in lines if line["level"] == "error")
    assert error["message"] == f"expected a folder of models at {tmp_path / 'nowhere'}, found nothing"


@pytest.mark.parametrize(("arguments", "words"), [(["--workers", "0"], "workers"), (["--nonsense"], "nonsense")])
def test_a_wrong_flag_is_named(arguments: list[str], words: str) -> None:
    done = serve("models", "--port", "0", *arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_version_is_shown() -> None:
    done = CliRunner().invoke(cli.app, ["--version"])
    assert done.exit_code == 0
    assert done.output.startswith("hessquik 0.")
    assert "torch 2." in done.output
    assert "interpreted modules" in done.output


class Operated:
    """A server with files of keys, JSON logs and an access log."""

    def __init__(self, models: Path, folder: Path, processes: int) -> None:
        self.secrets = folder / "secrets"
        self.secrets.mkdir()
        self.write("api", "one")
        self.write("admin", "boss")
        self._access = folder / "access"
        self._out = self._access.open("w")
        settings = {"secrets": self.secrets, "processes": processes, "log_format": "json", "access_log": "true"}
        self.live = LiveServer(models, settings=settings, stdout=self._out)

    def write(self, kind: str, text: str) -> None:
        """Replace a file of keys."""
        new = self.secrets / "new"
        new.write_bytes(os.fsencode(text))
        new.rename(self.secrets / f"hessquik_{kind}_keys")

    def post(self, path: str, key: str, **options: Any) -> int:
        headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
        return httpx.post(f"{self.live.url}/v1/models/{path}", headers=headers, **options).status_code

    def access(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._access.read_text().splitlines()]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.live.log if line.startswith("{")]

    def close(self) -> None:
        assert self.live.stop() == 0
        self._out.close()


def until(check: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(name="operated", scope="module", params=choose([2], [1, 2]), ids=lambda count: f"{count} front ends")
def start(
    request: pytest.FixtureRequest, shipped_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operated]:
    operated = Operated(shipped_models, tmp_path_factory.mktemp("operated"), request.param)
    operated.live.wait_until_ready()
    yield operated
    operated.close()


def test_the_start_says_versions_settings_and_backend(operated: Operated) -> None:
    records = operated.records()
    (configured,) = [record for record in records if "settings" in record]
    assert configured["settings"]["api_keys"] == "1 keys"
    assert configured["settings"]["max_rows"] == Settings().max_rows
    paths = (str(operated.live.models), str(operated.secrets))
    assert not re.search(r"\bone\b", re.sub("|".join(map(re.escape, paths)), "", configured["message"]))
    (versions,) = [record["versions"] for record in records if "versions" in record]
    assert versions.keys() == {"version", "python", "torch", "modules"}
    assert any("is up: torch 2." in record["message"] and "backend " in record["message"] for record in records)


def test_every_request_is_a_line_of_the_access_log(operated: Operated) -> None:
    status = operated.post("peaks/hessian", "one", json=POINT, headers={"X-Request-Id": "run-7"})
    refused = operated.post("peaks/hessian", "zero", json=POINT, headers={"X-Request-Id": "run-8"})
    assert (status, refused) == (200, 401)
    until(lambda: {"run-7", "run-8"} <= {line["request_id"] for line in operated.access()}, "two lines are written")
    lines = {line["request_id"]: line for line in operated.access()}
    answered = lines["run-7"]
    assert answered.pop("time").endswith("+00:00")
    assert 0 < answered.pop("milliseconds") < 60_000
    route = "/v1/models/{model}/hessian"
    assert answered == {
        "request_id": "run-7", "method": "POST", "route": route, "model": "peaks", "rows": 2, "status": 200,
    }  # fmt: skip
    assert (lines["run-8"]["rows"], lines["run-8"]["status"]) == (0, 401)


def test_loads_are_audited_with_the_key_that_asked(operated: Operated) -> None:
    assert operated.post("peaks/load", "boss", headers={"X-Request-Id": "load-1"}) == 200
    assert operated.post("peaks/load", "one", headers={"X-Request-Id": "load-2"}) == 403
    assert operated.post("nothing/unload", "boss", headers={"X-Request-Id": "load-3"}) == 404
    inference = "../../v2/repository/models/peaks/load"  # the Open Inference Protocol's path
    assert operated.post(inference, "boss", headers={"X-Request-Id": "load-4"}) == 200
    assert operated.post(inference, "one", headers={"X-Request-Id": "load-5"}) == 403

    def audited() -> dict[str, dict[str, Any]]:
        return {one["request_id"]: one for one in operated.records() if one["logger"] == "service.audit"}

    until(lambda: len(audited()) >= 5, "five audit lines")
    found = audited()
    assert {one: (found[one]["action"], found[one]["model"], found[one]["status"]) for one in found} == {
        "load-1": ("load", "peaks", 200),
        "load-2": ("load", "peaks", 403),
        "load-3": ("unload", "nothing", 404),
        "load-4": ("load", "peaks", 200),
        "load-5": ("load", "peaks", 403),
    }
    assert found["load-1"]["key"] == found["load-3"]["key"] != found["load-2"]["key"]
    assert operated.post("nothing/unload?version=7&version=8&key=boss", "two") == 401
    assert operated.post("nothing/unload?version=7", "boss", headers={"X-Request-Id": "load-6"}) == 404
    until(lambda: "load-6" in audited(), "another audit line")
    last = audited()["load-6"]
    assert (last["version"], last["message"]) == ("7", f"unload nothing version 7: status 404, key {last['key']}")

    def models() -> dict[str, str]:
        return {line["request_id"]: line["model"] for line in operated.access() if line["request_id"] in found}

    until(lambda: len(models()) == len(found), "the lines are written, by each front end its own")
    assert models() == {"load-1": "peaks", "load-2": "", "load-3": "", "load-4": "peaks", "load-5": ""}
    assert not any("boss" in line for line in operated.live.log)


def test_keys_are_read_again_when_their_file_changes_and_at_a_hangup(operated: Operated) -> None:
    """A connection that is kept, and whose head is remembered, is refused with the old key, too."""
    with httpx.Client(base_url=operated.live.url, headers={"Authorization": "Bearer one"}) as kept:
        for _ in range(3):
            assert kept.post("/v1/models/peaks/value", json=POINT).status_code == 200
        operated.write("api", "two")
        until(lambda: operated.post("peaks/value", "two", json=POINT) == 200, "the new key lets in")
        until(lambda: kept.post("/v1/models/peaks/value", json=POINT).status_code == 401, "the old one does not")
    before = len([line for line in operated.live.log if "keys read again" in line])
    operated.live.process.send_signal(signal.SIGHUP)
    until(
        lambda: len([line for line in operated.live.log if "keys read again" in line]) > before,
        "keys are read at SIGHUP",
    )
    assert operated.live.process.poll() is None
    assert operated.post("peaks/value", "two", json=POINT) == 200
    operated.write("api", "one")
    until(lambda: operated.post("peaks/value", "one", json=POINT) == 200, "the first key lets in again")


def test_a_file_without_keys_does_not_open_the_service(operated: Operated) -> None:
    operated.write("api", "")
    until(lambda: any("open to everybody" in line for line in operated.live.log), "the empty file is refused")
    assert operated.post("peaks/value", "none", json=POINT) == 401
    assert operated.post("peaks/value", "one", json=POINT) == 200
    operated.write("api", "\udcff\udcfe")
    until(lambda: any("expected text in UTF-8" in line for line in operated.live.log), "the bad file is refused")
    assert operated.post("peaks/value", "one", json=POINT) == 200
    assert httpx.get(f"{operated.live.url}/readyz").status_code == 200
    operated.write("api", "one")


def test_a_second_service_does_not_share_the_port(operated: Operated, shipped_models: Path) -> None:
    flags = ["--port", str(operated.live.port), "--processes", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "service", "serve", str(shipped_models), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 3
    assert "expected an address of this machine and a free port" in ended.stderr


def test_a_hangup_ends_neither_workers_nor_front_ends(operated: Operated) -> None:
    server = psutil.Process(operated.live.process.pid)
    before = server.children(recursive=True)
    for process in (server, *before):
        process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert operated.post("peaks/value", "one", json=POINT) == 200
    assert server.children(recursive=True) == before


def test_a_reader_that_is_slow_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that find no room are dropped, and the next line says how many."""
    monkeypatch.setattr(logs, "MAX_LINES", 100)
    monkeypatch.setattr(logs, "CLOSE_S", 10.0)
    read, write = os.pipe()
    log = logs.AccessLog(write)
    request = Request.of(Head("POST", "/", b"", {}), lambda *_: True)
    for _ in range(5000):  # more than a pipe holds
        log.ended(request, "x" * 100, 200)
    lines: list[dict[str, Any]] = []
    with os.fdopen(read) as reader:
        taker = Thread(target=lambda: lines.extend(map(json.loads, reader)))
        taker.start()
        until(log._lines.empty, "there is room again")
        log.ended(request, "last", 200)
        log.close()
        os.close(write)
        taker.join(10)
    lost = sum(line.get("lost_lines", 0) for line in lines)
    assert lost > 1000
    assert len(lines) + lost == 5001
    assert lines[-1]["route"] == "last"


def test_a_log_that_is_not_read_blocks_nobody_and_says_how_many_lines_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "CLOSE_S", 10.0)
    read, write = os.pipe()
    handler = logs.LogHandler(logs.Lines(write, 10))
    handler.setFormatter(logs.TextFormatter("%(message)s"))
    for _ in range(2000):  # more than a pipe holds
        handler.handle(logging.makeLogRecord({"msg": "x" * 100}))
    with os.fdopen(read, errors="strict") as reader:
        lines: list[str] = []
        taker = Thread(target=lambda: lines.extend(reader))
        taker.start()
        until(handler._lines._lines.empty, "there is room again")
        handler.handle(logging.makeLogRecord({"msg": "caf\udce9"}))
        handler.close()
        os.close(write)
        taker.join(10)
    assert lines[-1].startswith("caf\\udce9 lost_lines=")
    assert len(lines) + sum(int(line.partition(" lost_lines=")[2] or 0) for line in lines) == 2001
