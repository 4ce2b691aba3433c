"""``hessquik bench``: it counts what a real service answers, and says so when it fails."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import safetensors.numpy

from service import loadtest
from service.loadtest import Load
from tests.live import ROOT, LiveServer

FACTS = {
    "name": "peaks",
    "d": 2,
    "dtype": "float64",
    "metadata": {"lower_bounds": [-3.0, 5.0], "upper_bounds": [-2.0, 7.0]},
}


def bench(url: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Return the command's status, output and errors."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "bench", url, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def bench_here(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> tuple[int, str]:
    """Return the command's status and all that it prints, without a process of its own."""
    try:
        status = loadtest.main([url, *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    return status, "".join(capsys.readouterr())


def load(url: str, **options: object) -> Load:
    """Load on peaks."""
    chosen = {"quantities": ["value"], "clients": 2, "rows": 3, "seconds": 0.4, "is_binary": False, **options}
    return loadtest.build_load(url, FACTS, **chosen)  # type: ignore[arg-type]


def body(request: bytes) -> bytes:
    """Return the body, without the head."""
    return request.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("is_binary", [False, True], ids=["json", "safetensors"])
def test_requests_ask_at_points_within_the_bounds(is_binary: bool) -> None:
    made = load("http://localhost:1", is_binary=is_binary)
    assert len(set(made.requests)) == len(made.requests) > 1
    for request in made.requests:
        if is_binary:
            inputs = safetensors.numpy.load(body(request))["inputs"]
        else:
            inputs = np.array(orjson.loads(body(request))["inputs"])
        assert inputs.shape == (3, 2)
        assert np.all((inputs >= [-3, 5]) & (inputs <= [-2, 7]))


@pytest.mark.parametrize(
    ("is_binary", "quantities"),
    [(False, ["value", "gradient", "hessian"]), (True, ["value", "hvp"])],
    ids=["json", "safetensors"],
)
def test_every_answer_of_a_live_service_is_counted(
    server: LiveServer, is_binary: bool, quantities: list[str]
) -> None:
    sample = 'hessquik_requests_total{route="/v1/models/{model}/evaluate",status="200"}'
    before = server.metric(sample)
    tally = asyncio.run(loadtest.run(load(server.url, quantities=quantities, is_binary=is_binary)))
    assert not tally.errors
    assert tally.answers == server.metric(sample) - before > 2
    assert 0 < tally.percentile_ms(50) <= tally.percentile_ms(99) < 10_000
    assert 0.4 <= tally.elapsed_s < 5


def test_refusals_are_counted_by_their_code(server: LiveServer) -> None:
    wrong = load(server.url)
    request = wrong.requests[0].replace(b"/models/peaks/", b"/models/nowhere/")
    tally = asyncio.run(loadtest.run(Load(server.url, [request], 3, 2, 0.3)))
    assert set(tally.errors) == {"model_not_found"}
    assert tally.answers == 0


Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    writer.close()


async def talk_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    writer.write(b"hello\r\n\r\n")
    await writer.drain()
    writer.close()


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1000):
        pass
    writer.close()


@pytest.mark.parametrize(
    ("reply", "code"),
    [(hang_up, "connection_lost"), (talk_nonsense, "connection_lost"), (say_nothing, "no_answer")],
    ids=["hang-up", "nonsense", "silence"],
)
def test_what_is_no_answer_is_an_error(reply: Reply, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadtest, "LINGER_S", 0.1)

    async def attempt() -> loadtest.Tally:
        async with await asyncio.start_server(reply, "127.0.0.1", 0) as there:
            port = there.sockets[0].getsockname()[1]
            return await loadtest.run(load(f"http://127.0.0.1:{port}", seconds=0.2))

    tally = asyncio.run(attempt())
    assert tally.answers == 0
    assert set(tally.errors) == {code}


def test_command_shows_a_table_and_succeeds(server: LiveServer) -> None:
    options = ("--model", "peaks", "--clients", "3", "--rows", "2", "--seconds", "0.5", "--binary")
    status, output, errors = bench(server.url, *options)
    assert status == 0, output + errors
    answered = int(re.search(r"(\d+) answered, 0 failed", output)[1])  # type: ignore[index]
    rates = {name: float(re.search(rf"{name} +\S +([\d.]+)", output)[1]) for name in ("requests/s", "rows/s", "p99")}  # type: ignore[index]
    assert answered > 3
    assert rates["rows/s"] == pytest.approx(2 * rates["requests/s"], rel=1e-3)
    assert rates["p99"] > 0
    assert 0 < int(re.search(r"devices busy +│ (\d+)%", output)[1]) <= 100  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--model", "nowhere"), 1, "served model"),
        (("--model", "peaks", "--quantities", "jacobian"), 2, "jacobian"),
        (("--model", "peaks", "--rows", "0"), 2, "greater than or equal to 1|not in the range"),
        (
            ("--model", "peaks", "--rows", "70000", "--seconds", "0.3", "--quantities", "value"),
            1,
            "body_too_large|invalid_input",
        ),
    ],
    ids=["model", "quantity", "range", "refused"],
)
def test_command_fails_and_says_why(
    server: LiveServer, arguments: tuple[str, ...], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, printed = bench_here(capsys, server.url, *arguments)
    assert got == status, printed
    assert re.search(message, printed)


def test_command_fails_where_nobody_listens() -> None:
    status, output, errors = bench("http://127.0.0.1:9", "--model", "peaks")
    assert status == 1, output
    assert errors.startswith("hessquik: ")


def test_key_is_sent_with_every_request() -> None:
    made = load("http://localhost:1", api_key="secret")
    assert all(b"\r\nauthorization: Bearer secret\r\n" in request for request in made.requests)


@pytest.mark.parametrize("name", ["HESSQUIK_API_KEY", "HESSQUIK_KEY"])
def test_key_is_taken_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("HESSQUIK_API_KEY", "HESSQUIK_KEY"):
        monkeypatch.delenv(other, raising=False)
    given = ["http://localhost:1", "--model", "peaks"]
    assert loadtest.arguments().parse_args(given).api_key is None
    monkeypatch.setenv(name, "secret")
    assert loadtest.arguments().parse_args(given).api_key == "secret"
    assert loadtest.arguments().parse_args([*given, "--api-key", "other"]).api_key == "other"
    monkeypatch.setenv("HESSQUIK_API_KEY", "first")
    assert loadtest.arguments().parse_args(given).api_key == "first"


#: What the client's install alone does not have.
SERVER_PACKAGES = [
    *("torch", "fastapi", "starlette", "uvicorn", "pydantic", "typer", "click", "rich"),
    *("httptools", "uvloop", "orjson", "plotly"),
]


def test_command_runs_with_the_clients_packages_alone(server: LiveServer, tmp_path: Path) -> None:
    """Packages that are not installed are stood in for by modules that refuse to be imported."""
    for package in SERVER_PACKAGES:
        (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')")
    options = ("--model", "peaks", "--seconds", "0.5", "--rows", "2")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    status, output, errors = bench(server.url, *options, PYTHONPATH=path)
    assert status == 0, output + errors
    assert int(re.search(r"(\d+) answered, 0 failed", output)[1]) > 3  # type: ignore[index]
    refused = subprocess.run(
        [sys.executable, "-m", "service", "models"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert refused.returncode == 1
    assert "hessquik-service[server]" in refused.stderr


@pytest.mark.parametrize(
    "whole",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n",
    ],
    ids=["length", "chunked"],
)
@pytest.mark.parametrize("has_httptools", [True, False])
def test_both_parsers_understand_replies(whole: bytes, has_httptools: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_httptools:
        monkeypatch.setattr(loadtest, "httptools", None)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(100_000):
            for byte in whole:
                writer.write(bytes([byte]))
                await writer.drain()
        writer.close()

    async def attempt() -> loadtest.Tally:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as there:
            url = f"http://127.0.0.1:{there.sockets[0].getsockname()[1]}"
            return await loadtest.run(load(url, seconds=0.2))

    tally = asyncio.run(attempt())
    assert not tally.errors
    assert tally.answers > 2
    assert tally.received_bytes == 4 * tally.answers
