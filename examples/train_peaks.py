"""Train ``models/peaks.safetensors``: MATLAB's peaks function on [−3, 3]² by a residual network.

Run ``python examples/train_peaks.py``; it takes about a minute.
"""

import torch
from fitting import Target, train
from torch import Tensor

from hessquik.activations import tanhActivation
from hessquik.layers import singleLayer
from hessquik.networks import NN, resnetNN

SEED = 1


def peaks(x: Tensor) -> Tensor:
    """Return 3(1−x)² exp(−x²−(y+1)²) − 10(x/5−x³−y⁵) exp(−x²−y²) − ⅓ exp(−(x+1)²−y²) at one point (x, y)."""
    x, y = x
    hill = 3 * (1 - x) ** 2 * torch.exp(-(x**2) - (y + 1) ** 2)
    ring = 10 * (x / 5 - x**3 - y**5) * torch.exp(-(x**2) - y**2)
    hollow = torch.exp(-((x + 1) ** 2) - y**2) / 3
    return hill - ring - hollow


TARGET = Target(
    name="peaks",
    description="MATLAB's peaks: three hills and three hollows, a test function for interpolation and optimization.",
    reference="MATLAB documentation, peaks, https://www.mathworks.com/help/matlab/ref/peaks.html",
    function=peaks,
    inputs={"x": (-3.0, 3.0), "y": (-3.0, 3.0)},
    output="peaks",
)

if __name__ == "__main__":
    torch.manual_seed(SEED)
    width = 32
    network = NN(
        singleLayer(2, width, tanhActivation(), dtype=torch.float64),
        resnetNN(width, depth=2, h=0.5, act=tanhActivation(), dtype=torch.float64),
        singleLayer(width, 1, dtype=torch.float64),
    )
    train(TARGET, network, TARGET.spread_points(512, SEED), rounds=100, seed=SEED)
