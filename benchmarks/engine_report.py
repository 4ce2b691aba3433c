"""The engine's measurements as a table, a plot, and a comparison with the wanted figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from math import exp, log
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

__all__ = ["line", "write"]

NAMES = ["hessQuik 0.0.6", "its NNPytorchAD", "torch.func", "torch.compile", "JAX", "folx"]
HEAD = ["what", "workload", "ours, ms", "GFLOP/s", "of the floor", *NAMES]


def write(parts: Iterable[str], folder: Path) -> None:
    """Write engine.md and engine.png from the parts' results that are in the folder."""
    paths = [folder / f"engine-{part}.json" for part in parts]
    found = {path: json.loads(path.read_text()) for path in paths if path.exists()}
    timed = [part for part in found.values() if "floors" in part]
    lines = [f"{timed[0]['machine']}; {timed[0]['versions']}.", ""] if timed else []
    lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for part in timed:
        threads = ", two threads" if part["threads"] > 1 else ""
        lines += [line(row, part["floors"], threads) for row in part["rows"]]
    rows = [row for part in timed if part["threads"] == 1 for row in part["rows"]]
    if rows:
        lines += ["", *figures(rows), "", *at_one_point(rows), "", *rates(timed)]
        draw(rows, folder / "engine.png")
    for part in found.values():
        if part["part"] == "scaling":
            lines += ["", *scaling(part["rows"])]
        if part["part"] == "memory":
            lines += ["", *memory(part["rows"])]
    (folder / "engine.md").write_text("\n".join(lines) + "\n")


def line(row: dict[str, Any], floors: dict[str, float], suffix: str = "") -> str:
    """Return a row of the table; the floor is the slower of computing and of writing the results."""
    rate = row["operations"] / row["ours_s"]
    floor = max(row["operations"] / floors[row["dtype"]], row["bytes"] / floors["write"])
    found = best(row)
    cells = [
        f"{found[name][1]:.1f} ({found[name][0]:.1f}–{found[name][2]:.1f})" if name in found else missing(row, name)
        for name in NAMES
    ]
    ours = [f"{row['ours_s'] * 1e3:.3f}", f"{rate / 1e9:.0f}", f"{floor / row['ours_s']:.0%}"]
    return f"| {' | '.join([row['what'], row['title'] + suffix, *ours, *cells])} |"


def missing(row: dict[str, Any], name: str) -> str:
    """Return the text in place of a contender's figure: wrong, too slow, or – if there is no more to say."""
    said = {note for full, note in row["notes"].items() if full.startswith(name)}
    return "wrong" if any(note.startswith("wrong") for note in said) else "too slow" if said else "–"


def best(row: dict[str, Any]) -> dict[str, list[float]]:
    """Return the quartiles of the ratios by contender, the original in the better of its modes."""
    ordered = sorted(row["ratios"].items(), key=lambda item: -item[1][1])
    return {next(name for name in NAMES if full.startswith(name)): ratio for full, ratio in ordered}


def figures(rows: list[dict[str, Any]]) -> list[str]:
    """Return the smallest and the geometric mean of the median ratios, and the targets."""
    hessian = [row for row in rows if row["what"] == "hessian"]
    paper = [row for row in hessian if row["title"].startswith("paper") and row["dtype"] == "float32"]
    scalar = [row for row in paper if "m =" not in row["title"]]
    laplacian = [row for row in rows if row["what"] == "laplacian"]
    narrow = [row for row in laplacian if row["title"].startswith("paper") and row["d"] >= 256]
    wide = [row for row in hessian if "×" in row["title"] and "convex" not in row["title"] and row["n"] >= 256]
    large = [row for row in rows if row["n"] * row["d"] >= 256]

    def of(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda row: best(row)[name][1] if name in best(row) else None

    def least(row: dict[str, Any]) -> float | None:
        return min(best(row)[name][1] for name in ("torch.func", "torch.compile", "JAX", "folx") if name in best(row))

    wanted = [
        ("paper's scalar figure", NAMES[0], "3", scalar, of(NAMES[0])),
        ("the same, d ≥ 256", NAMES[0], "30", [row for row in scalar if row["d"] >= 256], of(NAMES[0])),
        ("wide networks, n ≥ 256", NAMES[0], "60", wide, of(NAMES[0])),
        ("all", "torch.func", "5", rows, of("torch.func")),
        ("all", "torch.compile", "1.5", rows, of("torch.compile")),
        ("n · d ≥ 256", "JAX", "1.5, mean 3", large, of("JAX")),
        ("n = 1", "JAX", "0.8", [row for row in rows if row["n"] == 1], of("JAX")),
        ("Laplacians", "best of torch, JAX, folx", "1.15, mean 2", laplacian, least),
        ("the same, paper, d ≥ 256", "best of torch, JAX, folx", "5", narrow, least),
    ]
    lines = ["| rows | against | wanted | least | at | geometric mean | rows |", "|---|---|---|---|---|---|---|"]
    for title, against, least_wanted, among, ratio in wanted:
        found = [(value, row) for row in among if (value := ratio(row)) is not None]
        if found:
            smallest, where = min(found, key=lambda item: item[0])
            mean = exp(sum(log(value) for value, _ in found) / len(found))
            at = f"{where['what']}: {where['title']}"
            lines.append(
                f"| {title} | {against} | {least_wanted} | {smallest:.1f} | {at} | {mean:.1f} | {len(found)} |"
            )
    return lines


def at_one_point(rows: list[dict[str, Any]]) -> list[str]:
    """Return the time of a call that computes nothing."""
    calls = sorted(row["call_s"] * 1e6 for row in rows)
    return [f"A call on no points takes {calls[0]:.0f}–{calls[-1]:.0f} µs, median {calls[len(calls) // 2]:.0f} µs."]


def rates(parts: list[dict[str, Any]]) -> list[str]:
    """Return the lower bounds that were measured in each part, and the compile times."""
    lines = [
        "| part | threads | product, float32 | float64 | writing | copying | torch.compile, s |",
        f"|{'---|' * 7}",
    ]
    for part in parts:
        floors = part["floors"]
        compiling = sum(row["compile_s"] for row in part["rows"])
        cells = [
            part["part"],
            part["threads"],
            *(f"{floors[kind] / 1e9:.0f} GFLOP/s" for kind in ("float32", "float64")),
        ]
        cells += [f"{floors[kind] / 1e9:.0f} GB/s" for kind in ("write", "copy")]
        lines.append(f"| {' | '.join(map(str, cells))} | {compiling:.0f} |")
    return lines


def scaling(rows: list[dict[str, Any]]) -> list[str]:
    """Return the section about two threads."""
    lines = ["| what | workload | one thread, ms | two threads, ms | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        low, middle, high = row["ratios"]
        times = f"{row['one_s'] * 1e3:.2f} | {row['two_s'] * 1e3:.2f}"
        lines.append(f"| {row['what']} | {row['title']} | {times} | {middle:.2f} ({low:.2f}–{high:.2f}) |")
    return lines


def memory(rows: list[dict[str, Any]]) -> list[str]:
    """Return the section about peak memory."""
    lines = ["| value, gradient, Hessian | inputs and results | beyond them |", "|---|---|---|"]
    for row in rows:
        sizes = (row["result_bytes"], max(0, row["beyond_bytes"]))
        lines.append(f"| {row['title']} | {' | '.join(f'{size / 2**20:.0f} MiB' for size in sizes)} |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the median ratios with their quartiles, one line per row."""
    figure, axes = plt.subplots(figsize=(8, 0.19 * len(rows) + 1.2), layout="constrained")
    for name, marker in zip(NAMES, "osDX^v", strict=True):
        found = [(i, best(row)[name]) for i, row in enumerate(rows) if name in best(row)]
        if found:
            places, quartiles = [i for i, _ in found], [q for _, q in found]
            middle = [q[1] for q in quartiles]
            spread = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
            axes.errorbar(middle, places, xerr=spread, fmt=marker, markersize=3.5, linewidth=0.7, label=name)
    axes.set_yticks(range(len(rows)), [f"{row['what']}: {row['title']}" for row in rows], fontsize=6)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time of the contender / time of the Evaluator")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
