"""Train ``models/ising_ring.safetensors``: the free energy of a ring of spins by an input-convex network.

The logarithm of a partition function is convex in the parameters of its energy; its gradient is the mean of the
observables that they multiply and its Hessian their covariance (here per spin), so both are worth asking for. The
network is convex by construction, whatever its weights. Run ``python examples/train_ising_ring.py``; it takes about
a minute.
"""

import itertools

import torch
from fitting import Target, train
from torch import Tensor

from hessquik.activations import softplusActivation
from hessquik.layers import ICNNLayer, quadraticICNNLayer
from hessquik.networks import ICNN, NN

SEED = 3
SPINS = 6


def observables(spins: int) -> Tensor:
    """Return for all 2^N states of a ring (2^N, 4): Σ sᵢ, Σ (−1)ⁱ sᵢ, Σ sᵢ sᵢ₊₁ and Σ sᵢ sᵢ₊₂."""
    s = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=spins)), dtype=torch.float64)
    alternating = (-1.0) ** torch.arange(spins)
    return torch.stack([s, alternating * s, s * s.roll(-1, 1), s * s.roll(-2, 1)], dim=-1).sum(1)


OBSERVABLES = observables(SPINS)


def log_partition(x: Tensor) -> Tensor:
    """(ln Z)/N with Z = Σ_s exp(h Σ sᵢ + g Σ (−1)ⁱ sᵢ + J₁ Σ sᵢ sᵢ₊₁ + J₂ Σ sᵢ sᵢ₊₂) at one point (h, g, J₁, J₂)."""
    return torch.logsumexp(OBSERVABLES @ x, 0) / SPINS


TARGET = Target(
    name="ising_ring",
    description=(
        "Logarithm of the partition function per spin of an Ising ring of 6 spins with fields and couplings to first "
        "and second neighbours; convex in all of them."
    ),
    reference="Ising 1925, doi:10.1007/BF02980577; convexity: Wainwright & Jordan 2008, doi:10.1561/2200000001",
    function=log_partition,
    inputs={
        "uniform field h [k_B T]": (-0.5, 0.5),
        "staggered field g [k_B T]": (-0.5, 0.5),
        "coupling of neighbours J_1 [k_B T]": (-0.5, 0.5),
        "coupling of second neighbours J_2 [k_B T]": (-0.5, 0.5),
    },
    output="(ln Z)/N",
)


def start_gently(network: NN) -> None:
    """Draw the weights anew so that the layers neither add up all units alike nor start almost linear.

    With the usual draw L⁺ = softplus(L) ≈ 0.7 everywhere: each layer multiplies the features by its width.
    """
    for layer in network.layers():
        if isinstance(layer, ICNNLayer):
            torch.nn.init.uniform_(layer.K, -2, 2)
            assert layer.b is not None
            torch.nn.init.uniform_(layer.b, -1, 1)
        positive = getattr(layer, "w" if isinstance(layer, quadraticICNNLayer) else "L")
        if positive is not None:
            torch.nn.init.normal_(positive, -4, 1)


if __name__ == "__main__":
    torch.manual_seed(SEED)
    width, depth = 32, 4
    network = NN(
        ICNN(4, [None, *[width] * depth], act=softplusActivation(beta=4.0), dtype=torch.float64),
        quadraticICNNLayer(4, width, rank=4, dtype=torch.float64),
    )
    start_gently(network)
    train(TARGET, network, TARGET.spread_points(512, SEED), rounds=80, seed=SEED)
