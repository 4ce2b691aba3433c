"""Rates on a GPU, for docs/performance-gpu.md: our kernel, JAX, and the copy and product rates of the same card.

    python -m benchmarks.gpu --output build

Times on the device are medians of CUDA events, inputs and results there: ``device_us`` of a call by itself, in which
the device waits for the host, and ``kernel_us`` of a call that is queued behind others. Every measured result is
compared with float64.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hessquik import Evaluator
from hessquik.networks import fullyConnectedNN

SECOND = ("value", "gradient", "hessian")
#: Widths, quantities, rows, dtype.
NARROW, WIDE = [10, 64, 64, 64, 64, 64, 1], [50, 768, 768, 512, 512, 1]
WORKLOADS = [
    *((NARROW, SECOND, n, torch.float32) for n in (1, 1024, 4096, 65536)),
    ([32, 64, 64, 64, 1], SECOND, 4096, torch.float32),
    ([100, 64, 64, 64, 1], ("laplacian",), 4096, torch.float32),
    *((NARROW, SECOND, n, torch.float64) for n in (1, 1024, 4096, 65536)),
    *((WIDE, ("laplacian",), n, dtype) for dtype in (torch.float64, torch.float32) for n in (1, 2048)),
]
#: Clock cycles that the device sleeps while calls are queued, two milliseconds or so.
SLEEP = 4_000_000


def microseconds(call: Callable[[], Any], repeats: int = 15, is_queued: bool = False) -> float:
    """Return the median time of a call on the device: by itself, or without the host's part if it is queued."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if is_queued:
            torch.cuda._sleep(SLEEP)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def latency(call: Callable[[], Any], repeats: int = 100) -> float:
    """Return the mean time of a call and waiting for it, on the host's clock."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats * 1e6


def with_jax(widths: list[int], quantities: tuple[str, ...], weights: list[Any], n: int, x: Any) -> float:
    """Return microseconds of jit(vmap) in JAX with products in full precision."""
    import jax
    import jax.numpy as jnp

    def network(point: Any) -> Any:
        for kernel, bias in weights:
            z = point @ kernel + bias
            point = jax.nn.softplus(z)
        return point[0]

    if quantities == ("laplacian",):
        per_row = lambda point: jnp.trace(jax.hessian(network)(point))  # noqa: E731
    else:
        per_row = lambda point: (*jax.value_and_grad(network)(point), jax.hessian(network)(point))  # noqa: E731
    call = jax.jit(jax.vmap(per_row))
    given = jnp.asarray(x)
    jax.block_until_ready(call(given))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(call(given))
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def host_path(calls: int = 500) -> str:
    """Return where a call's time goes for one row on the host, by the profiler, which itself takes its share."""
    evaluate = Evaluator(fullyConnectedNN(NARROW).double(), "cuda", torch.float32, compiled=[SECOND])
    x = torch.randn(1, 10)
    plain = latency(lambda: evaluate(x, SECOND), calls)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(calls):
        evaluate(x, SECOND)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(40)
    return f"{plain:.1f} microseconds a call; {calls} calls under the profiler:\n{text.getvalue()}"


def measured(
    widths: list[int], quantities: tuple[str, ...], n: int, dtype: torch.dtype, has_jax: bool
) -> dict[str, Any]:
    """Return the times and errors of a workload."""
    network = fullyConnectedNN(widths).double()
    begin = time.perf_counter()
    evaluate = Evaluator(network, "cuda", dtype, compiled=[quantities])
    ready = time.perf_counter() - begin
    x = torch.randn(n, widths[0], dtype=dtype, device="cuda")
    here = x.cpu()
    row: dict[str, Any] = {
        "network": "-".join(map(str, widths)), "quantities": " ".join(quantities),
        "n": n, "dtype": str(dtype)[6:],
        "ready_s": ready, "operations": evaluate.plan(quantities).operations,
    }  # fmt: skip
    row["device_us"] = microseconds(lambda: evaluate(x, quantities))
    row["kernel_us"] = microseconds(lambda: evaluate(x, quantities), is_queued=True)
    row["latency_us"] = latency(lambda: evaluate(x, quantities), 100 if n < 5000 else 10)
    row["host_us"] = latency(lambda: evaluate(here, quantities), 100 if n < 5000 else 5)
    row["million_rows_per_s"] = n / row["device_us"]
    row["tflops"] = row["operations"] * n / row["device_us"] * 1e-6
    sample = x[: min(n, 256)]
    exact = Evaluator(network, "cpu", torch.float64)(sample.double().cpu(), quantities)
    found = evaluate(x, quantities)
    row["error"] = max(
        ((getattr(found, q)[: len(sample)].cpu().double() - getattr(exact, q)).abs().max()
         / getattr(exact, q).abs().max()).item() for q in quantities
    )  # fmt: skip
    if has_jax:
        import numpy as np

        layers = [(p.K, p.b) for p in _layers(network)]
        parameters = [(k.detach().to(dtype).numpy(), b.detach().to(dtype).numpy()) for k, b in layers]
        try:
            row["jax_us"] = with_jax(widths, quantities, parameters, n, np.asarray(here))
        except Exception as error:
            row["jax_error"] = repr(error)[:200]
    return row


def main() -> None:
    """Measure and write ``gpu.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--first", type=int, default=len(WORKLOADS), help="number of workloads")
    parser.add_argument("--profile", action="store_true", help="where the host's time goes for one row")
    parser.add_argument("--seconds", type=float, default=150.0, help="after which nothing new is begun")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    torch.manual_seed(0)
    card = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    try:
        import jax

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        has_jax = True
    except ImportError:
        has_jax = False
    if given.profile:
        (given.output / "gpu-host.txt").write_text(host_path())
    for widths, quantities, n, dtype in WORKLOADS[: given.first]:
        if time.monotonic() - began > given.seconds:
            break
        row = measured(widths, quantities, n, dtype, has_jax)
        rows.append(row)
        print(json.dumps(row), flush=True)
        (given.output / "gpu.json").write_text(
            json.dumps({"card": card, "torch": torch.__version__, "rows": rows}, indent=1)
        )


def _layers(network: Any) -> list[Any]:
    """Return the single layers in order."""
    return [module for module in network.modules() if hasattr(module, "K") and hasattr(module, "b")]


if __name__ == "__main__":
    main()
