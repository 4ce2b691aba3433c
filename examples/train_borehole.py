"""Train ``models/borehole.safetensors``: the water flow through a borehole, in physical units.

Inputs and output are scaled by affine layers inside the network. Run ``python examples/train_borehole.py``; it takes
about two minutes.
"""

import torch
from fitting import Target, affine_layer, train
from torch import Tensor

from hessquik.activations import tanhActivation
from hessquik.layers import resnetLayer, singleLayer
from hessquik.networks import NN

SEED = 2


def borehole(x: Tensor) -> Tensor:
    """2π Tu (Hu−Hl) / (ln(r/rw) (1 + Tu/Tl) + 2 L Tu / (rw² Kw)) at one point."""
    rw, r, Tu, Hu, Tl, Hl, L, Kw = x
    return 2 * torch.pi * Tu * (Hu - Hl) / (torch.log(r / rw) * (1 + Tu / Tl) + 2 * L * Tu / (rw**2 * Kw))


TARGET = Target(
    name="borehole",
    description="Water flow from an upper to a lower aquifer through a borehole.",
    reference="Harper & Gupta 1983, ONWI-516; Morris, Mitchell & Ylvisaker 1993, doi:10.1080/00401706.1993.10485320",
    function=borehole,
    inputs={
        "radius of the borehole r_w [m]": (0.05, 0.15),
        "radius of influence r [m]": (100.0, 50000.0),
        "transmissivity of the upper aquifer T_u [m²/yr]": (63070.0, 115600.0),
        "potentiometric head of the upper aquifer H_u [m]": (990.0, 1110.0),
        "transmissivity of the lower aquifer T_l [m²/yr]": (63.1, 116.0),
        "potentiometric head of the lower aquifer H_l [m]": (700.0, 820.0),
        "length of the borehole L [m]": (1120.0, 1680.0),
        "hydraulic conductivity of the borehole K_w [m/yr]": (9855.0, 12045.0),
    },
    output="water flow [m³/yr]",
)


def clustered_points(n: int, seed: int) -> Tensor:
    """Points (n, 8), a quarter of them with ln r instead of r spread evenly: f bends most where r is small."""
    x = TARGET.spread_points(n, seed)
    r, low, high = x[: n // 4, 1], TARGET.lower()[1], TARGET.upper()[1]
    r.copy_(low * (high / low) ** ((r - low) / (high - low)))
    return x


if __name__ == "__main__":
    torch.manual_seed(SEED)
    points = clustered_points(1536, SEED)
    values = TARGET.derivatives(points).value
    assert values is not None
    width = 48
    network = NN(
        affine_layer(1 / TARGET.half_width(), -TARGET.centre() / TARGET.half_width()),
        singleLayer(8, width, tanhActivation(), dtype=torch.float64),
        resnetLayer(width, h=1.0, act=tanhActivation(), dtype=torch.float64),
        singleLayer(width, 1, dtype=torch.float64),
        affine_layer(values.std(0), values.mean(0)),
    )
    train(TARGET, network, points, rounds=80, seed=SEED)
