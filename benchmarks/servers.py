"""The servers that are compared: start, tuning, requests, suspension while others are measured, and stop."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
import psutil
from numpy.typing import NDArray

from tests import compiled

__all__ = [
    "CONTENDERS", "OURS", "Contender", "NotServing", "Server", "Tuning", "compile_ours", "make_peers_environment",
]  # fmt: skip

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers"
OURS_COMPILED = ROOT / "build" / "compiled"
START_S = 120.0
QUANTITIES = ("value", "gradient", "hessian")

Array = NDArray[np.float64]
Tuning = Mapping[str, float]
Command = tuple[list[str], dict[str, str]]


class NotServing(Exception):
    """A server did not start, or does not answer as it should; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One server.

    Attributes:
        name: Its name in tables.
        path: Where requests go.
        command: Model, port and tuning → command line and additions to the environment.
        grid: The tunings to choose from.
        body: Points (n, d) → the body of a request.
        read: The body of a reply → one array per quantity.
    """

    name: str
    path: str
    command: Callable[[Path, int, Tuning], Command]
    grid: tuple[Tuning, ...]
    body: Callable[[Array], bytes]
    read: Callable[[bytes], dict[str, Array]]


class Server:
    """A contender's process with all its children, in a separate session.

    Args:
        contender: Which.
        model: The saved network; for our own server its folder is served.
        tuning: One of the contender's grid.
    """

    def __init__(self, contender: Contender, model: Path, tuning: Tuning) -> None:
        """Start the process without waiting until it answers."""
        self.contender = contender
        self.tuning = tuning
        self.port = _free_port()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in stop
        command, additions = contender.command(model, self.port, tuning)
        alone = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        try:
            self._process = psutil.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(ROOT), **alone, **additions},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise NotServing(f"{Path(command[0]).name} does not run: {error.strerror}") from None

    def url(self, path: str | None = None) -> str:
        """Return the address of requests."""
        return f"http://127.0.0.1:{self.port}{self.contender.path if path is None else path}"

    def wait_until_serving(self, points: Array) -> Server:
        """Wait until it answers.

        Raises:
            NotServing: it ends, or does not answer in time.
        """
        end = time.monotonic() + START_S
        why = "no answer"
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise NotServing(f"it ended with status {self._process.returncode}: {self._last_words()}")
            try:
                self.ask(points[:1])
                return self
            except NotServing as error:
                why = str(error)
                time.sleep(0.1)
        raise NotServing(f"{why} within {START_S:g} s: {self._last_words()}")

    def ask(self, points: Array) -> dict[str, Array]:
        """Send one request and return the answer.

        Raises:
            NotServing: there is no answer.
        """
        return self.contender.read(self.post(self.contender.path, self.contender.body(points), "application/json"))

    def post(self, path: str, body: bytes, media_type: str) -> bytes:
        """Send one request and return the reply.

        Raises:
            NotServing: there is none.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Content-Type": media_type, "Accept": media_type})
            reply = connection.getresponse()
            data = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise NotServing(f"{type(error).__name__}") from None
        finally:
            connection.close()
        if reply.status != 200:
            raise NotServing(f"status {reply.status}: {data[:200]!r}")
        return data

    def error(self, points: Array, expected: Mapping[str, Array]) -> float:
        """Return the largest error over all quantities, relative to the largest entry, of requests sent all at once.

        Raises:
            NotServing: an answer is missing or has another shape.
        """
        with ThreadPoolExecutor(16) as executor:
            answers = list(executor.map(lambda i: self.ask(points[i : i + 1]), range(len(points))))
        worst = 0.0
        for name, wanted in expected.items():
            got = np.concatenate([answer[name] for answer in answers])
            if got.shape != wanted.shape:
                raise NotServing(f"expected {name} of shape {wanted.shape}, got {got.shape}")
            worst = max(worst, float(np.abs(got - wanted).max() / np.abs(wanted).max()))
        return worst

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and all its children."""
        return [self._process, *self._children()]

    def processor_s(self) -> float:
        """Return the processor time that the process and its children have used."""
        used = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def has_ended(self) -> bool:
        """Return whether its process is gone."""
        return self._process.poll() is not None

    def freeze(self) -> None:
        """Stop it from using the processor: the front first, so that what its workers do is still finished."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.suspend()
        time.sleep(0.05)
        for child in self._children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()

    def thaw(self) -> None:
        """Resume it (SIGCONT)."""
        for process in (*reversed(self._children()), self._process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def stop(self) -> None:
        """Stop the process and all its children."""
        children = self._children()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.thaw()
            self._process.terminate()
            with contextlib.suppress(psutil.TimeoutExpired):
                self._process.wait(5)
        for process in (self._process, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.wait(5)
        psutil.wait_procs(children, 5)
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _children(self) -> list[psutil.Process]:
        try:
            return self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _last_words(self) -> str:
        """Return the last lines of the server's log, without this machine's paths."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return " / ".join(lines[-2:])[-300:].replace(str(ROOT), ".").replace(str(Path.home()), "~")


def make_peers_environment() -> None:
    """Create the peers' environment unless it exists: their packages first, then this environment's.

    Raises:
        NotServing: it cannot be made.
    """
    python = PEERS / "bin" / "python"
    marker = PEERS / ".installed"
    wanted = (ROOT / "benchmarks" / "peers.txt").read_text()
    if marker.exists() and marker.read_text() == wanted:
        return
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(PEERS)], check=True)
        subprocess.run([*pip, "--requirement", str(ROOT / "benchmarks" / "peers.txt")], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotServing(f"the peers' environment cannot be made: {error}") from None
    paths = sysconfig.get_paths(vars={"base": str(PEERS), "platbase": str(PEERS)})
    Path(paths["purelib"], "zz_server.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    marker.write_text(wanted)


def compile_ours() -> None:
    """Build our own packages as the container image has them."""
    shutil.rmtree(OURS_COMPILED, ignore_errors=True)
    compiled.build(OURS_COMPILED)


def _free_port() -> int:
    """Return a free port such that the two after it are free, too, since Triton uses all three."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            for following in (port + 1, port + 2):
                held.enter_context(socket.socket()).bind(("127.0.0.1", following))
            return port


def _json_body(points: Array) -> bytes:
    return orjson.dumps({"inputs": points, "quantities": QUANTITIES}, option=orjson.OPT_SERIALIZE_NUMPY)


def _read_json(body: bytes) -> dict[str, Array]:
    document = orjson.loads(body)
    return {name: np.array(document[name]) for name in QUANTITIES}


def _triton_body(points: Array) -> bytes:
    tensor = {"name": "inputs", "shape": points.shape, "datatype": "FP64", "data": points.ravel()}
    return orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)


def _read_triton(body: bytes) -> dict[str, Array]:
    outputs = orjson.loads(body)["outputs"]
    return {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in outputs}


def _module(name: str, *arguments: object, is_peer: bool = True) -> list[str]:
    python = str(PEERS / "bin" / "python") if is_peer else sys.executable
    return [python, "-m", f"benchmarks.contenders.{name}", *map(str, arguments)]


def _start_ours(model: Path, port: int, tuning: Tuning) -> Command:
    flags = [word for name, value in tuning.items() for word in (f"--{name}", str(value))]
    arguments = [str(model.parent), "--port", str(port), *flags]
    packages = {"PYTHONPATH": str(OURS_COMPILED / "packages")}
    return [sys.executable, *compiled.COMMAND, "serve", *arguments], packages


def _start_interpreted(model: Path, port: int, tuning: Tuning) -> Command:
    command, _ = _start_ours(model, port, tuning)
    return command, {}


def _start_litserve(model: Path, port: int, tuning: Tuning) -> Command:
    wait_s = tuning["wait_ms"] / 1000
    return _module("litserve", model, port, tuning["max_batch_size"], wait_s, tuning["workers"]), {}


def _start_mosec(model: Path, port: int, tuning: Tuning) -> Command:
    knobs = {"MAX_BATCH_SIZE": "max_batch_size", "MAX_WAIT_MS": "wait_ms", "WORKERS": "workers"}
    environment = {variable: str(tuning[knob]) for variable, knob in knobs.items()}
    return _module("mosec", "--port", port, "--address", "127.0.0.1", "--timeout", 60_000), {
        "MODEL": str(model),
        **environment,
    }


def _start_triton(model: Path, port: int, tuning: Tuning) -> Command:
    # Triton's Python stub has to find this Python's own library, not the system's.
    libraries = {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}
    delay = round(tuning["wait_ms"] * 1000)
    return _module("triton", model, port, tuning["max_batch_size"], delay, tuning["workers"]), libraries


def _grid(*waits_ms: float, unbatched: bool = True) -> tuple[Tuning, ...]:
    """Return the tunings to try: each waiting time with one worker, the first with two, and no batching."""
    batched: list[dict[str, Any]] = [{"max_batch_size": 64, "wait_ms": wait, "workers": 1} for wait in waits_ms]
    more = {"max_batch_size": 64, "wait_ms": waits_ms[0], "workers": 2}
    alone = {"max_batch_size": 1, "wait_ms": waits_ms[0], "workers": 1}
    return (*batched, more, alone) if unbatched else (*batched, more)


OURS = Contender(
    "hessquik serve",
    "/v1/models/bench/evaluate",
    _start_ours,
    ({"workers": 1},),
    _json_body,
    _read_json,
)
CONTENDERS = (
    OURS,
    replace(OURS, name="hessquik serve, interpreted", command=_start_interpreted),
    Contender("LitServe", "/predict", _start_litserve, _grid(1, 5), _json_body, _read_json),
    # Its wait is a whole number of milliseconds, one at least.
    Contender("Mosec", "/inference", _start_mosec, _grid(1, 5), _json_body, _read_json),
    Contender(
        "Triton",
        "/v2/models/bench/infer",
        _start_triton,
        _grid(0, 1, unbatched=False),
        _triton_body,
        _read_triton,
    ),
    Contender(
        "plain FastAPI",
        "/evaluate",
        lambda model, port, _: (_module("fastapi", model, port, is_peer=False), {}),
        ({},),
        _json_body,
        _read_json,
    ),
    Contender(
        "echo",
        "/",
        lambda model, port, _: (_module("echo", model, port, is_peer=False), {}),
        ({},),
        _json_body,
        _read_json,
    ),
)
