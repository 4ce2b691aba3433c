"""The Evaluator against its peers: ``make bench``, or ``python -m benchmarks.engine --output FOLDER``.

Every contender of a row computes the same thing in the same process, in turn, round by round, at new random points
each round; first its answer is compared with automatic differentiation in float64. A ratio is the median over the
rounds of (the contender's time / ours). The rows are measured in parts, each a process of its own, with

    --part NAME     one part only, and then the table and plot of all parts that are in the folder
    --only WORDS    only rows with these words in their title; a part's other rows stay as they were
    --compile S     seconds that torch.compile may take in a part; what it compiled before is quick
"""

# ruff: noqa: E402 - the libraries count their cores when they are imported.
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

PART = sys.argv[sys.argv.index("--part") + 1] if "--part" in sys.argv[:-1] else ""
CORES = sorted(os.sched_getaffinity(0))[-2:] if PART in {"threads", "scaling"} else [max(os.sched_getaffinity(0))]
if PART:
    os.sched_setaffinity(0, CORES)
    os.environ["OMP_NUM_THREADS"] = str(len(CORES))

import jax
import torch
from torch import Tensor

from benchmarks import engine_report
from benchmarks.peers import QUANTITIES, Peer, exact, peers
from hessquik import Evaluator, memory
from hessquik.activations import tanhActivation
from hessquik.layers import quadraticICNNLayer, resnetLayer, singleLayer
from hessquik.networks import ICNN, NN

ROUNDS = 9
#: What a contender may take in all rounds of a row; a slow one takes part in fewer of them, but in two.
ROW_S = 2.0
#: A contender whose one call takes longer is left out; the original may take more, for it is what was to be replaced.
TOO_LONG_S, TOO_LONG_FOR_THE_ORIGINAL_S = 1.5, 8.0
#: Largest difference from float64, relative to the largest entry.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
#: Directions in rows of Jv, Hv and vᵀHv.
DIRECTIONS = 4
ACT = tanhActivation()


@dataclass(frozen=True)
class Row:
    """A network, a number of points, and the requested quantities."""

    what: str
    title: str
    build: Callable[[], NN]
    n: int
    dtype: torch.dtype = torch.float32


def residual(d: int, w: int, depth: int, m: int = 1) -> NN:
    hidden = [resnetLayer(w, 0.5, ACT) for _ in range(depth - 1)]
    return NN(singleLayer(d, w, ACT), *hidden, singleLayer(w, m))


def tapering() -> NN:
    widths = [50, 768, 768, 512, 512]
    return NN(*(singleLayer(p, q, ACT) for p, q in pairwise(widths)), singleLayer(512, 1))


def convex(d: int) -> NN:
    return NN(ICNN(d, [None, 64, 64, 64, 64]), quadraticICNNLayer(d, 64, 8))


def rows(
    what: str, title: str, build: Callable[[], NN], *counts: int, dtype: torch.dtype = torch.float32
) -> list[Row]:
    return [Row(what, f"{title}, n = {n}", build, n, dtype) for n in counts]


def paper(what: str, d: int, m: int = 1) -> list[Row]:
    title = f"paper, d = {d}" if m == 1 else f"paper, d = {d}, m = {m}"
    return [Row(what, title, lambda: residual(d, 16, 4, m), 10)]


def wide(what: str, largest: bool) -> list[Row]:
    """Return the cases of wide networks, at one point and at many."""
    found = [
        *rows(what, "10-64×5-1", lambda: residual(10, 64, 5), 1, 256),
        *rows(what, "32-128×5-1", lambda: residual(32, 128, 5), 1, 256),
        *rows(what, "32-128×5-8", lambda: residual(32, 128, 5, 8), 1, 64),
        *rows(what, "10-256×7-1", lambda: residual(10, 256, 7), 1, 256),
        *rows(what, "100-128×5-1", lambda: residual(100, 128, 5), 1, 256),
        *rows(what, "50-768-768-512-512-1", tapering, 1, 16),
    ]
    if largest:
        found += rows(what, "10-64×5-1", lambda: residual(10, 64, 5), 4096)
        found += rows(what, "10-256×7-1", lambda: residual(10, 256, 7), 1024)
    return found


def directional() -> list[Row]:
    return [
        row
        for what in ("hvp", "curvature", "jvp")
        for row in (
            *paper(what, 256),
            *rows(what, "10-64×5-1", lambda: residual(10, 64, 5), 1, 256),
            *rows(what, "100-128×5-1", lambda: residual(100, 128, 5), 256),
        )
    ]


def in_double() -> list[Row]:
    double = {"dtype": torch.float64}
    return [
        Row("hessian", "paper, d = 256", lambda: residual(256, 16, 4), 10, torch.float64),
        *rows("hessian", "10-64×5-1", lambda: residual(10, 64, 5), 1, 256, **double),
        *rows("laplacian", "50-768-768-512-512-1", tapering, 16, **double),
    ]


PARTS: dict[str, list[Row]] = {
    "paper": [
        *(row for d in (1, 4, 16, 64, 256, 512, 1024) for row in paper("hessian", d)),
        *(row for d, m in ((8, 64), (64, 8), (64, 64), (256, 64), (256, 256)) for row in paper("hessian", d, m)),
    ],
    "wide": wide("hessian", largest=True),
    "laplacian": [
        *(row for d in (1, 8, 64, 256, 1024) for row in paper("laplacian", d)),
        *paper("laplacian", 64, 8),
        *wide("laplacian", largest=False),
    ],
    "directional": directional(),
    "convex": [
        *(row for what in ("hessian", "laplacian") for d in (16, 64, 256) for row in rows(
            what, f"convex, {d}-64×4-1", lambda d=d: convex(d), 1, 64
        )),
        *in_double(),
    ],
    "threads": [
        *paper("hessian", 1024),
        *rows("hessian", "32-128×5-1", lambda: residual(32, 128, 5), 256),
        *rows("hessian", "10-256×7-1", lambda: residual(10, 256, 7), 256),
        *rows("laplacian", "50-768-768-512-512-1", tapering, 64),
    ],
    "scaling": [
        row
        for what in ("hessian", "laplacian")
        for row in (
            *rows(what, "10-64×5-1", lambda: residual(10, 64, 5), 256, 4096),
            *rows(what, "32-128×5-1", lambda: residual(32, 128, 5), 256),
            *rows(what, "10-256×7-1", lambda: residual(10, 256, 7), 256, 1024),
            *rows(what, "100-128×5-1", lambda: residual(100, 128, 5), 256),
        )
    ],
}  # fmt: skip


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference of any answer at the first points, relative to its largest entry."""
    largest = 0.0
    for a, b in zip(found, wanted, strict=True):
        first = a[: len(b)]
        if first.numel() != b.numel():  # the original loses the axis of the points where it should not
            return float("inf")
        largest = max(largest, float((first.reshape(b.shape) - b).abs().max()) / max(float(b.abs().max()), 1e-30))
    return largest


def measure(row: Row, threads: int, may_compile: bool) -> dict[str, Any]:
    """Check every contender, time them in turn, and give ratios."""
    torch.manual_seed(0)
    network = row.build().to(row.dtype).requires_grad_(False)
    evaluate = Evaluator(network, threads=threads)
    quantities, d = QUANTITIES[row.what], evaluate.d
    x, v = torch.randn(row.n, d, dtype=row.dtype), torch.randn(DIRECTIONS, d, dtype=row.dtype)
    given = v if row.what in {"hvp", "curvature", "jvp"} else None

    def ours(x: Tensor, v: Tensor) -> list[Tensor]:
        out = evaluate(x, quantities, None, given)
        return [getattr(out, name) for name in quantities]

    contenders = {"ours": Peer(ours, outputs_first=False), **peers(network, row.what, x, v, may_compile)}
    wanted = exact(network, row.what, x[:2], v)
    notes: dict[str, str] = {}
    once: dict[str, float] = {}
    for name, peer in contenders.items():
        few = peer.arrays(x[:8], v)
        if "compile" not in name and not peer.takes_jax:  # those have one shape
            peer.call(*few)
            limit = TOO_LONG_FOR_THE_ORIGINAL_S if name.startswith("hessQuik") else TOO_LONG_S
            if (guess := seconds(lambda p=peer, few=few: p.call(*few)) * max(1, row.n / 16)) > limit:
                notes[name] = f"too slow, about {guess:.0f} s"
                continue
        inputs = peer.arrays(x, v)
        error = difference(peer.read(peer.call(*inputs), row.what), wanted)
        if not error <= TOLERANCE[row.dtype]:
            notes[name] = f"wrong by {error:.1e}"
            continue
        once[name] = seconds(lambda p=peer, i=inputs: p.call(*i))
    assert "ours" in once, f"ours is {notes}"
    # As a program does that has room for its results: their memory is used again, however large they are.
    memory.CACHE_BYTES = max(memory.CACHE_BYTES, sum(part.nbytes for part in ours(x, v)))

    repeats = {name: max(1, min(50, int(0.003 / time))) for name, time in once.items()}
    times: dict[str, list[float]] = {name: [] for name in once}
    for turn in range(ROUNDS):
        x = torch.randn(row.n, d, dtype=row.dtype)
        for name, spent in times.items():
            if turn < 2 or sum(spent) * repeats[name] < ROW_S * turn / ROUNDS + ROW_S / ROUNDS:
                peer = contenders[name]
                inputs = peer.arrays(x, v)
                spent.append(seconds(lambda p=peer, i=inputs: p.call(*i), repeats[name]))
    mine = times["ours"]
    nothing = torch.zeros(0, d, dtype=row.dtype)
    return {
        "what": row.what,
        "title": row.title + (", float64" if row.dtype is torch.float64 else ""),
        "n": row.n,
        "d": d,
        "ours_s": statistics.median(mine),
        "call_s": statistics.median(seconds(lambda: ours(nothing, v), 20) for _ in range(9)),
        "operations": evaluate.plan(quantities, None, given).operations * row.n,
        "bytes": sum(part.nbytes for part in ours(x, v)),
        "dtype": str(row.dtype).removeprefix("torch."),
        "ratios": {
            name: quartiles([t / o for t, o in zip(spent, mine, strict=False)])
            for name, spent in times.items()
            if name != "ours"
        },
        "notes": notes,
        "compile_s": sum(peer.compile_s for peer in contenders.values()),
    }


def quartiles(found: list[float]) -> list[float]:
    return statistics.quantiles(found, n=4, method="inclusive")


def floors() -> dict[str, float]:
    """Return this machine's peak rates: operations of a product, the faster of two, and bytes written to memory."""
    found = {}
    multiply = jax.jit(lambda a, b: a @ b)
    for dtype in (torch.float32, torch.float64):
        a, b, c = (torch.randn(512, 512, dtype=dtype) for _ in range(3))
        p, q = jax.numpy.array(a.numpy()), jax.numpy.array(b.numpy())
        by_torch = min(seconds(lambda a=a, b=b, c=c: torch.mm(a, b, out=c)) for _ in range(40))
        by_jax = min(seconds(lambda p=p, q=q: jax.block_until_ready(multiply(p, q))) for _ in range(40))
        found[str(dtype).removeprefix("torch.")] = 2 * 512**3 / min(by_torch, by_jax)
    place, source = torch.zeros(2, 16 << 20)
    found["write"] = place.nbytes / min(seconds(lambda: place.fill_(1.0)) for _ in range(15))
    found["copy"] = 2 * place.nbytes / min(seconds(lambda: place.copy_(source)) for _ in range(15))
    return found


def measure_part(name: str, only: str, compile_s: float, path: Path) -> None:
    """Measure all rows of a part, and the lower bounds before and after them; save the results after each row."""
    torch.set_num_threads(len(CORES))
    before = floors()
    found: dict[str, dict[str, Any]] = {}
    if only and path.exists():  # the other rows stay as they were
        found = {f"{row['what']} {row['title']}": row for row in json.loads(path.read_text())["rows"]}
    left = compile_s
    for row in PARTS[name]:
        if only in row.title:
            result = measure(row, len(CORES), left > 0)
            left -= result["compile_s"]
            found[f"{result['what']} {result['title']}"] = result
            print(engine_report.line(result, before), flush=True)
            after = floors()
            part = {
                "part": name,
                "threads": len(CORES),
                "machine": f"{processor()}, {platform.machine()}",
                "versions": f"torch {torch.__version__}, JAX {jax.__version__}",
                "floors": {key: max(before[key], after[key]) for key in before},
                "rows": list(found.values()),
            }
            path.write_text(json.dumps(part, indent=1) + "\n")


def scaling() -> dict[str, Any]:
    """Return how many times as fast two threads are as one, each round at the same points."""
    torch.set_num_threads(1)
    found = []
    for row in PARTS["scaling"]:
        torch.manual_seed(0)
        network = row.build().requires_grad_(False)
        evaluators = [Evaluator(network, threads=threads) for threads in (1, 2)]
        x = torch.randn(row.n, evaluators[0].d)
        calls = [partial(evaluate, x, QUANTITIES[row.what]) for evaluate in evaluators]
        repeats = max(1, min(50, int(0.02 / max(map(seconds, calls)))))
        spent = [[seconds(call, repeats) for call in calls] for _ in range(3 * ROUNDS)]
        one_s, two_s = (statistics.median(times) for times in zip(*spent, strict=True))
        ratios = quartiles([one / two for one, two in spent])
        found.append({"what": row.what, "title": row.title, "one_s": one_s, "two_s": two_s, "ratios": ratios})
    return {"part": "scaling", "rows": found}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


MEMORY = """
import torch
from benchmarks.engine import residual
from hessquik import Evaluator
evaluate = Evaluator(residual({d}, {w}, {depth}))
quantities = ("value", "gradient", "hessian")
evaluate(torch.randn(8, {d}), quantities)
def peak_kib():  # of this program; getrusage's would begin with that of the process which started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
before = peak_kib()
x = torch.randn({n}, {d})
out = evaluate(x, quantities)
size = sum(part.nbytes for part in (x, out.value, out.gradient, out.hessian))
print((peak_kib() - before) * 1024 - size, size)
"""


def peak_memory() -> dict[str, Any]:
    """Return the peak memory of a separate process, without inputs and results."""
    found = []
    for d, w, depth, n in ((10, 64, 5, 65536), (10, 256, 7, 16384), (256, 16, 4, 4096), (100, 128, 5, 16384)):
        program = MEMORY.format(d=d, w=w, depth=depth, n=n)
        command = [sys.executable, "-c", program]
        beyond, size = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        found.append({"title": f"{d}-{w}×{depth}-1, n = {n}", "beyond_bytes": beyond, "result_bytes": size})
    return {"part": "memory", "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder for results, table and plot")
    parser.add_argument("--part", choices=[*PARTS, "memory"])
    parser.add_argument("--only", default="")
    parser.add_argument("--compile", type=float, default=100.0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    # What torch compiles is kept from one run to the next.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(arguments.output.resolve() / "inductor"))
    if not arguments.part:
        for part in (*PARTS, "memory"):
            subprocess.run([sys.executable, "-m", "benchmarks.engine", "--part", part, *sys.argv[1:]], check=True)
        return
    path = arguments.output / f"engine-{arguments.part}.json"
    if arguments.part in {"memory", "scaling"}:
        found = peak_memory() if arguments.part == "memory" else scaling()
        path.write_text(json.dumps(found, indent=1) + "\n")
    else:
        measure_part(arguments.part, arguments.only, arguments.compile, path)
    engine_report.write([*PARTS, "memory"], arguments.output)


if __name__ == "__main__":
    main()
