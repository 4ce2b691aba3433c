"""Loads by ``wrk``, which takes little of the processor that it shares with the server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.servers import NotServing

__all__ = ["JSON", "SAFETENSORS", "Measured", "command", "environment", "measure", "write_bodies"]

JSON, SAFETENSORS = "application/json", "application/x-safetensors"
SCRIPT = Path(__file__).with_suffix(".lua")
#: How many times longer is waited where nothing was answered.
PATIENCE = 6

Measured = dict[str, float]


def write_bodies(path: Path, bodies: Sequence[bytes]) -> Path:
    """Write the bodies of requests in the form that the script reads, and return the path."""
    path.write_bytes(b"".join(b"%d\n%s" % (len(body), body) for body in bodies))
    return path


def command(url: str, connections: int, seconds: float) -> list[str]:
    """Return the command line of a load; wrk counts whole seconds only."""
    duration = f"{max(1, round(seconds))}s"
    return ["wrk", "-t", "1", "-c", str(connections), "-d", duration, "--timeout", "30s", "-s", str(SCRIPT), url]


def environment(bodies: Path, media_type: str) -> Mapping[str, str]:
    """Return the environment in which the script finds the bodies and their type."""
    return {**os.environ, "BODIES": str(bodies), "MEDIA_TYPE": media_type}


def measure(url: str, connections: int, bodies: Path, media_type: str, seconds: float) -> Measured:
    """Return the measurements of a load.

    Raises:
        NotServing: some requests failed, or none were answered.
    """
    for patience in (1, PATIENCE):  # nothing within the time may mean that an answer takes longer
        done = subprocess.run(
            command(url, connections, patience * seconds),
            env=environment(bodies, media_type), capture_output=True, text=True, check=False,
        )  # fmt: skip
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            raise NotServing(f"wrk ended with status {done.returncode}: {done.stderr.strip()[-200:]}")
        measured: Measured = json.loads(line.removeprefix("RESULT "))
        if measured["requests"] or measured["errors"]:
            break
    if measured["errors"] or not measured["requests"]:
        raise NotServing(f"{measured['errors']:.0f} of {measured['requests']:.0f} requests failed")
    measured["requests_per_second"] = measured["requests"] / measured["seconds"]
    return measured
