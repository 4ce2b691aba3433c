"""Minimise the served borehole surrogate within its bounds by SciPy's ``trust-constr`` with remote Hessians.

Start a server (``make serve``), then run ``python examples/minimise_borehole.py --url http://127.0.0.1:8000``.

The optimizer moves in the box scaled to [−1, 1]ᵈ, s = (x − centre) / half width: in physical units one input counts
in hundredths and another in tens of thousands, and no trust region is round in both.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.optimize import Bounds, minimize

from hessquik_client import Client
from hessquik_client.for_scipy import Objective, bounds


def main() -> None:
    parser = argparse.ArgumentParser(description="Minimise the served borehole surrogate within its bounds.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is")
    arguments = parser.parse_args()
    with Client(arguments.url) as client:
        model = client.model("borehole")
        metadata, box, objective = model.describe()["metadata"], bounds(model), Objective(model)
        centre, half_width = (box.lb + box.ub) / 2, (box.ub - box.lb) / 2
        print(f"at the centre of the box: {objective(centre):.4f} {metadata['output_names'][0]}")
        found = minimize(
            lambda s: objective(centre + half_width * s),
            np.zeros_like(centre),
            jac=lambda s: half_width * objective.jac(centre + half_width * s),
            hess=lambda s: np.outer(half_width, half_width) * objective.hess(centre + half_width * s),
            bounds=Bounds(-np.ones_like(centre), np.ones_like(centre)),
            method="trust-constr",
        )
    print(f"at the minimum:           {found.fun:.4f}, {found.nit} iterations, {found.nfev} points, a request each")
    minimum = centre + half_width * found.x
    for name, x, low, high in zip(metadata["input_names"], minimum, box.lb, box.ub, strict=True):
        print(f"  {name:<58} {x:>12.5g}   of {low:g} to {high:g}")


if __name__ == "__main__":
    main()
