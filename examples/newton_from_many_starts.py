"""Newton's method from 1,000 starts at once on the served ``peaks``, and a picture of the paths.

Start a server (``make serve``), then run ``python examples/newton_from_many_starts.py --url http://127.0.0.1:8000``.

All paths take their steps together: one request an iteration brings the gradients and Hessians of all points that
still move. Newton's method looks for points where the gradient is zero, so it finds hills, hollows and saddles alike.
Those at a height of about zero near the rim, where peaks is flat, are the network's own: its error has a slope too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from numpy.typing import NDArray
from rich.progress import track

from hessquik_client import Client, Model

Array = NDArray[np.float64]
STARTS = 1000
ITERATIONS = 60
#: Longest step: far from a stationary point the Hessian says nothing about what is farther away.
LONGEST_STEP = 0.25
#: Largest entry of a gradient that counts as zero; peaks' own are of the order of 10.
TOLERANCE = 1e-9
#: Two paths with ends closer than this met.
SAME_POINT = 1e-4
COLOURS = {"hill": "tab:red", "hollow": "tab:blue", "saddle": "tab:green"}


def newton(model: Model, starts: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Walk from all starts until the gradient is zero or a path leaves the box.

    Args:
        model: A model with one output.
        starts: (n, d).
        lower: Of the box (d,).
        upper: Of the box (d,).

    Returns:
        The paths (iterations + 1, n, d) and which of them arrived (n,).
    """
    points, moving, arrived = starts.copy(), np.arange(len(starts)), np.zeros(len(starts), dtype=bool)
    paths = [points.copy()]
    for _ in track(range(ITERATIONS), description="Newton"):
        if moving.size:
            answer = model.evaluate(points[moving], ["gradient", "hessian"])
            gradient, hessian = answer["gradient"][..., 0], answer["hessian"][..., 0]
            is_there = np.abs(gradient).max(1) < TOLERANCE
            arrived[moving[is_there]] = True
            moving, gradient, hessian = (array[~is_there] for array in (moving, gradient, hessian))
            step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
            length = np.linalg.norm(step, axis=1, keepdims=True)
            points[moving] += step * np.minimum(1, LONGEST_STEP / length)
            moving = moving[((points[moving] >= lower) & (points[moving] <= upper)).all(1)]
        paths.append(points.copy())
    return np.array(paths), arrived


def distinct(points: Array) -> tuple[Array, NDArray[np.intp]]:
    """Return the distinct points among points (n, d), and for each point the index of its distinct one (n,)."""
    found: list[Array] = []
    number = np.empty(len(points), dtype=np.intp)
    for place, point in enumerate(points):
        near = [k for k, other in enumerate(found) if np.linalg.norm(point - other) < SAME_POINT]
        if not near:
            found.append(point)
        number[place] = near[0] if near else len(found) - 1
    return np.array(found).reshape(-1, points.shape[1]), number


def kind_of(hessian: Array) -> str:
    """Return the kind of a stationary point, by the signs of the eigenvalues of its Hessian (d, d)."""
    eigenvalues = np.linalg.eigvalsh(hessian)
    return "hollow" if eigenvalues[0] > 0 else "hill" if eigenvalues[-1] < 0 else "saddle"


def draw(model: Model, paths: Array, kinds: list[str], lower: Array, upper: Array, path: Path) -> None:
    """Draw the landscape and the paths (iterations + 1, n, 2) over it, coloured by what they lead to."""
    axis_x, axis_y = (np.linspace(low, high, 201) for low, high in zip(lower, upper, strict=True))
    grid = np.stack(np.meshgrid(axis_x, axis_y), axis=-1)
    heights = model.value(grid.reshape(-1, 2)).reshape(grid.shape[:2])
    figure, axes = plt.subplots(figsize=(8, 8), layout="constrained")
    axes.contour(axis_x, axis_y, heights, levels=30, colors="0.75", linewidths=0.6)
    for kind, colour in COLOURS.items():
        here = paths[:, [each == kind for each in kinds]]
        axes.add_collection(LineCollection(list(here.swapaxes(0, 1)), colors=colour, linewidths=0.5, alpha=0.5))
        axes.plot(*here[-1].T, "o", color=colour, label=kind)
    axes.set(xlabel="x", ylabel="y", title=f"Newton's method on peaks: {len(kinds)} paths that arrived", aspect=1)
    figure.legend(loc="outside lower center", ncols=len(COLOURS))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Newton's method from many starts on the served peaks.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is")
    parser.add_argument("--picture", type=Path, default=Path("newton_paths.png"), help="where to save the picture")
    arguments = parser.parse_args()
    mpl.use("Agg")
    with Client(arguments.url) as client:
        model = client.model("peaks")
        metadata = model.describe()["metadata"]
        lower, upper = np.array(metadata["lower_bounds"]), np.array(metadata["upper_bounds"])
        starts = np.random.default_rng(0).uniform(lower, upper, (STARTS, len(lower)))
        paths, arrived = newton(model, starts, lower, upper)
        paths = paths[:, arrived]
        stationary, number = distinct(paths[-1])
        answer = model.evaluate(stationary, ["value", "hessian"])
        kinds = [kind_of(hessian) for hessian in answer["hessian"][..., 0]]
        draw(model, paths, [kinds[k] for k in number], lower, upper, arguments.picture)
    print(f"{arrived.sum()} of {STARTS} paths arrived at {len(stationary)} points; the others left the box")
    for k in np.argsort(answer["value"][:, 0]):
        (x, y), height, paths_here = stationary[k], answer["value"][k, 0], (number == k).sum()
        print(f"  {kinds[k]:<6} at ({x:+.4f}, {y:+.4f}), height {height:+.4f}, {paths_here} paths")
    print(f"picture: {arguments.picture}")


if __name__ == "__main__":
    main()
