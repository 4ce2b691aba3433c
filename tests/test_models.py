"""The shipped networks: every file loads, says what it is, and is as good as it says.

The functions they were fitted to are written down a second time here, the ring of spins in another way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hessquik import Evaluator, load
from hessquik.networks import NN
from hessquik.storage import METADATA, SavedNetwork, parse

MODELS = Path(__file__).parent.parent / "models"
FILES = sorted(MODELS.glob("*.safetensors"))
NAMES = [path.stem for path in FILES]
MAX_FILE_BYTES = 200_000
#: Points of the fits and of the errors in the files were drawn with seeds below this one.
FRESH_SEED = 20_000
FRESH_SAMPLES = 2048
#: A norm over a few thousand points differs that much from one draw to the next.
DRAW_TO_DRAW = 1.5


def peaks(x: Tensor) -> Tensor:
    a, b = x[0], x[1]
    return (
        3 * (1 - a).square() * (-a.square() - (b + 1).square()).exp()
        - (2 * a - 10 * a.pow(3) - 10 * b.pow(5)) * (-a.square() - b.square()).exp()
        - (-(a + 1).square() - b.square()).exp() / 3
    )


def borehole(x: Tensor) -> Tensor:
    well_radius, radius, upper, upper_head, lower, lower_head, length, conductivity = x.unbind()
    log_ratio = radius.log() - well_radius.log()
    leak = 2 * length * upper / (log_ratio * well_radius.square() * conductivity)
    return 2 * torch.pi * upper * (upper_head - lower_head) / (log_ratio * (1 + leak + upper / lower))


def ising_ring(x: Tensor) -> Tensor:
    """(ln Z)/6 by transfer matrices between neighbouring pairs of spins: Z = tr ∏ Tᵢ."""
    field, staggered, first, second = x
    spin = torch.tensor([-1.0, 1.0], dtype=x.dtype)
    a, b, c = spin[:, None, None, None], spin[None, :, None, None], spin[None, None, None, :]
    middle = torch.eye(2, dtype=x.dtype)[None, :, :, None]  # the pairs (a, b) and (b, c) share their middle spin
    product = torch.eye(4, dtype=x.dtype)
    for place in range(6):
        here = field + staggered * (-1) ** place
        product = product @ ((here * a + first * a * b + second * a * c).exp() * middle).reshape(4, 4)
    return product.trace().log() / 6


#: The true function, and the largest relative errors of value, gradient and Hessian that we promise.
#: The Hessian of the borehole is taken without r: ∂²f/∂r² at the lower bound is a thousand times that elsewhere.
PROMISES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float, float]]] = {
    "borehole": (borehole, (0.01, 0.02, 0.05)),
    "ising_ring": (ising_ring, (0.01, 0.02, 0.05)),
    "peaks": (peaks, (0.01, 0.02, 0.05)),
}
HESSIAN_INPUTS = {"borehole": [0, 2, 3, 4, 5, 6, 7]}


def read(name: str) -> SavedNetwork:
    return parse((MODELS / f"{name}.safetensors").read_bytes())


def fresh_points(saved: SavedNetwork, n: int = FRESH_SAMPLES) -> Tensor:
    low, high = (torch.tensor(saved.metadata[key], dtype=torch.float64) for key in ("lower_bounds", "upper_bounds"))
    draw = torch.rand(n, len(low), generator=torch.Generator().manual_seed(FRESH_SEED), dtype=torch.float64)
    return low + (high - low) * draw


def exact(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value (n,), gradient (n, d) and Hessian (n, d, d) by torch.func."""
    vmap, grad, hessian = torch.func.vmap, torch.func.grad, torch.func.hessian
    return vmap(function)(x), vmap(grad(function))(x), vmap(hessian(function))(x)


def evaluate(network: NN, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a network with one output by the engine."""
    out = Evaluator(network)(x, ("value", "gradient", "hessian"))
    assert out.value is not None
    assert out.gradient is not None
    assert out.hessian is not None
    return out.value[..., 0], out.gradient[..., 0], out.hessian[..., 0]


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


def test_models_are_those_with_a_promise() -> None:
    assert sorted(PROMISES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_file_is_small_and_loads_in_float64(name: str) -> None:
    path = MODELS / f"{name}.safetensors"
    assert path.stat().st_size < MAX_FILE_BYTES
    network = load(path)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    assert network.dim_output() == 1


@pytest.mark.parametrize("name", NAMES)
def test_metadata_are_complete(name: str) -> None:
    saved = read(name)
    assert saved.metadata.keys() == METADATA.keys()
    lower, upper = saved.metadata["lower_bounds"], saved.metadata["upper_bounds"]
    assert all(low < high for low, high in zip(lower, upper, strict=True))
    training = saved.metadata["training"]
    assert training["parameters"] == sum(parameter.numel() for parameter in saved.network.parameters())
    script = re.fullmatch(r"python (examples/\w+\.py)", training["command"])
    assert script is not None
    assert (MODELS.parent / script[1]).is_file()
    assert training.keys() >= {"function", "reference", "method", "samples", "seed", "held_out_samples"}
    assert 0 <= training["seed"] < FRESH_SEED - 1


@pytest.mark.parametrize("name", NAMES)
def test_errors_at_fresh_points_are_those_in_the_file_and_within_the_promise(name: str) -> None:
    saved = read(name)
    function, promised = PROMISES[name]
    x = fresh_points(saved)
    lower, upper = (
        torch.tensor(saved.metadata[key], dtype=torch.float64) for key in ("lower_bounds", "upper_bounds")
    )
    unit = (upper - lower) / 2
    kept = HESSIAN_INPUTS.get(name, list(range(len(unit))))
    value, gradient, hessian = (
        relative_error(found * scale, true * scale)
        for found, true, scale in zip(
            evaluate(saved.network, x), exact(function, x), (1, unit, torch.outer(unit, unit)), strict=True
        )
    )
    found, true = evaluate(saved.network, x)[2], exact(function, x)[2]
    scale = torch.outer(unit, unit)
    reduced = relative_error((found * scale)[:, kept][..., kept], (true * scale)[:, kept][..., kept])
    assert (value, gradient, reduced) <= promised
    training = saved.metadata["training"]
    assert value <= DRAW_TO_DRAW * training["value_relative_error"]
    assert gradient <= DRAW_TO_DRAW * training["gradient_relative_error"]
    assert hessian
