"""The measurements of serving as JSON, table and plot."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

__all__ = ["write"]

OURS, ECHO, NEAREST = "hessquik serve", "echo", "Mosec"
CONNECTIONS = ("1", "16", "64", "256")
#: Figure, its name, the other server, connections, direction and target of each goal that is a ratio.
GOALS = (
    *(
        ("requests_per_second", "requests/s", NEAREST, connections, "≥", wanted)
        for connections, wanted in zip(CONNECTIONS, (1.2, 6, 1.3, 1.2), strict=True)
    ),
    ("requests_per_second", "requests/s", ECHO, "64", "≥", 0.6),
    ("p50_ms", "p50", ECHO, "1", "≤", 2),
)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write performance-serving.json, .md and .svg."""
    (folder / "performance-serving.json").write_text(json.dumps(results, indent=1) + "\n")
    if "compare" in results:
        _plot(results["compare"]["contenders"], folder / "performance-serving.svg")
    (folder / "performance-serving.md").write_text("\n".join(_document(results)))


def _document(results: dict[str, Any]) -> list[str]:
    machine = results["machine"]
    lines = [
        "# Serving, measured",
        "",
        f"Made by `{results['command']}` in {results['minutes']} minutes on {machine['cores']} cores "
        f"({machine['processor']}) that the servers share with the load generator, wrk; load before the start "
        f"{machine['load_before']}. Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
        + f"; {', '.join(machine['peers'])}.",
        "",
        f"Figures are medians of {results['rounds']} rounds of {results['seconds']:g} s, ratios are medians of "
        "each round's ratio. Within a round the servers take turns; those that wait are frozen. All have the same "
        "network (ResNet d-64×5-1, float64) and the same engine, one thread a worker, and reply in JSON with value, "
        "gradient and Hessian (Triton in its own protocol's JSON); batching is tuned for one connection and for 64. "
        "Each one's answers were compared with autodiff in float64 before it was timed. *hessquik serve* is compiled "
        "by mypyc as in the container image, *interpreted* is the same from a checkout. *echo* sends the same bytes "
        "from bare ASGI and computes nothing: the floor.",
        "",
    ]
    if "compare" in results:
        measured = {name: of for name, of in results["compare"]["contenders"].items() if of["connections"]}
        lines += _comparison(measured)
    targets = _targets(results)
    if targets:
        lines += ["## Against the goals", "", "| goal | wanted | measured | |", "|---|---|---|---|"]
        lines += [
            f"| {goal} | {sign} {wanted:g} | {value:.2f} | {_verdict(value, sign, wanted)} |"
            for goal, sign, wanted, value in targets
        ]
        lines += [""]
    lines += _rest(results)
    if results["failed"]:
        lines += ["## What did not take part", ""]
        lines += [f"* {name}: {reason}" for name, reason in results["failed"].items()]
        lines += [""]
    return lines


def _comparison(contenders: dict[str, Any]) -> list[str]:
    lines = ["## One row a request", "", "![Requests per second and latency](performance-serving.svg)", ""]
    for title, figure, form in (
        ("Requests per second, by connections", "requests_per_second", "{:.0f}"),
        ("Median latency in ms, by connections", "p50_ms", "{:.2f}"),
        ("99th percentile in ms, by connections", "p99_ms", "{:.2f}"),
        ("Processor time per request in µs, of all of a server's processes", "processor_us", "{:.0f}"),
    ):
        lines += [f"{title}:", "", "| | " + " | ".join(CONNECTIONS) + " |", "|---|" + "--:|" * len(CONNECTIONS)]
        for name, of in contenders.items():
            cells = [
                form.format(_median(of, count, figure)) if count in of["connections"] else "–"
                for count in CONNECTIONS
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["| | largest error | tuned for one connection | tuned for many |", "|---|---|---|---|"]
    for name, of in contenders.items():
        error = f"{of['error']:.0e}" if "error" in of and name != ECHO else "–"
        tunings = [
            ", ".join(f"{k} {v:g}" for k, v in of["tuning"][use].items()) or "–" for use in ("latency", "throughput")
        ]
        lines.append(f"| {name} | {error} | {tunings[0]} | {tunings[1]} |")
    return [*lines, ""]


def _targets(results: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """Return for each goal its name, direction, target and measured value."""
    contenders = results.get("compare", {}).get("contenders", {})
    rows = [
        (f"{title}, {count} connections: ours ÷ {name}", sign, wanted, _ratio(contenders, OURS, name, count, figure))
        for figure, title, name, count, sign, wanted in GOALS
        if _has(contenders, OURS, count) and _has(contenders, name, count)
    ]
    if bulk := results.get("bulk"):
        share = median(a / b for a, b in zip(bulk["safetensors"], bulk["engine"], strict=True))
        rows.append(("bulk, rows/s, safetensors: ours ÷ engine alone", "≥", 0.85, share))
    if beside := results.get("beside_bulk"):
        p99_ms = median(one["p99_ms"] for one in beside["beside_bulk"])
        rows.append(("p99 of one-row requests beside a bulk load, ms", "≤", 4, p99_ms))
    return rows


def _rest(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if bulk := results.get("bulk"):
        lines += ["## Bulk", "", "4096 Hessians a request at d = 32 (34 MB as safetensors), two connections:", ""]
        lines += ["| | rows/s |", "|---|--:|"]
        lines += [f"| {name} | {median(rates):.0f} |" for name, rates in bulk.items()]
        lines += [""]
    if workers := results.get("workers"):
        lines += [
            "## Workers",
            "",
            "The load generator and the front take their part of the cores: a second worker gains only what is left.",
            "",
            "One row at 64 connections, and 1 to 256 rows (log-uniform) at 16:",
            "",
            "| workers | one row: requests/s | mixed: requests/s | rows/s | p50 ms | p99 ms |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for count, of in workers.items():
            mixed = {key: median(one[key] for one in of["mixed"]) for key in of["mixed"][0]}
            one_row = median(one["requests_per_second"] for one in of["one_row"])
            lines.append(
                f"| {count} | {one_row:.0f} | {mixed['requests_per_second']:.0f} | {mixed['rows_per_second']:.0f} "
                f"| {mixed['p50_ms']:.2f} | {mixed['p99_ms']:.2f} |"
            )
        lines += [""]
    if beside := results.get("beside_bulk"):
        lines += ["## Small requests beside a bulk load", "", "One row after the other on one connection:", ""]
        lines += ["| | requests/s | p50 ms | p99 ms |", "|---|--:|--:|--:|"]
        for name, title in (("alone", "alone"), ("beside_bulk", "beside a bulk load")):
            figures = [
                median(one[key] for one in beside[name]) for key in ("requests_per_second", "p50_ms", "p99_ms")
            ]
            lines.append("| {} | {:.0f} | {:.2f} | {:.2f} |".format(title, *figures))
        lines += [""]
    return lines


def _has(contenders: dict[str, Any], name: str, connections: str) -> bool:
    return connections in contenders.get(name, {}).get("connections", {})


def _median(of: dict[str, Any], connections: str, figure: str) -> float:
    return median(one[figure] for one in of["connections"][connections])


def _ratio(contenders: dict[str, Any], above: str, below: str, connections: str, figure: str) -> float:
    """Return the median of the rounds' ratios."""
    of_round = [
        {one["round"]: one[figure] for one in contenders[name]["connections"][connections]} for name in (above, below)
    ]
    both = of_round[0].keys() & of_round[1].keys()
    return median(of_round[0][number] / of_round[1][number] for number in both) if both else float("nan")


def _verdict(value: float, sign: str, wanted: float) -> str:
    return "met" if (value >= wanted if sign == "≥" else value <= wanted) else "**not met**"


def _plot(contenders: dict[str, Any], path: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "performance-serving"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, what, label in (
        (axes[0], "requests_per_second", "requests/s"),
        (axes[1], "p50_ms", "median latency, ms"),
    ):
        for name, of in contenders.items():
            counts = [count for count in CONNECTIONS if count in of["connections"]]
            style = {OURS: "o-", ECHO: "k--"}.get(name, "s-")
            width = 2.5 if name == OURS else 1.2
            axis.plot(
                [int(c) for c in counts], [_median(of, c, what) for c in counts], style, lw=width, ms=4, label=name
            )
        axis.set(xscale="log", yscale="log", xlabel="connections", ylabel=label, xticks=[int(c) for c in CONNECTIONS])
        axis.set_xticklabels(CONNECTIONS)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle("One row a request: value, gradient and Hessian of a ResNet 10-64×5-1")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
