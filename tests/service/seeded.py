"""Networks that are known by their seeds, in a folder whose files tests replace."""

from __future__ import annotations

from pathlib import Path

import torch

import hessquik
from hessquik.activations import tanhActivation
from hessquik.networks import NN, fullyConnectedNN


def network(seed: int) -> NN:
    """Return the network of a seed."""
    torch.manual_seed(seed)
    return fullyConnectedNN([2, 8, 1], tanhActivation(), dtype=torch.float64)


def value(seed: int) -> float:
    """Return the value of a seed's network at (1, 1)."""
    return float(network(seed)(torch.ones(1, 2, dtype=torch.float64))[0].detach())


def write_first(folder: Path) -> Path:
    """Make a folder hold version 1 of the model ``net``, with the network of seed 1, and nothing else; return it."""
    (folder / "net").mkdir(exist_ok=True)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    hessquik.save(network(1), folder / "net" / "1.safetensors")
    return folder
