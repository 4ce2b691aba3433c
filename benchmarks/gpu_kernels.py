"""The kernels of programs on a GPU: what they compile to, and the time that each takes with tiles of several sizes.

    python -m benchmarks.gpu_kernels --compile-only          # no GPU is needed
    python -m benchmarks.gpu_kernels --output build          # times, on a GPU

Every timed kernel is compared with float64 on a CPU and, bit by bit, with the table kernel and with itself on single
rows. Results are written line by line as they come.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton

from benchmarks.gpu import microseconds
from hessquik.backends.gpu_compile import compile_kernel, compile_unrolled
from hessquik.backends.gpu_unrolled import Unrolled, Unrolling, source
from hessquik.backends.triton import UNROLLINGS, TritonProgram, UnrolledProgram, unrolling
from hessquik.device import GPU
from hessquik.networks import fullyConnectedNN
from hessquik.plan import Ask, Plan, choose

SECOND = ("value", "gradient", "hessian")
NARROW, HESSIAN, LAPLACIAN = [10, 64, 64, 64, 64, 64, 1], [32, 64, 64, 64, 1], [100, 64, 64, 64, 1]
F32, F64 = torch.float32, torch.float64
Case = tuple[list[int], tuple[str, ...], torch.dtype, int, Unrolling | None]

#: Network, quantities, dtype, rows and tiles (None: the table kernel), the most important first.
CASES: list[Case] = [
    (widths, quantities, dtype, n, tiles)
    for widths, quantities, dtype, rows in (
        (NARROW, SECOND, F32, (65536, 1, 1024, 4096)),
        (NARROW, SECOND, F64, (65536, 1, 1024, 4096)),
        (HESSIAN, SECOND, F32, (4096,)),
        (LAPLACIAN, ("laplacian",), F32, (4096,)),
    )
    for tiles in (UNROLLINGS[dtype], None)
    for n in rows
] + [
    (NARROW, SECOND, dtype, n, Unrolling(rows, instances))
    for dtype in (F32, F64)
    for rows, instances in ((16, 4), (32, 4), (8, 2))
    for n in (65536, 1, 1024)
]  # fmt: skip
#: The two kernels of the compile table.
COMPILED: list[Case] = [
    (NARROW, SECOND, dtype, 0, tiles) for dtype in (F32, F64) for tiles in (UNROLLINGS[dtype], None)
] + [(LAPLACIAN, ("laplacian",), F32, 0, UNROLLINGS[F32])]


def plan_of(widths: Sequence[int], quantities: Sequence[str], dtype: torch.dtype) -> Plan:
    """Return the plan of a benchmark's network."""
    torch.manual_seed(0)
    network = fullyConnectedNN(list(widths)).double()
    return choose(network.forms(), Ask(frozenset(quantities)), dtype, widths[-1], GPU)


def served(sizes: Unrolling, dtype: torch.dtype, arch: int) -> Unrolling:
    """Return the sizes of a case, the usual ones as they are served for a compute capability."""
    return unrolling(dtype, arch) if sizes == UNROLLINGS[dtype] else sizes


def compiled(case: Case, arch: int) -> tuple[Any, Unrolled | None]:
    """Compile the kernel of a case, or take it from the cache on disk."""
    widths, quantities, dtype, _, sizes = case
    if sizes is None:
        return compile_kernel(dtype, arch), None
    kernel = source(plan_of(widths, quantities, dtype).program, dtype.itemsize, served(sizes, dtype, arch))
    return compile_unrolled(kernel, arch), kernel


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers, bytes on the stack (spilled registers) and instructions of a kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", run.stdout)}
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code.stdout, re.MULTILINE))
    return {"registers": found["REG"], "stack": found["STACK"], "instructions": instructions}


def describe(case: Case, arch: int) -> dict[str, Any]:
    """Compile a case and return the properties of its kernel."""
    began = time.perf_counter()
    kernel, written = compiled(case, arch)
    row = {
        **head(case), "arch": arch, "compile_s": round(time.perf_counter() - began, 1),
        "shared": kernel.metadata.shared, "forms": written.forms if written else None,
    }  # fmt: skip
    return {**row, **resources(kernel.asm["cubin"])}


class Bench:
    """Runs cases on the card, and remembers what results should be."""

    def __init__(self) -> None:
        """Begin with no results."""
        self.device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(self.device)
        self.arch = 10 * major + minor
        self._expected: dict[Any, dict[str, Any]] = {}

    def measure(self, case: Case) -> dict[str, Any]:
        """Run a case; return its time and error, and whether its bits are those of others and of single rows."""
        widths, quantities, dtype, n, sizes = case
        plan = plan_of(widths, quantities, dtype)
        x = torch.randn(n, widths[0], generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype).to(self.device)

        def outputs(count: int) -> dict[str, torch.Tensor]:
            return {
                name: torch.full((count, *plan.shapes[name]), float("nan"), dtype=dtype, device=self.device)
                for name in quantities
            }

        table = TritonProgram(plan.program, dtype, self.device)
        program = table
        if sizes is not None:
            program = UnrolledProgram(plan.program, dtype, self.device, served(sizes, dtype, self.arch))
        found = outputs(n)
        program.run({"x": x, **found}, 0, n)
        torch.cuda.synchronize()
        expected = self._wanted(plan, x, table, outputs(n))
        row: dict[str, Any] = {
            "error": max(
                ((found[name][:256].cpu().double() - expected["exact"][name]).abs().max()
                 / expected["exact"][name].abs().max()).item() for name in quantities
            ),
            "equals_table": all(torch.equal(found[name], expected["table"][name]) for name in quantities),
        }  # fmt: skip
        alone = True
        for at in {0, n // 3, n - 1}:
            single = outputs(1)
            program.run({"x": x[at : at + 1].contiguous(), **single}, 0, 1)
            alone &= all(torch.equal(single[name][0], found[name][at]) for name in quantities)
        row["equals_alone"] = alone
        row["us"] = microseconds(lambda: program.run({"x": x, **found}, 0, n))
        row["kernel_us"] = microseconds(lambda: program.run({"x": x, **found}, 0, n), is_queued=True)
        row["tile_rows"], row["launched"] = program._shape(n)
        return row

    def _wanted(
        self, plan: Plan, x: torch.Tensor, table: TritonProgram, out: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        key = (plan.operations, *x.shape, x.dtype)
        if key not in self._expected:
            from hessquik.backends.torch import TorchProgram

            table.run({"x": x, **out}, 0, len(x))
            some = x[:256].double().cpu()
            exact = {name: torch.empty((len(some), *array.shape[1:]), dtype=F64) for name, array in out.items()}
            TorchProgram(plan.graph, F64, torch.device("cpu"), 64).run({"x": some, **exact}, 0, len(some))
            self._expected[key] = {"table": out, "exact": exact}
        return self._expected[key]


def head(case: Case) -> dict[str, Any]:
    """Return what a case is about."""
    widths, quantities, dtype, n, sizes = case
    return {
        "network": "-".join(map(str, widths)), "quantities": " ".join(quantities), "dtype": str(dtype)[6:], "n": n,
        "kernel": "table" if sizes is None else f"own, {sizes.rows} rows, {sizes.instances} instances",
    }  # fmt: skip


def write(row: dict[str, Any], path: Path) -> None:
    """Print a row and add it to a file."""
    with path.open("a") as out:
        print(json.dumps(row), file=out)
    print(*row.values(), flush=True)


def compile_all(path: Path, arches: Sequence[int], processes: int) -> None:
    """Compile all cases in several processes and save the properties of their kernels."""
    path.unlink(missing_ok=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(describe, case, arch): case for arch in arches for case in COMPILED}
        for future in as_completed(futures):
            failure = future.exception()
            write({**head(futures[future]), "failed": repr(failure)} if failure else future.result(), path)


def measure_all(path: Path, begin: int, seconds: float) -> None:
    """Measure the cases from ``begin`` on; a new process goes on after a fault of the device."""
    began, bench = time.monotonic(), Bench()
    for place, case in enumerate(CASES[begin:], begin):
        left = seconds - time.monotonic() + began
        if left < 0:
            break
        row = head(case)
        try:
            row |= bench.measure(case)
        except Exception as error:
            row["failed"] = repr(error)[:300]
        write(row, path)
        if "CUDA error" in row.get("failed", ""):
            again = ["--output", str(path.parent), "--begin", str(place + 1), "--seconds", str(left)]
            os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_kernels", *again])


def main() -> None:
    """Write ``kernels.jsonl``, or ``compiled.jsonl``, one line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no kernel is measured")
    parser.add_argument("--begin", type=int, default=0, help="the first kernel to measure")
    parser.add_argument("--compile-only", action="store_true", help="on any machine")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="processors to compile for")
    parser.add_argument("--processes", type=int, default=1, help="that compile at a time")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.compile_only:
        compile_all(given.output / "compiled.jsonl", given.arch, given.processes)
    else:
        measure_all(given.output / "kernels.jsonl", given.begin, given.seconds)


if __name__ == "__main__":
    main()
