"""Mixed requests to the service on a GPU, every number compared with float64 on a CPU.

    python -m benchmarks.gpu_soak --models models --seconds 120 --output build

Starts the service on all GPUs, with an empty cache of kernels and again with a full one, and asks for random
quantities of random models at 1 to 4,096 points in both encodings. After each part ``gpu-soak.json`` has what is
known so far. The exit status is 1 if a number is wrong, a request fails or a worker ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from hessquik import Evaluator, storage
from hessquik.ensemble import evaluator_of
from hessquik.networks import NN, fullyConnectedNN
from hessquik_client import Client

QUANTITIES = ("value", "gradient", "hessian", "laplacian", "hessian_diagonal", "jvp", "hvp", "curvature")
DIRECTIONAL = frozenset({"jvp", "hvp", "curvature"})
#: An entry may be off by so many units of rounding of the largest entry of its array.
ROUNDINGS = 1000
#: The model of bulk requests, and their points.
BULK, ROWS = "wide", 4096
#: Largest number of entries in an answer.
ENTRIES = 1 << 22


class Server:
    """The service in a separate process."""

    def __init__(self, models: Path, device: str, cache: Path) -> None:
        """Start it with a folder for compiled kernels, and wait until it is ready."""
        command = [sys.executable, "-m", "service", "serve", str(models), "--port", "0", "--device", device]
        self.began = time.monotonic()
        environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[str] = []
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        while self.process.poll() is None and time.monotonic() - self.began < 300:
            if self.url and self._is_ready():
                self.ready_s = time.monotonic() - self.began
                return
            time.sleep(0.1)
        self.stop()
        raise SystemExit("the service did not become ready:\n" + "\n".join(self.log[-20:]))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if (found := re.search(r"running on http://[^ ]*:(\d+)", line)) is not None:
                self.url = f"http://127.0.0.1:{found[1]}"

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def metrics(self) -> dict[str, float]:
        """Return the samples that are numbers."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).raise_for_status().text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] not in "#"}

    def stop(self) -> int:
        """Stop it and return its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


class Soak:
    """Clients that ask and compare, and their counts."""

    def __init__(self, url: str, models: Path, seconds: float) -> None:
        """Read the served networks for the comparison."""
        self.url, self.stop_at = url, time.monotonic() + seconds
        self.networks = {}
        for path in sorted(models.glob("*.safetensors")):
            saved = storage.parse(path.read_bytes())
            exact = evaluator_of(saved.network, "cpu", torch.float64, backend="torch")
            bounds = (saved.metadata.get(f"{side}_bounds") for side in ("lower", "upper"))
            self.networks[path.stem] = (
                exact,
                *(np.array(b or [d] * exact.d) for b, d in zip(bounds, (-1.0, 1.0), strict=True)),
            )
        self.counts: Counter[str] = Counter()
        self.worst = 0.0
        self.faults: list[str] = []
        self.lock = threading.Lock()

    def run(self, seed: int) -> None:
        """Ask until the time is over."""
        random = np.random.default_rng(seed)
        with Client(self.url) as client, httpx.Client(base_url=self.url, timeout=60) as plain:
            while time.monotonic() < self.stop_at:
                try:
                    self.ask(client, plain, random)
                except Exception as error:  # counted, and the soak goes on
                    self.note("failed", f"{type(error).__name__}: {error}")

    def ask(self, client: Client, plain: httpx.Client, random: np.random.Generator) -> None:
        """Ask one question and compare the answer."""
        name = str(random.choice(list(self.networks)))
        exact, lower, upper = self.networks[name]
        dtype = str(random.choice(["float64", "float32"]))
        quantities = [str(q) for q in random.choice(QUANTITIES, random.integers(1, 4), replace=False)]
        rows = int(4 ** random.uniform(0, 6))
        rows = max(1, min(rows, ENTRIES // (exact.d * exact.d * exact.m)))
        x = random.uniform(lower, upper, (rows, exact.d)).astype(dtype).astype(float)
        v = random.normal(size=(2, exact.d)).astype(dtype).astype(float) if DIRECTIONAL & {*quantities} else None
        found: Any
        if random.random() < 0.5:
            found = client.model(name).evaluate(x, quantities, directions=v, dtype=dtype).arrays
        else:
            body = {"inputs": x.tolist(), "quantities": quantities, "dtype": dtype}
            body |= {} if v is None else {"directions": np.broadcast_to(v, (rows, *v.shape)).tolist()}
            found = plain.post(f"/v1/models/{name}/evaluate", json=body).raise_for_status().json()
        wanted = exact(torch.from_numpy(x), quantities, directions=None if v is None else torch.from_numpy(v))
        self.counts["requests"] += 1
        self.counts["rows"] += rows
        for quantity in quantities:
            right = getattr(wanted, quantity).numpy()
            got = np.asarray(found[quantity], float)
            scale = np.finfo(dtype).eps * (1 + np.abs(right).max())
            error = float(np.abs(got - right).max() / scale) if got.shape == right.shape else float("inf")
            self.counts["numbers"] += right.size
            self.worst = max(self.worst, error)
            if not error <= ROUNDINGS:
                self.note("wrong", f"{name} {quantity} {rows} rows: {error:.0f} units of rounding")

    def note(self, kind: str, text: str) -> None:
        """Count a fault, and keep the first ones."""
        with self.lock:
            self.counts[kind] += 1
            if len(self.faults) < 20:
                self.faults.append(text)


def bulk(url: str, network: NN, repeats: int = 20) -> dict[str, float]:
    """Return the times of many Hessians, by the service and by an Evaluator in this process, in milliseconds."""
    evaluate = Evaluator(network, "cuda", torch.float32, compiled=[("hessian",)])
    x = torch.randn(ROWS, evaluate.d)
    there: list[float] = []
    here: list[float] = []
    with Client(url, concurrency=1) as client:
        model = client.model(BULK)
        for _ in range(repeats + 2):
            began = time.perf_counter()
            model.evaluate(x.numpy(), ["hessian"])
            between = time.perf_counter()
            evaluate(x, ("hessian",))
            there.append(1e3 * (between - began))
            here.append(1e3 * (time.perf_counter() - between))
    return {"bulk_service_ms": statistics.median(there[2:]), "bulk_engine_ms": statistics.median(here[2:])}


def main() -> None:
    """Run the soak and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("build"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    models = Path(shutil.copytree(given.models, Path(folder.name, "models")))
    torch.manual_seed(0)
    wide = fullyConnectedNN([32, 64, 64, 64, 1])
    storage.save(wide, models / f"{BULK}.safetensors")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else given.device,
        "seconds": given.seconds,
    }  # fmt: skip

    def know(**more: Any) -> None:
        result.update(more)
        (given.output / "gpu-soak.json").write_text(json.dumps(result, indent=1))

    server = Server(models, given.device, Path(folder.name, "cache"))
    try:
        know(ready_s=round(server.ready_s, 1))
        if torch.cuda.is_available():
            know(**bulk(server.url, wide))
        soak = Soak(server.url, models, given.seconds)
        clients = [threading.Thread(target=soak.run, args=(seed,)) for seed in range(given.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        metrics = {key: value for key, value in server.metrics().items() if "worker" in key or "device" in key}
        know(**soak.counts, worst_error_roundings=round(soak.worst, 1), faults=soak.faults, metrics=metrics)
    finally:
        status = server.stop()
    know(exit_status=status)
    again = Server(models, given.device, Path(folder.name, "cache"))
    know(ready_again_s=round(again.ready_s, 1), exit_status=status or again.stop())
    folder.cleanup()
    print(json.dumps(result))
    if soak.faults or result["exit_status"]:
        print(*server.log[-20:], sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
