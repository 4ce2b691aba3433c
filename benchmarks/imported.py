"""Networks imported from torch against the same networks written with our layers: part of ``make bench``.

Both compute the same thing in the same process, in turn, round by round, at new random points each round; a ratio is
the median over the rounds of (imported / written with our layers), with its quartiles. Times are the thread's own on
one core, so that other programs count less. The plans are equal.

    python -m benchmarks.imported --output FOLDER
"""

# ruff: noqa: E402 - torch counts its cores when it is imported.
from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

CORE = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, [CORE])
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn

import hessquik
from hessquik import Evaluator
from hessquik.activations import tanhActivation
from hessquik.layers import resnetLayer, singleLayer
from hessquik.networks import NN

ROUNDS = 41
#: Width d, hidden width, depth, and how many points.
NETWORKS = ((3, 32, 3, 1), (3, 32, 3, 256), (10, 64, 5, 1), (10, 64, 5, 256), (32, 128, 5, 64))
ASKED = (("value",), ("gradient",), ("value", "gradient", "hessian"), ("laplacian",))


class Residual(nn.Module):
    """x + tanh(Wx + b) / 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.tanh(self.linear(x))


def imported(d: int, w: int, depth: int) -> NN:
    """Return a network of torch, imported."""
    torch.manual_seed(0)
    blocks = [Residual(w) for _ in range(depth - 1)]
    return hessquik.from_torch(nn.Sequential(nn.Linear(d, w), nn.Tanh(), *blocks, nn.Linear(w, 1)))


def written(d: int, w: int, depth: int, weights: dict[str, Tensor]) -> NN:
    """Return the same network, written with our layers."""
    blocks = [resnetLayer(w, 0.5, tanhActivation()) for _ in range(depth - 1)]
    network = NN(singleLayer(d, w, tanhActivation()), *blocks, singleLayer(w, 1))
    network.load_state_dict(weights)
    return network


def seconds(evaluate: Evaluator, x: Tensor, asked: tuple[str, ...], repeats: int) -> float:
    begin = time.thread_time()
    for _ in range(repeats):
        evaluate(x, asked)
    return (time.thread_time() - begin) / repeats


def measure(d: int, w: int, depth: int, n: int, asked: tuple[str, ...]) -> str:
    """Return a row of the table."""
    network = imported(d, w, depth)
    both = Evaluator(network, threads=1), Evaluator(written(d, w, depth, network.state_dict()), threads=1)
    assert str(both[0].plan(asked)) == str(both[1].plan(asked))
    x = torch.randn(n, d)
    repeats = max(1, min(200, int(0.005 / min(seconds(each, x, asked, 3) for each in both))))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS):
        x = torch.randn(n, d)
        for i in (0, 1) if turn % 2 else (1, 0):
            times[i].append(seconds(both[i], x, asked, repeats))
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4, method="inclusive")
    mine, theirs = (statistics.median(spent) * 1e6 for spent in times)
    what = asked[-1]
    return (
        f"| {d}-{w}×{depth}-1, n = {n} | {what} | {mine:.1f} | {theirs:.1f} | {middle:.3f} ({low:.3f}–{high:.3f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder for the table")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    lines = ["| network, float32 | asked | imported, µs | with our layers, µs | ratio |", "|---|---|---|---|---|"]
    for sizes in NETWORKS:
        for asked in ASKED:
            lines.append(measure(*sizes, asked))
            print(lines[-1], flush=True)
    (arguments.output / "imported.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
