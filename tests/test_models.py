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

from hessquik import EnsembleEvaluator, load
from hessquik.architecture import build
from hessquik.ensemble import evaluator_of
from hessquik.networks import NN, Ensemble
from hessquik.storage import METADATA, SavedNetwork, parse
from tests import oracle

MODELS = Path(__file__).parent.parent / "models"
FILES = sorted(MODELS.glob("*.safetensors"))
NAMES = [path.stem for path in FILES]
MAX_FILE_BYTES = 200_000
QUANTITIES = ("value", "gradient", "hessian")
#: Engine against torch.func in float64: rounding alone.
ENGINE_TOLERANCE = 1e-12
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
    """Return (ln Z)/6 by transfer matrices between neighbouring pairs of spins: Z = tr ∏ Tᵢ."""
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
PROMISES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float, float]]] = {
    "borehole": (borehole, (0.001, 0.002, 0.01)),
    "borehole_ensemble": (borehole, (0.001, 0.004, 0.02)),
    "ising_ring": (ising_ring, (0.001, 0.01, 0.03)),
    "peaks": (peaks, (0.001, 0.002, 0.01)),
}
#: Inputs on a logarithmic scale, by name and place.
LOGARITHMIC = {("borehole", 1), ("borehole_ensemble", 1)}


def read(name: str) -> SavedNetwork:
    return parse((MODELS / f"{name}.safetensors").read_bytes())


def bounds(saved: SavedNetwork) -> tuple[Tensor, Tensor]:
    lower, upper = (saved.metadata[key] for key in ("lower_bounds", "upper_bounds"))
    return torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64)


def unit_steps(name: str, x: Tensor) -> Tensor:
    """Return the derivatives of x (n, d) by coordinates in which the box, partly logarithmic, is [−1, 1]."""
    lower, upper = bounds(read(name))
    steps = ((upper - lower) / 2).repeat(len(x), 1)
    for place in range(x.shape[1]):
        if (name, place) in LOGARITHMIC:
            steps[:, place] = x[:, place] * torch.log(upper[place] / lower[place]) / 2
    return steps


def fresh_points(saved: SavedNetwork, n: int = FRESH_SAMPLES) -> Tensor:
    lower, upper = bounds(saved)
    draw = torch.rand(n, len(lower), generator=torch.Generator().manual_seed(FRESH_SEED), dtype=torch.float64)
    return lower + (upper - lower) * draw


def exact(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return value (n,), gradient (n, d) and Hessian (n, d, d) by torch.func."""
    vmap, grad, jacrev = torch.func.vmap, torch.func.grad, torch.func.jacrev
    return vmap(function)(x), vmap(grad(function))(x), vmap(jacrev(grad(function)))(x)


def evaluate(network: NN | Ensemble, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of a network or ensemble with one output by the engine."""
    out = evaluator_of(network)(x, QUANTITIES)
    assert out.value is not None
    assert out.gradient is not None
    assert out.hessian is not None
    return out.value[..., 0], out.gradient[..., 0], out.hessian[..., 0]


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


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
    lower, upper = bounds(saved)
    assert (lower < upper).all()
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
    steps = unit_steps(name, x)
    for quantity, found, true, scale, largest in zip(
        QUANTITIES,
        evaluate(saved.network, x),
        exact(function, x),
        (torch.ones(len(x)), steps, steps.unsqueeze(1) * steps.unsqueeze(2)),
        promised,
        strict=True,
    ):
        error = relative_error(found * scale, true * scale)
        stated = saved.metadata["training"][f"{quantity}_relative_error"]
        assert max(error, stated) <= largest, quantity
        assert stated / DRAW_TO_DRAW <= error <= stated * DRAW_TO_DRAW, quantity


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_the_network_itself(name: str) -> None:
    saved = read(name)
    x = fresh_points(saved, 64)
    for quantity, found, true in zip(
        QUANTITIES, evaluate(saved.network, x), oracle.derivatives(saved.network, x), strict=True
    ):
        assert relative_error(found, true.squeeze(-1)) <= ENGINE_TOLERANCE, quantity


def test_the_ensembles_spread_tells_the_box_from_what_is_far_outside() -> None:
    saved = read("borehole_ensemble")
    assert isinstance(saved.network, Ensemble)
    x, (lower, upper) = fresh_points(saved), bounds(saved)
    evaluate_ = EnsembleEvaluator(saved.network)
    inside = evaluate_(x, ("value", "value_std"))
    assert inside.value is not None
    assert inside.value_std is not None
    error = (inside.value[:, 0] - torch.func.vmap(borehole)(x)).abs()
    assert 0.5 < error.mean() / inside.value_std.mean() < 2
    far = (lower + upper) / 2 + 2 * (x - (lower + upper) / 2)
    beyond = (far > upper).any(1) | (far < lower).any(1)
    outside = evaluate_(far[beyond], ("value_std",)).value_std
    assert outside is not None
    assert outside.median() > 5 * inside.value_std.median()


def test_ising_ring_is_convex_also_outside_its_box() -> None:
    saved = read("ising_ring")
    x = 10 * fresh_points(saved)
    hessian = evaluate(saved.network, x)[2]
    smallest = torch.linalg.eigvalsh(hessian)[:, 0]
    assert smallest.min() >= -ENGINE_TOLERANCE * hessian.abs().max()


def test_an_untrained_network_breaks_the_promise() -> None:
    saved = read("peaks")
    function, promised = PROMISES["peaks"]
    torch.manual_seed(0)
    untrained = build(saved.architecture, dtype=torch.float64)
    assert isinstance(untrained, NN)
    x = fresh_points(saved)
    errors = map(relative_error, evaluate(untrained, x), exact(function, x))
    assert all(error > largest for error, largest in zip(errors, promised, strict=True))
