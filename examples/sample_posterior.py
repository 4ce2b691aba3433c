"""Sample the inputs of the served borehole surrogate given a measured flow, by a stock UM-Bridge client.

Start a server (``make serve``), then run ``python examples/sample_posterior.py --url http://127.0.0.1:8000``.

Unknown are the eight inputs x = centre + half width · s. A priori s is normal with standard deviation 0.4, cut off at
the box [−1, 1]⁸; measured is the flow y = f(x) + e, e normal with standard deviation σ. So
log p(s | y) = −|s|²/(2 · 0.4²) − (y − f)²/(2σ²) + constant, with gradient −s/0.4² + half width · ∇f (y − f)/σ².

The Metropolis-adjusted Langevin algorithm (doi:10.1111/1467-9868.00123) proposes s + ε²/2 ∇log p + ε·normal. Every
chain is a thread with requests of one point each, as UM-Bridge has them; the server computes together what the
threads ask for at the same time.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import umbridge
from numpy.typing import NDArray

from hessquik_client import Client

Array = NDArray[np.float64]

PRIOR = 0.4
MEASURED, NOISE = 120.0, 10.0


class Posterior:
    """log p(s | y) and its gradient, from UM-Bridge's Evaluate and Gradient."""

    def __init__(self, url: str, lower: Array, upper: Array) -> None:
        self.model = umbridge.HTTPModel(url, "borehole")
        self.centre, self.half_width = (lower + upper) / 2, (upper - lower) / 2

    def __call__(self, s: Array) -> tuple[float, float, Array]:
        """Return the flow, log p and its gradient; outside of the box p is 0 and no request is sent."""
        if (abs(s) > 1).any():
            return 0.0, -np.inf, np.zeros_like(s)
        x = (self.centre + self.half_width * s).tolist()
        flow = self.model([x])[0][0]
        misfit = (MEASURED - flow) / NOISE
        pull = np.array(self.model.gradient(0, 0, [x], [misfit / NOISE]))  # Jᵀ·sens
        return flow, -(s @ s) / (2 * PRIOR**2) - misfit**2 / 2, -s / PRIOR**2 + self.half_width * pull


def sample(posterior: Posterior, seed: int, steps: int, step: float) -> tuple[Array, float]:
    """Return one chain: the flows of its second half, and the share of accepted proposals."""
    dice = np.random.default_rng(seed)
    s = np.clip(dice.normal(0, PRIOR, len(posterior.centre)), -0.9, 0.9)
    flow, log_p, slope = posterior(s)
    flows, accepted = [], 0
    for _ in range(steps):
        forth = dice.normal(size=len(s))
        other = s + step**2 / 2 * slope + step * forth
        other_flow, other_log_p, other_slope = posterior(other)
        back = (s - other - step**2 / 2 * other_slope) / step
        if np.log(dice.uniform()) < other_log_p - log_p + (forth @ forth - back @ back) / 2:
            s, flow, log_p, slope, accepted = other, other_flow, other_log_p, other_slope, accepted + 1
        flows.append(flow)
    return np.array(flows[steps // 2 :]), accepted / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is")
    parser.add_argument("--chains", type=int, default=16, help="threads, one chain each")
    parser.add_argument("--steps", type=int, default=200, help="proposals of each chain")
    parser.add_argument("--step", type=float, default=0.14, help="ε, in half widths of the box")
    arguments = parser.parse_args()
    with Client(arguments.url) as client:  # UM-Bridge has no metadata
        metadata = client.model("borehole").describe()["metadata"]
    posterior = Posterior(arguments.url, np.array(metadata["lower_bounds"]), np.array(metadata["upper_bounds"]))
    with ThreadPoolExecutor(arguments.chains) as threads:
        ends = threads.map(
            lambda seed: sample(posterior, seed, arguments.steps, arguments.step), range(arguments.chains)
        )
        flows, shares = (np.array(part) for part in zip(*ends, strict=True))
    # Gelman and Rubin's potential scale reduction (doi:10.1214/ss/1177011136): near 1 when the chains agree.
    within, between = flows.var(1, ddof=1).mean(), flows.mean(1).var(ddof=1)
    count = flows.shape[1]
    reduction = np.sqrt((count - 1) / count + between / within)
    print(f"measured:  {MEASURED:.1f} ± {NOISE:.1f} m³/yr")
    print(f"posterior: {flows.mean():.1f} ± {flows.std():.1f} m³/yr")
    print(f"{flows.size} draws of {len(flows)} chains, {shares.mean():.0%} accepted, scale reduction {reduction:.3f}")


if __name__ == "__main__":
    main()
