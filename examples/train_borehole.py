"""Train ``models/borehole.safetensors``: the water flow through a borehole, in physical units.

Inputs and output are scaled by affine layers inside the network. Run ``python examples/train_borehole.py``; it takes
about a minute.
"""

import torch
from fitting import Target, affine_layer, train
from torch import Tensor

from hessquik.activations import tanhActivation
from hessquik.layers import resnetLayer, singleLayer
from hessquik.networks import NN

SEED = 2


def borehole(x: Tensor) -> Tensor:
    """Return 2π Tu (Hu−Hl) / (ln(r/rw) (1 + Tu/Tl) + 2 L Tu / (rw² Kw)) at one point."""
    rw, r, Tu, Hu, Tl, Hl, L, Kw = x
    return 2 * torch.pi * Tu * (Hu - Hl) / (torch.log(r / rw) * (1 + Tu / Tl) + 2 * L * Tu / (rw**2 * Kw))


RADIUS = "radius of influence r [m]"
TARGET = Target(
    name="borehole",
    description="Water flow from an upper to a lower aquifer through a borehole.",
    reference="Harper & Gupta 1983, ONWI-516; Morris, Mitchell & Ylvisaker 1993, doi:10.1080/00401706.1993.10485320",
    function=borehole,
    inputs={
        "radius of the borehole r_w [m]": (0.05, 0.15),
        RADIUS: (100.0, 50000.0),
        "transmissivity of the upper aquifer T_u [m²/yr]": (63070.0, 115600.0),
        "potentiometric head of the upper aquifer H_u [m]": (990.0, 1110.0),
        "transmissivity of the lower aquifer T_l [m²/yr]": (63.1, 116.0),
        "potentiometric head of the lower aquifer H_l [m]": (700.0, 820.0),
        "length of the borehole L [m]": (1120.0, 1680.0),
        "hydraulic conductivity of the borehole K_w [m/yr]": (9855.0, 12045.0),
    },
    output="water flow [m³/yr]",
    logarithmic=(RADIUS,),
)
#: Of the units in the first layer, those that see little but r, each at another scale.
RADIUS_UNITS = 8


def points_near_small_radii(n: int, seed: int) -> Tensor:
    """Return points (n, 8), half of them with ln r instead of r spread evenly: f bends most where r is small."""
    x = TARGET.spread_points(n, seed)
    r, low, high = x[: n // 2, 1], TARGET.lower()[1], TARGET.upper()[1]
    r.copy_(low * (high / low) ** ((r - low) / (high - low)))
    return x


def resolve_small_radii(layer: singleLayer) -> None:
    """Set some units to rise from the lower bound of r over lengths from half its range down to 1/160 of that."""
    steepness = torch.logspace(0, 2.2, RADIUS_UNITS, dtype=torch.float64)
    assert layer.b is not None
    with torch.no_grad():
        layer.K[1, :RADIUS_UNITS] = steepness
        layer.b[:RADIUS_UNITS] = steepness


def untrained(points: Tensor, width: int) -> NN:
    """Return a network with new weights whose input and output are scaled by the box and by f at the points."""
    values = TARGET.derivatives(points).value
    assert values is not None
    half_width, centre = (TARGET.upper() - TARGET.lower()) / 2, (TARGET.upper() + TARGET.lower()) / 2
    first = singleLayer(8, width, tanhActivation(), dtype=torch.float64)
    resolve_small_radii(first)
    return NN(
        affine_layer(1 / half_width, -centre / half_width),
        first,
        resnetLayer(width, h=1.0, act=tanhActivation(), dtype=torch.float64),
        singleLayer(width, 1, dtype=torch.float64),
        affine_layer(values.std(0), values.mean(0)),
    )


if __name__ == "__main__":
    torch.manual_seed(SEED)
    points = points_near_small_radii(1024, SEED)
    train(TARGET, untrained(points, width=32), points, rounds=50, seed=SEED)
