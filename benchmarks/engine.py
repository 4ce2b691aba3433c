"""The Evaluator against its peers, all in one run: ``make bench``.

Every contender computes the same thing on one core, in turn, round by round, at new random points each round. Our
answer is first compared with float64 automatic differentiation; the others are taken to be right. A ratio is the
median over the rounds of (the contender's time / ours), with the quartiles behind it.
"""

# ruff: noqa: E402 - the libraries count their cores when they are imported.
import argparse
import os
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["OMP_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import torch

from hessquik import Evaluator
from hessquik.activations import tanhActivation
from hessquik.layers import resnetLayer, singleLayer
from hessquik.networks import NN, NNPytorchAD

try:
    import folx
except ImportError:
    folx = None
try:
    import hessQuik.activations as original_activations
    import hessQuik.layers as original_layers
    import hessQuik.networks as original_networks
except ImportError:
    original_networks = None

torch.set_num_threads(1)
SECOND = ("value", "gradient", "hessian")
TANH = tanhActivation()
#: A contender that needs longer for one call is left out.
TOO_LONG_S = 1.0
#: The original holds w³ numbers per point for a Hessian; above this it is left out, too.
MOST_BYTES = 1 << 30


def residual(d, w, depth, m):
    hidden = [resnetLayer(w, 0.5, TANH) for _ in range(depth - 1)]
    return NN(singleLayer(d, w, TANH), *hidden, singleLayer(w, m))


def tapering():
    widths = [50, 768, 768, 512, 512]
    return NN(*(singleLayer(p, q, TANH) for p, q in pairwise(widths)), singleLayer(512, 1))


WORKLOADS = [
    *((f"paper, d = {d}", lambda d=d: residual(d, 16, 4, 1), 10) for d in (1, 8, 64, 256, 1024)),
    ("paper, d = 64, m = 8", lambda: residual(64, 16, 4, 8), 10),
    *((f"10-64×5-1, n = {n}", lambda: residual(10, 64, 5, 1), n) for n in (1, 256, 4096)),
    *((f"32-128×5-1, n = {n}", lambda: residual(32, 128, 5, 1), n) for n in (1, 256)),
    *((f"32-128×5-8, n = {n}", lambda: residual(32, 128, 5, 8), n) for n in (1, 64)),
    *((f"10-256×7-1, n = {n}", lambda: residual(10, 256, 7, 1), n) for n in (1, 128)),
    *((f"100-128×5-1, n = {n}", lambda: residual(100, 128, 5, 1), n) for n in (1, 32)),
    *((f"50-768-768-512-512-1, n = {n}", tapering, n) for n in (1, 16)),
]


def in_jax(network):
    """The network as a function of one point."""
    layers = [(layer, getattr(layer, "layer", layer)) for layer in network.layers()]
    arrays = [
        (layer, jnp.array(inner.K.detach().numpy()), jnp.array(inner.b.detach().numpy())) for layer, inner in layers
    ]

    def f(x):
        for layer, K, b in arrays:
            z = x @ K + b
            if isinstance(layer, resnetLayer):
                x = x + layer.h * jnp.tanh(z)
            else:
                x = jnp.tanh(z) if isinstance(layer.act, tanhActivation) else z
        return x

    return f


def in_torch(network):
    """The network as a function of one point, for torch.func."""

    def f(x):
        for layer in network.layers():
            inner = getattr(layer, "layer", layer)
            z = x @ inner.K + inner.b
            if isinstance(layer, resnetLayer):
                x = x + layer.h * torch.tanh(z)
            else:
                x = torch.tanh(z) if isinstance(layer.act, tanhActivation) else z
        return x

    return f


def in_original(network):
    """The same network in hessQuik 0.0.6."""
    layers = []
    for layer in network.layers():
        if isinstance(layer, resnetLayer):
            layers.append(
                original_layers.resnetLayer(layer.width, h=layer.h, act=original_activations.tanhActivation())
            )
        else:
            is_tanh = isinstance(layer.act, tanhActivation)
            act = original_activations.tanhActivation() if is_tanh else original_activations.identityActivation()
            layers.append(original_layers.singleLayer(layer.in_features, layer.out_features, act=act))
    copy = original_networks.NN(*layers)
    copy.load_state_dict(network.state_dict())
    return copy


def hessians(network, n):
    """Name → x ↦ (value, gradient, Hessian)."""
    g = in_torch(network)
    eager = torch.func.vmap(lambda x: (g(x), torch.func.jacrev(g)(x), torch.func.jacfwd(torch.func.jacrev(g))(x)))
    f = in_jax(network)
    jit = jax.jit(jax.vmap(lambda x: (f(x), jax.jacrev(f)(x), jax.jacfwd(jax.jacrev(f))(x))))
    found = {"torch.func": eager, "JAX": lambda x: jax.block_until_ready(jit(x))}
    widest = max(layer.dim_output() for layer in network.layers())
    if original_networks is not None and min(n, 8) * widest**3 * 4 < MOST_BYTES:
        copy = in_original(network)
        for mode, forward in (("forward", True), ("backward", False)):
            found[f"hessQuik 0.0.6 {mode}"] = lambda x, way=forward: copy(
                x, do_gradient=True, do_Hessian=True, forward_mode=way
            )
    by_columns = NNPytorchAD(network)  # one backward pass per output and column
    found["autograd by columns"] = lambda x: by_columns(x, do_gradient=True, do_Hessian=True)
    return found


def laplacians(network, n):
    """Name → x ↦ Laplacian."""
    g, f = in_torch(network), in_jax(network)
    eager = torch.func.vmap(lambda x: torch.func.hessian(g)(x).diagonal(dim1=-2, dim2=-1).sum(-1))
    jit = jax.jit(jax.vmap(lambda x: jnp.trace(jax.hessian(f)(x), axis1=-2, axis2=-1)))
    found = {"torch.func": eager, "JAX": lambda x: jax.block_until_ready(jit(x))}
    if folx is not None:
        forward = jax.jit(jax.vmap(lambda x: folx.forward_laplacian(f)(x).laplacian))
        found["folx"] = lambda x: jax.block_until_ready(forward(x))
    if original_networks is not None:
        copy = in_original(network)
        found["hessQuik 0.0.6 forward"] = lambda x: copy(x, do_gradient=True, do_Laplacian=True, forward_mode=True)
    return found


def is_right(network, quantity, out, x):
    """Whether our result is that of float64 automatic differentiation at the first points."""
    few = x[:2].double()
    g = in_torch(network.double())
    exact = torch.func.vmap(torch.func.hessian(g))(few).permute(0, 2, 3, 1)
    network.float()
    got = getattr(out, quantity)[:2].double()
    exact = exact if quantity == "hessian" else torch.einsum("naam->nm", exact)
    return float((got - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))


def seconds(call, x):
    begin = time.perf_counter()
    call(x)
    return time.perf_counter() - begin


def compare(network, n, quantities, contenders, rounds):
    """Median ratio and quartiles per contender, and our median time."""
    evaluate = Evaluator(network)
    x = torch.randn(n, evaluate.d)
    assert is_right(network, quantities[-1], evaluate(x, quantities), x), "ours is wrong"
    calls = {"ours": lambda x: evaluate(x, quantities), **contenders}
    kept = {}
    for name, call in calls.items():
        points = jnp.array(x.numpy()) if name in {"JAX", "folx"} else x
        if name not in {"JAX", "folx"} and seconds(call, x[:8]) * max(1, n / 32) > TOO_LONG_S:
            continue
        call(points)
        if (once := seconds(call, points)) < TOO_LONG_S:
            kept[name] = max(1, min(50, int(0.004 / once)))
    times = {name: [] for name in kept}
    for _ in range(rounds):
        x = torch.randn(n, evaluate.d)
        for name, repeats in kept.items():
            points = jnp.array(x.numpy()) if name in {"JAX", "folx"} else x
            times[name].append(
                seconds(lambda x, f=calls[name], r=repeats: [f(x) for _ in range(r)], points) / repeats
            )
    ours = times.pop("ours")
    ratios = {name: [t / o for t, o in zip(found, ours, strict=True)] for name, found in times.items()}
    plan = evaluate.plan(quantities)
    return (
        statistics.median(ours),
        plan.operations * n,
        {name: statistics.quantiles(r, n=4) for name, r in ratios.items()},
    )


def gemm_rate():
    """Measured operations per second of a 512³ product."""
    a, b, c = (torch.randn(512, 512) for _ in range(3))
    return 2 * 512**3 / min(seconds(lambda _: torch.mm(a, b, out=c), None) for _ in range(20))


def draw(rows, names, path):
    """Median ratios with their quartiles, one line of marks per workload."""
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(rows) + 1.2), layout="constrained")
    for name, marker in zip(names, "osD^v", strict=True):
        found = [(i, row[-1][name]) for i, row in enumerate(rows) if name in row[-1]]
        if found:
            places, quartiles = [i for i, _ in found], [q for _, q in found]
            middle = [q[1] for q in quartiles]
            spread = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
            axes.errorbar(middle, places, xerr=spread, fmt=marker, markersize=4, linewidth=0.8, label=name)
    axes.set_yticks(range(len(rows)), [f"{row[0]}: {row[1]}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time of the contender / time of the Evaluator")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="words in a workload's name")
    parser.add_argument("--table", type=Path, help="where to write the table, as Markdown")
    parser.add_argument("--plot", type=Path, help="where to draw it, as PNG")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names = ["hessQuik 0.0.6", "autograd by columns", "torch.func", "JAX", "folx"]
    lines = [
        f"{platform.machine()}, one core, torch {torch.__version__}, JAX {jax.__version__}, float32; "
        f"512³ product by torch: {gemm_rate() / 1e9:.0f} GFLOP/s.",
        "",
        f"| what | workload | ours, ms | GFLOP/s | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    for quantities, made in ((SECOND, hessians), (("laplacian",), laplacians)):
        for title, build, n in WORKLOADS:
            if arguments.only not in title:
                continue
            network = build()
            network.requires_grad_(False)
            ours, operations, ratios = compare(network, n, quantities, made(network, n), arguments.rounds)
            best = {}  # the original in the better of its modes
            for full, quartiles in sorted(ratios.items(), key=lambda item: -item[1][1]):
                best[next(name for name in names if full.startswith(name))] = quartiles
            rows.append((quantities[-1], title, best))
            quoted = {name: f"{q[1]:.1f} ({q[0]:.1f}–{q[2]:.1f})" for name, q in best.items()}
            cells = [quoted.get(name, "–") for name in names]
            rate = operations / ours / 1e9
            row = f"| {quantities[-1]} | {title} | {ours * 1e3:.3f} | {rate:.0f} | {' | '.join(cells)} |"
            lines.append(row)
            print(row, flush=True)
    if arguments.table:
        arguments.table.write_text("\n".join(lines) + "\n")
    if arguments.plot:
        draw(rows, names, arguments.plot)


if __name__ == "__main__":
    main()
