"""Train ``models/borehole_ensemble.safetensors``: five networks for the borehole, each from few points of its own.

Their mean is the surrogate, and their standard deviation says where the points did not determine it: outside the box,
and at its rim. Run ``python examples/train_borehole_ensemble.py``; it takes about a minute.
"""

from dataclasses import replace

import torch
from fitting import train
from train_borehole import TARGET, points_near_small_radii, untrained

from hessquik.networks import Ensemble

SEED = 3
MEMBERS = 5
#: Points of each member.
SAMPLES = 128


if __name__ == "__main__":
    torch.manual_seed(SEED)
    points = [points_near_small_radii(SAMPLES, SEED + 1000 * member) for member in range(MEMBERS)]
    ensemble = Ensemble(*(untrained(x, width=16) for x in points))
    train(replace(TARGET, name="borehole_ensemble"), ensemble, *points, rounds=30, seed=SEED)
