"""Random networks of every layer, activation and nesting, drawn from a seed."""

import random

import torch
from torch import nn

from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import ACTIVATIONS, hessQuikActivationFunction, softplusActivation

DIMENSIONS = (1, 2, 5, 17)
ALL = tuple(sorted(ACTIVATIONS))
#: Convex, non-decreasing activations, from which convex networks are made.
CONVEX = ("expActivation", "identityActivation", "softplusActivation")


def activation(draw: random.Random, names=ALL) -> hessQuikActivationFunction:
    """Return a random activation; softplus with a random β."""
    name = draw.choice(names)
    return softplusActivation(draw.choice((0.5, 1.0, 2.0))) if name == "softplusActivation" else ACTIVATIONS[name]()


def blocks(draw: random.Random, p: int, nesting: int) -> list[nn.Module]:
    """Return a random layer, or a few that belong together, with p input and any number of output features."""
    q, w, bias = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 4)), draw.random() < 0.7
    act = activation(draw)
    kinds = [
        lambda: [lay.singleLayer(p, q, act, bias)],
        lambda: [lay.resnetLayer(p, draw.choice((0.25, 1.0, -0.5)), act, bias)],
        lambda: [net.resnetNN(p, draw.choice((1, 2)), 0.5, act)],
        lambda: [net.fullyConnectedNN([p, w, q], act)],
        lambda: [lay.skipLayer(p, w, q, act, bias, draw.choice((None, "matrix")), offset=draw.random() < 0.5)],
        lambda: [lay.skipLayer(p, w, p, act, bias, "identity")],
        lambda: [lay.skipLayer(p, w, w, act, bias, None, mix=False, carried=draw.randrange(p + 1))],
        lambda: [lay.quadraticLayer(p, w)],
        lambda: [lay.quadraticICNNLayer(p, None, w)],
        lambda: [lay.ICNNLayer(p, None, w, act, bias), lay.quadraticICNNLayer(p, w, 2)],
        lambda: [net.ICNN(p, [None, w, q], act)],
    ]
    if p > 1:  # a convex layer that takes the features of any other layer as its [u x]
        cut = draw.randrange(1, p)
        kinds.append(lambda: [lay.ICNNLayer(p - cut, cut, w, act, bias)])
    if nesting:
        kinds.append(lambda: [network(draw, p, None, nesting - 1)])
    return draw.choice(kinds)()


def features(module: nn.Module) -> int:
    """Return the number of features that the next layer gets, which include the x of a convex layer."""
    return module.layers()[-1].dim_output() if isinstance(module, net.NN) else module.dim_output()


def network(draw: random.Random, d: int, m: int | None, nesting: int = 2) -> net.NN:
    """Return a random network with d inputs and m outputs, or any number of outputs if m is ``None``."""
    parts: list[nn.Module] = []
    for _ in range(draw.choice((0, 1, 2)) if m else draw.choice((1, 2))):
        parts += blocks(draw, features(parts[-1]) if parts else d, nesting)
    p = features(parts[-1]) if parts else d
    if m is not None:
        if draw.random() < 0.2:
            parts.append(net.ICNN(p, [None, m], activation(draw)))
        elif m == 1 and draw.random() < 0.4:
            parts.append(lay.quadraticLayer(p, 2))
        else:
            parts.append(lay.singleLayer(p, m, activation(draw), draw.random() < 0.7))
    return net.NN(*parts)


def convex_network(draw: random.Random, d: int) -> net.NN:
    """Return a random network that is convex in x, with one output or several."""
    widths = [None, *(draw.choice((1, 2, 4)) for _ in range(draw.choice((1, 2, 3))))]
    act = activation(draw, CONVEX)
    body = net.ICNN(d, widths, act)
    head = lay.quadraticICNNLayer(d, widths[-1], draw.choice((1, 2)))
    return draw.choice((body, net.NN(body, head), net.NN(*body, head), net.NN(lay.quadraticICNNLayer(d, None, 2))))


def tame(module: nn.Module, seed: int, scale: float = 0.6) -> nn.Module:
    """Give the module new float64 weights, small enough that a few quadratics and exponentials stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = max(parameter.shape)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            positive = name.rpartition(".")[2] in {"L", "w"}  # L⁺ and w⁺ are softplus of these, small far below 0
            parameter.copy_(scale * noise / fan_in**0.5 - 2.0 * positive)
    return module


def shapes() -> list[tuple[int, int]]:
    """Return all pairs (d, m) of dimensions."""
    return [(d, m) for d in DIMENSIONS for m in DIMENSIONS]


__all__ = ["ALL", "CONVEX", "DIMENSIONS", "activation", "convex_network", "network", "shapes", "tame"]
