"""One node's ways to use several front ends: the same two workers behind each.

    python -m benchmarks.node [--rounds 5] [--seconds 3] [--output build]

Needs ``wrk``, ``haproxy`` and the extra ``dev``. Prints and writes ``node.md``: requests or rows per second, and the
processor time that a request takes of the front ends, the balancer and the workers, from which the figures for a
larger node follow. The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import psutil

from benchmarks import wrk
from benchmarks.servers import OURS, Server, Tuning, compile_ours
from benchmarks.wrk import JSON, SAFETENSORS
from service.loadtest import build_load
from tests.deployment.balanced import Balancer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "borehole.safetensors"
D = 8
SERVER = replace(OURS, path=f"/v1/models/{MODEL.stem}/evaluate")
QUANTITIES = ("value", "gradient", "hessian")
#: Name, servers, and whether requests pass a balancer.
WAYS: tuple[tuple[str, tuple[Tuning, ...], bool], ...] = (
    ("one server", ({"workers": 2},), False),
    ("`--processes 2`", ({"workers": 2, "processes": 2},), False),
    ("HAProxy, one server", ({"workers": 2},), True),
    ("HAProxy, two servers", ({"workers": 1}, {"workers": 1}), True),
)
#: Connections, rows of a request, and the media type.
LOADS = ((1, 1, JSON), (64, 1, JSON), (256, 1, JSON), (8, 1000, JSON), (8, 1000, SAFETENSORS))
PARTS = ("front ends", "balancer", "workers")


@dataclass
class Way:
    """Servers that answer at one address.

    Attributes:
        url: The address.
        servers: The servers.
        balancer: The process before them, if there is one.
    """

    url: str
    servers: list[Server]
    balancer: psutil.Process | None

    def processor_s(self) -> dict[str, float]:
        """Return the processor time that each part has used."""
        used = dict.fromkeys(PARTS, 0.0)
        if self.balancer:
            used["balancer"] = _processor_s(self.balancer)
        for server in self.servers:
            for process in server.processes():
                part = "workers" if any("run_worker" in word for word in process.cmdline()) else "front ends"
                used[part] += _processor_s(process)
        return used


def _processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def started(tunings: tuple[Tuning, ...], is_balanced: bool, log: Path) -> Iterator[Way]:
    """Start the servers of a way, and a balancer before them."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(SERVER, MODEL, tuning)) for tuning in tunings]
        for server in servers:
            server.wait_until_serving(np.full((1, D), 0.5))
        if not is_balanced:
            yield Way(servers[0].url(""), servers, None)
            return
        addresses = [f"127.0.0.1:{server.port}" for server in (servers[0], servers[-1])]
        balancer = stack.enter_context(Balancer(addresses[0], addresses[1], log))
        yield Way(balancer.url, servers, psutil.Process(balancer.pid))


def requests_of(url: str, rows: int, media_type: str, folder: Path) -> tuple[str, Path]:
    """Return the path of requests at random points within the model's bounds, and the file of their bodies."""
    facts = httpx.get(f"{url}/v1/models/{MODEL.stem}").raise_for_status().json()
    load = build_load(
        url, facts, quantities=QUANTITIES, clients=1, rows=rows, seconds=0, is_binary=media_type == SAFETENSORS
    )
    path = load.requests[0].split(b" ", 2)[1].decode()
    bodies = [request.partition(b"\r\n\r\n")[2] for request in load.requests]
    return path, wrk.write_bodies(folder / f"{rows}-{media_type.rpartition('/')[2]}.bodies", bodies)


def measure(way: Way, load: tuple[int, int, str], seconds: float, folder: Path) -> dict[str, float]:
    """Return rows per second, and the microseconds of the processor that each part takes for a request."""
    connections, rows, media_type = load
    path, bodies = requests_of(way.url, rows, media_type, folder)
    wrk.measure(way.url + path, connections, bodies, media_type, 1)  # a short load first, to warm up
    before = way.processor_s()
    measured = wrk.measure(way.url + path, connections, bodies, media_type, seconds)
    used = {part: spent - before[part] for part, spent in way.processor_s().items()}
    return {"rows": rows * measured["requests_per_second"]} | {
        part: spent / measured["requests"] * 1e6 for part, spent in used.items()
    }


def report(found: dict[tuple[str, tuple[int, int, str]], list[dict[str, float]]]) -> str:
    """Return the medians as two tables."""
    names = [name for name, _, _ in WAYS]
    lines = [f"| connections × rows | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    costs = ["| connections × rows | way | front ends | balancer | workers |", "|---|---|---|---|---|"]
    for load in LOADS:
        connections, rows, media_type = load
        label = f"{connections} × {rows:,}, {'JSON' if media_type == JSON else 'safetensors'}"
        medians = {
            name: {key: statistics.median(one[key] for one in found[name, load]) for key in ("rows", *PARTS)}
            for name in names
        }
        lines.append(f"| {label} | " + " | ".join(f"{medians[name]['rows']:,.0f}" for name in names) + " |")
        costs += [
            f"| {label} | {name} | " + " | ".join(f"{medians[name][part]:,.0f} µs" for part in PARTS) + " |"
            for name in names
        ]
    return "\n".join(["Rows per second:", "", *lines, "", "Time of the processor for a request:", "", *costs, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured, in turns")
    parser.add_argument("--seconds", type=float, default=3, help="how long each time")
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder for the tables")
    arguments = parser.parse_args()
    for program in ("wrk", "haproxy"):
        if shutil.which(program) is None:
            sys.stderr.write(f"expected the program {program}, there is none; on Debian: apt-get install {program}\n")
            return 2
    compile_ours()
    found: dict[tuple[str, tuple[int, int, str]], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ways = {
            name: stack.enter_context(started(tunings, is_balanced, Path(folder, f"log-{number}")))
            for number, (name, tunings, is_balanced) in enumerate(WAYS)
        }
        for number in range(arguments.rounds):
            for name, way in ways.items():
                for load in LOADS:
                    measured = measure(way, load, arguments.seconds, Path(folder))
                    found.setdefault((name, load), []).append(measured)
                    print(number + 1, name, load, {key: round(value) for key, value in measured.items()}, flush=True)
    tables = report(found)
    arguments.output.mkdir(exist_ok=True)
    (arguments.output / "node.md").write_text(tables)
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
