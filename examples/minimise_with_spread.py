"""Minimise the served borehole ensemble by Newton's method in a trust region, with and without a look at the spread.

Start a server (``make serve``), then run ``python examples/minimise_with_spread.py --url http://127.0.0.1:8000``.

Nothing keeps the optimizer in the box where the networks were trained. Where they disagree, their mean means nothing:
the limited run refuses a step to where ``value_std`` is over a limit, and tries a shorter one. One request per trial
answers mean, gradient, Hessian and standard deviation together. Inputs are scaled: s = (x − centre) / half width.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, field

import numpy as np

from hessquik_client import Client, Model, OutsideDomainWarning
from hessquik_client.for_scipy import bounds

ITERATIONS = 30
#: Radius of the first trust region, and the shortest one.
FIRST_RADIUS, LAST_RADIUS = 0.5, 1e-3


@dataclass
class Path:
    """The points of a run (steps, d), and what the ensemble says there: mean and standard deviation."""

    points: list[np.ndarray] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)

    def add(self, x: np.ndarray, mean: float, spread: float) -> None:
        """Take another point."""
        self.points.append(x)
        self.means.append(mean)
        self.spreads.append(spread)


def step_within(gradient: np.ndarray, hessian: np.ndarray, radius: float) -> np.ndarray:
    """Minimise gᵀp + pᵀHp/2 over ‖p‖ ≤ radius: p = −(H + λI)⁻¹g, with λ ≥ 0 found by bisection."""
    eigenvalues, vectors = np.linalg.eigh(hessian)
    slope = vectors.T @ gradient

    def step(shift: float) -> np.ndarray:
        return -slope / (eigenvalues + shift)

    low = max(0.0, -eigenvalues[0]) + 1e-9
    if np.linalg.norm(step(low)) > radius:
        high = low + np.linalg.norm(slope) / radius
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if np.linalg.norm(step(middle)) > radius else (low, middle)
        low = high
    return vectors @ step(low)


def minimise(model: Model, centre: np.ndarray, half_width: np.ndarray, limit: float) -> Path:
    """Minimise the mean from the centre of the box; steps end where the standard deviation is below the limit."""

    def ask(s: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, float]:
        answer = model.evaluate(centre + half_width * s, ["value", "gradient", "hessian", "value_std"])
        gradient = half_width * answer.gradient[:, 0]
        hessian = np.outer(half_width, half_width) * answer.hessian[..., 0]
        return float(answer.value[0]), gradient, hessian, float(answer.value_std[0])

    s, radius, path = np.zeros_like(centre), FIRST_RADIUS, Path()
    mean, gradient, hessian, spread = ask(s)
    path.add(centre, mean, spread)
    for _ in range(ITERATIONS):
        p = step_within(gradient, hessian, radius)
        promised = -(gradient @ p + p @ hessian @ p / 2)
        there = ask(s + p)
        is_lower = mean - there[0] > 0.1 * promised
        if is_lower and there[3] <= limit:
            s, (mean, gradient, hessian, spread) = s + p, there
            path.add(centre + half_width * s, mean, spread)
            radius = min(2 * radius, 1.0)
        else:
            radius = radius / 2
        if radius < LAST_RADIUS:
            break
    return path


def borehole(x: np.ndarray) -> float:
    """Return the borehole function in closed form; NaN outside its domain."""
    rw, r, Tu, Hu, Tl, Hl, L, Kw = x
    if min(rw, Tu, Tl, L, Kw) <= 0 or r <= rw:
        return float("nan")
    return float(2 * np.pi * Tu * (Hu - Hl) / (np.log(r / rw) * (1 + Tu / Tl) + 2 * L * Tu / (rw**2 * Kw)))


def draw(picture: str, paths: dict[str, Path], limit: float, unit: str) -> None:
    """Draw means, truth and standard deviations along both runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, constrained_layout=True)
    for colour, (name, path) in zip(("C3", "C0"), paths.items(), strict=True):
        steps, means, spreads = np.arange(len(path.means)), np.array(path.means), np.array(path.spreads)
        above.plot(steps, means, "o-", color=colour, label=f"{name}: mean")
        above.fill_between(steps, means - 2 * spreads, means + 2 * spreads, color=colour, alpha=0.2, lw=0)
        truth = [borehole(x) for x in path.points]
        above.plot(steps, truth, "x--", color=colour, label=f"{name}: the function itself")
        below.semilogy(steps, spreads, "o-", color=colour, label=name)
    above.axhline(0, color="grey", lw=0.8)
    above.set(ylabel=unit, ylim=(-40, 90), title="Minimising an ensemble's mean; bands are two standard deviations")
    above.legend()
    below.axhline(limit, color="black", ls=":", label="limit")
    below.set(xlabel="accepted step", ylabel="standard deviation over the members")
    below.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Minimise an ensemble within the reach of its own spread.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is")
    parser.add_argument("--limit", type=float, default=0.3, help="largest standard deviation of the value")
    parser.add_argument("--picture", help="file to draw the two runs into")
    arguments = parser.parse_args()
    with Client(arguments.url) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", OutsideDomainWarning)  # the spread is what is looked at here
        model = client.model("borehole_ensemble")
        box, unit = bounds(model), model.describe()["metadata"]["output_names"][0]
        centre, half_width = (box.lb + box.ub) / 2, (box.ub - box.lb) / 2
        paths = {
            "unlimited": minimise(model, centre, half_width, np.inf),
            "limited": minimise(model, centre, half_width, arguments.limit),
        }
    for name, path in paths.items():
        outside = np.abs((path.points[-1] - centre) / half_width).max()
        print(
            f"{name + ':':<10} {len(path.means) - 1:>2} steps to {path.means[-1]:9.3f} ± {path.spreads[-1]:.3f}, "
            f"the function itself has {borehole(path.points[-1]):9.3f}; {outside:.2f} half widths from the centre"
        )
    if arguments.picture:
        draw(arguments.picture, paths, arguments.limit, unit)


if __name__ == "__main__":
    main()
