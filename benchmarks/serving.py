"""Serving compared with its peers, all with the same engine, and with that engine alone.

    python -m benchmarks.serving [--quick] [--output docs]

Needs ``wrk`` and the extra ``bench``; the peers' own environment, ``.venv-peers``, is made at the first run. Writes
``performance-serving.json``, ``.md`` and ``.svg``. The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import orjson
import safetensors.numpy
import torch
from numpy.typing import NDArray

import hessquik
from benchmarks import serving_report, wrk
from benchmarks.servers import (
    CONTENDERS,
    OURS,
    PEERS,
    Contender,
    NotServing,
    Server,
    Tuning,
    compile_ours,
    make_peers_environment,
)
from benchmarks.wrk import JSON, SAFETENSORS, Measured
from hessquik.layers import singleLayer
from hessquik.networks import NN, resnetNN
from service.loadtest import Load, run
from tests import oracle

ROOT = Path(__file__).parent.parent
CONNECTIONS = (1, 16, 64, 256)
BULK_ROWS, BULK_D, SMALL_D = 4096, 32, 10
BULK_CONNECTIONS = 2
#: Largest error, relative to the largest entry, with which a contender may take part.
TOLERANCE = 1e-11
TUNED_AT = 64

Array = NDArray[np.float64]


class Benchmark:
    """One run.

    Args:
        folder: Where models and bodies are put.
        rounds: How often everything is measured, in turns.
        seconds: How long each time.
        is_quick: Whether only the first tuning of each contender is tried.
    """

    def __init__(self, folder: Path, rounds: int, seconds: float, is_quick: bool) -> None:
        """Make the models and the bodies."""
        self.folder, self.rounds, self.seconds, self.is_quick = folder, rounds, seconds, is_quick
        self._random = np.random.default_rng(0)
        models = folder / "models"
        models.mkdir()
        torch.manual_seed(0)
        self.networks = {"bench": _network(SMALL_D), "bulk": _network(BULK_D)}
        for name, network in self.networks.items():
            hessquik.save(network, models / f"{name}.safetensors")
        self.model = models / "bench.safetensors"
        self.points = self._random.uniform(-1, 1, (64, SMALL_D))
        self.expected = self._derivatives("bench", self.points)

    # Parts of the run.

    def compare(self) -> dict[str, Any]:
        """Measure every contender at every number of connections, in turns."""
        failed: dict[str, str] = {}
        tuned: dict[str, dict[str, Tuning]] = {}
        for contender in CONTENDERS:
            try:
                tuned[contender.name] = self._tune(contender)
            except NotServing as error:
                failed[contender.name] = str(error)
                _say(f"{contender.name} does not take part: {error}")
        found: dict[str, Any] = {
            name: {"tuning": {use: dict(tuning) for use, tuning in by_use.items()}, "connections": {}}
            for name, by_use in tuned.items()
        }
        with contextlib.ExitStack() as stack:
            servers: dict[tuple[str, str], Server] = {}
            for contender in CONTENDERS:
                for use, tuning in tuned.get(contender.name, {}).items():
                    twin = servers.get((contender.name, "latency"))
                    if twin is not None and twin.tuning == tuning:
                        servers[contender.name, use] = twin
                        continue
                    try:
                        server = stack.enter_context(Server(contender, self.model, tuning))
                        server.wait_until_serving(self.points)
                        error = 0.0 if contender.name == "echo" else self._check(server)
                    except NotServing as fault:
                        failed[f"{contender.name}, for {use}"] = str(fault)
                        continue
                    found[contender.name]["error"] = max(error, found[contender.name].get("error", 0.0))
                    server.freeze()
                    servers[contender.name, use] = server
            for number in range(self.rounds):
                for connections in CONNECTIONS:
                    use = "latency" if connections == 1 else "throughput"
                    for name in tuned:
                        if (name, use) not in servers:
                            continue
                        try:
                            if servers[name, use].has_ended():  # Triton does not bear to be frozen for long
                                old = servers[name, use]
                                anew = stack.enter_context(Server(old.contender, self.model, old.tuning))
                                servers[name, use] = anew.wait_until_serving(self.points)
                            with _awake(servers[name, use]) as server:
                                server.wait_until_serving(self.points)
                                measured = self._one_row(server, connections)
                        except NotServing as error:
                            where = f"{name}, round {number + 1}, {connections} connections"
                            failed[where] = str(error)
                            _say(f"{where}: {error}")
                            continue
                        measured["round"] = number + 1
                        found[name]["connections"].setdefault(str(connections), []).append(measured)
                        _say(f"round {number + 1}  {connections:4d} connections  {name:15s} {_brief(measured)}")
        return {"contenders": found, "failed": failed}

    def bulk(self) -> dict[str, list[float]]:
        """Rows per second of 4096 Hessians, as safetensors, as JSON, and by the engine alone in its process."""
        rows_per_second: dict[str, list[float]] = {"engine": [], "safetensors": [], "json": []}
        with self._ours() as server:
            path = "/v1/models/bulk/hessian"
            self._check_bulk(server, path)
            for _ in range(self.rounds):
                server.freeze()
                rows_per_second["engine"].append(self._engine_alone())
                server.thaw()
                for name, media_type in (("safetensors", SAFETENSORS), ("json", JSON)):
                    rows_per_second[name].append(self._bulk_rate(server, path, media_type))
                _say(
                    "bulk  " + "  ".join(f"{name} {rates[-1]:.0f} rows/s" for name, rates in rows_per_second.items())
                )
        return rows_per_second

    def workers(self) -> dict[str, dict[str, list[Measured]]]:
        """Measure one row at 64 connections and 1 to 256 rows at 16, with one worker and with two."""
        rows = np.rint(np.exp(self._random.uniform(0, np.log(256), 128))).astype(int)
        mixed = self._write("mixed", [OURS.body(self._random.uniform(-1, 1, (n, SMALL_D))) for n in rows])
        found: dict[str, dict[str, list[Measured]]] = {}
        with self._ours(1) as one, self._ours(2) as two:
            two.freeze()
            one.freeze()
            for _ in range(self.rounds):
                for workers, server in ((1, one), (2, two)):
                    with _awake(server):
                        of = found.setdefault(str(workers), {"one_row": [], "mixed": []})
                        of["one_row"].append(self._one_row(server, TUNED_AT))
                        measured = self._load(server.url(), 16, mixed, JSON)
                        measured["rows_per_second"] = measured["requests_per_second"] * float(rows.mean())
                        of["mixed"].append(measured)
                        _say(f"{workers} workers  mixed {measured['rows_per_second']:.0f} rows/s {_brief(measured)}")
        return found

    def beside_bulk(self) -> dict[str, list[Measured]]:
        """Measure one-row requests one after the other, alone and during a bulk load."""
        found: dict[str, list[Measured]] = {"alone": [], "beside_bulk": []}
        bodies = self._write("bulk", self._bulk_bodies(SAFETENSORS))
        with self._ours() as server:
            for _ in range(self.rounds):
                found["alone"].append(self._one_row(server, 1))
                with _background(
                    wrk.command(server.url("/v1/models/bulk/hessian"), 1, 2 * self.seconds + 2),
                    wrk.environment(bodies, SAFETENSORS),
                ):
                    time.sleep(0.5)
                    found["beside_bulk"].append(self._one_row(server, 1))
                time.sleep(0.5)
                _say("  ".join(f"{name} p99 {times[-1]['p99_ms']:.2f} ms" for name, times in found.items()))
        return found

    # What they are made of.

    def _tune(self, contender: Contender) -> dict[str, Tuning]:
        """Return the tuning with the shortest p50 at one connection, and the one with the most answers at 64."""
        grid = contender.grid[:1] if self.is_quick else contender.grid
        if contender.command(self.model, 0, grid[0])[0][0].startswith(str(PEERS)):
            make_peers_environment()
        if len(grid) == 1:
            return {"latency": grid[0], "throughput": grid[0]}
        tried: list[tuple[float, float, Tuning]] = []
        reasons: list[str] = []
        for tuning in grid:
            try:
                with Server(contender, self.model, tuning) as server:
                    server.wait_until_serving(self.points)
                    self._check(server)
                    latency = self._one_row(server, 1)["p50_ms"]
                    throughput = self._one_row(server, TUNED_AT)["requests_per_second"]
            except NotServing as error:
                reasons.append(f"{dict(tuning)}: {error}")
                continue
            _say(f"{contender.name} {dict(tuning)}  p50 {latency:.2f} ms  {throughput:.0f} requests/s")
            tried.append((latency, throughput, tuning))
        if not tried:
            raise NotServing("; ".join(reasons))
        return {"latency": min(tried, key=lambda one: one[0])[2], "throughput": max(tried, key=lambda one: one[1])[2]}

    def _check(self, server: Server) -> float:
        """Return the error of a contender's answers against autodiff in float64.

        Raises:
            NotServing: it is too large.
        """
        error = server.error(self.points, self.expected)
        if not error <= TOLERANCE:
            raise NotServing(f"expected answers within {TOLERANCE:g} of autodiff, got {error:.1e}")
        return error

    def _check_bulk(self, server: Server, path: str) -> None:
        """Compare every 256th Hessian of a bulk reply with autodiff, in both media types."""
        points = self._random.uniform(-1, 1, (BULK_ROWS, BULK_D))
        shown = slice(0, None, 256)
        expected = self._derivatives("bulk", points[shown])["hessian"]
        for media_type in (SAFETENSORS, JSON):
            reply = server.post(path, _bulk_body(points, media_type), media_type)
            if media_type == JSON:
                got = np.array(orjson.loads(reply)["hessian"])
            else:
                got = safetensors.numpy.load(reply)["hessian"]
            error = float(np.abs(got[shown] - expected).max() / np.abs(expected).max())
            if not (error <= TOLERANCE and np.isfinite(got).all()):
                raise NotServing(f"expected bulk answers within {TOLERANCE:g} of autodiff, got {error:.1e}")

    def _derivatives(self, name: str, points: Array) -> dict[str, Array]:
        """Return the derivatives by autodiff, without the engine."""
        found = oracle.derivatives(self.networks[name], torch.from_numpy(points))
        return {
            quantity: tensor.numpy() for quantity, tensor in zip(("value", "gradient", "hessian"), found, strict=True)
        }

    @contextlib.contextmanager
    def _ours(self, workers: int = 1) -> Iterator[Server]:
        with Server(OURS, self.model, {"workers": workers}) as server:
            server.wait_until_serving(self.points)
            self._check(server)
            yield server

    def _one_row(self, server: Server, connections: int) -> Measured:
        """Return a load of one row per request, after a short one to warm up."""
        bodies = self._write(
            f"one-{server.contender.name}",
            [server.contender.body(self._random.uniform(-1, 1, (1, SMALL_D))) for _ in range(256)],
        )
        with contextlib.suppress(NotServing):
            self._load(server.url(), connections, bodies, JSON, 1)
        before_s = server.processor_s()
        measured = self._load(server.url(), connections, bodies, JSON)
        measured["processor_us"] = (server.processor_s() - before_s) / measured["requests"] * 1e6
        return measured

    def _engine_alone(self) -> float:
        command = [
            sys.executable,
            "-m",
            "benchmarks.contenders.engine",
            str(self.model.with_name("bulk.safetensors")),
        ]
        done = subprocess.run(
            [*command, str(BULK_ROWS), str(self.seconds)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return float(done.stdout)

    def _bulk_rate(self, server: Server, path: str, media_type: str) -> float:
        """Return rows per second of bulk requests.

        wrk counts nothing of what is under way when its time is over, which may be a tenth of so few requests; so
        this is the service's own load generator, which waits for the last answer.
        """
        head = (
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {media_type}\r\naccept: {media_type}\r\n"
            "content-length: "
        )
        requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in self._bulk_bodies(media_type)]
        for seconds in (1, 3 * self.seconds):  # a short load first, to warm up
            tally = asyncio.run(run(Load(server.url(""), requests, BULK_ROWS, BULK_CONNECTIONS, seconds)))
        if tally.errors or not tally.answers:
            raise NotServing(f"bulk requests failed: {dict(tally.errors)}")
        return tally.answers * BULK_ROWS / tally.elapsed_s

    def _bulk_bodies(self, media_type: str) -> list[bytes]:
        return [_bulk_body(self._random.uniform(-1, 1, (BULK_ROWS, BULK_D)), media_type) for _ in range(4)]

    def _write(self, name: str, bodies: Sequence[bytes]) -> Path:
        return wrk.write_bodies(self.folder / f"{name.replace(' ', '-')}.bodies", bodies)

    def _load(self, url: str, connections: int, bodies: Path, media_type: str, seconds: float = 0) -> Measured:
        return wrk.measure(url, connections, bodies, media_type, seconds or self.seconds)


@contextlib.contextmanager
def _awake(server: Server) -> Iterator[Server]:
    """Resume a suspended server within a ``with`` block."""
    server.thaw()
    try:
        yield server
    finally:
        server.freeze()


@contextlib.contextmanager
def _background(command: list[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Run a command in the background within a ``with`` block.

    Raises:
        NotServing: it ended before.
    """
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise NotServing("the bulk load ended before the requests beside it")
    finally:
        process.kill()
        process.wait()


def _network(d: int) -> NN:
    """Return the network of all comparisons: ResNet d-64×5-1."""
    f64 = torch.float64
    return NN(singleLayer(d, 64, dtype=f64), resnetNN(64, 4, dtype=f64), singleLayer(64, 1, dtype=f64))


def _bulk_body(points: Array, media_type: str) -> bytes:
    if media_type == JSON:
        return orjson.dumps({"inputs": points}, option=orjson.OPT_SERIALIZE_NUMPY)
    return bytes(safetensors.numpy.save({"inputs": points}))


def _brief(measured: Measured) -> str:
    return (
        f"{measured['requests_per_second']:8.0f} requests/s  "
        f"p50 {measured['p50_ms']:7.2f} ms  p99 {measured['p99_ms']:7.2f} ms"
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _machine() -> dict[str, Any]:
    """Return a description of the machine, in general words."""
    processor = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "cores": os.cpu_count(),
        "processor": processor,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "numpy", "uvicorn", "orjson")},
        "peers": [line for line in (ROOT / "benchmarks/peers.txt").read_text().split("\n") if "==" in line],
    }


def _end(number: int, _: object) -> NoReturn:
    """Exit by an exception, so that every ``with`` block stops its server."""
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tuning, one round, about two minutes")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder for the results")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.stderr.write("expected the program wrk, there is none; on Debian: apt-get install wrk\n")
        return 2
    signal.signal(signal.SIGTERM, _end)
    results: dict[str, Any] = {
        "machine": _machine(),
        "command": "python -m benchmarks.serving" + (" --quick" if arguments.quick else ""),
        "failed": {},
    }
    began = time.monotonic()
    compile_ours()
    with tempfile.TemporaryDirectory() as folder:
        rounds, seconds = (1, 1.0) if arguments.quick else (3, 3.0)
        benchmark = Benchmark(Path(folder), rounds, seconds, arguments.quick)
        results |= {"rounds": rounds, "seconds": seconds}
        for name in ("compare", "bulk", "workers", "beside_bulk"):
            try:
                part = getattr(benchmark, name)()
            except NotServing as error:
                results["failed"][name] = str(error)
                _say(f"{name} failed: {error}")
                continue
            if name == "compare":
                results["failed"] |= part.pop("failed")
            results[name] = part
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    arguments.output.mkdir(exist_ok=True)
    serving_report.write(results, arguments.output)
    _say((arguments.output / "performance-serving.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
