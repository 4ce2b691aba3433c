"""Calibrate the served borehole surrogate by PyMC: inputs that explain a measured flow, sampled by NUTS.

Start a server (``make serve``), then run ``python examples/sample_with_pymc.py --url http://127.0.0.1:8000``. It
needs ``pip install 'hessquik-service[pymc]' matplotlib``.

Inputs are scaled to s in [−1, 1]⁸, s ~ N(0, 0.4²) there; the measured flow is 120 ± 10 m³/yr. Every leapfrog step is
one request, which answers value and gradient.
"""

from __future__ import annotations

import argparse
import logging

import numpy as np
import pymc as pm
import pytensor

from hessquik_client import Client
from hessquik_client.for_pymc import remote_function
from hessquik_client.for_scipy import bounds

MEASURED, ERROR = 120.0, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample the inputs of the borehole given its flow, by NUTS.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is")
    parser.add_argument("--draws", type=int, default=500, help="per chain, after as many to tune")
    parser.add_argument("--picture", help="file to draw prior and posterior into")
    arguments = parser.parse_args()
    logging.getLogger("pymc").setLevel(logging.ERROR)
    with Client(arguments.url) as client, pytensor.config.change_flags(mode="FAST_COMPILE"), pm.Model():
        borehole = client.model("borehole")
        metadata, box = borehole.describe()["metadata"], bounds(borehole)
        centre, half_width = (box.lb + box.ub) / 2, (box.ub - box.lb) / 2
        s = pm.TruncatedNormal("s", 0.0, 0.4, lower=-1.0, upper=1.0, shape=len(centre))
        flow = pm.Deterministic("flow", remote_function(borehole)(centre + half_width * s)[0])
        pm.Normal("measured", mu=flow, sigma=ERROR, observed=MEASURED)
        trace = pm.sample(arguments.draws, tune=arguments.draws, chains=2, cores=1, random_seed=0, progressbar=False)
        prior = np.random.default_rng(0).normal(0.0, 0.4, (4 * arguments.draws, len(centre)))
        prior = prior[(np.abs(prior) <= 1).all(axis=1)]
        flows = borehole.value(centre + half_width * prior)[:, 0]
    posterior = {name: trace.posterior[name].to_numpy() for name in ("s", "flow")}
    drawn = posterior["flow"].ravel()
    print(f"prior:     {flows.mean():.1f} ± {flows.std():.1f} {metadata['output_names'][0]}")
    print(f"posterior: {drawn.mean():.1f} ± {drawn.std():.1f}, {drawn.size} draws")
    if arguments.picture:
        draw(arguments.picture, prior, flows, posterior["s"].reshape(-1, len(centre)), drawn)


def draw(picture: str, prior: np.ndarray, flows: np.ndarray, posterior: np.ndarray, drawn: np.ndarray) -> None:
    """Draw the flow, and the two inputs that it says most of, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), constrained_layout=True)
    for values, colour, name in ((flows, "C7", "prior"), (drawn, "C0", "posterior")):
        left.hist(values, bins=40, density=True, color=colour, alpha=0.6, label=name)
    left.axvline(MEASURED, color="C3", label="measured")
    left.axvspan(MEASURED - ERROR, MEASURED + ERROR, color="C3", alpha=0.15, lw=0)
    left.set(xlabel="water flow [m³/yr]", ylabel="density")
    left.legend()
    first, second = 0, 3  # the radius of the borehole, the head of the upper aquifer
    right.plot(prior[:, first], prior[:, second], ".", color="C7", ms=2, alpha=0.6, label="prior")
    right.plot(posterior[:, first], posterior[:, second], ".", color="C0", ms=3, label="posterior")
    right.set(xlabel="radius of the borehole, scaled", ylabel="head of the upper aquifer, scaled")
    right.legend(loc="lower left")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
