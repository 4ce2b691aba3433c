"""Common parts of the training scripts: exact targets, the fit, the measure of its errors, and the saved file.

Every network here is fitted by Hermite interpolation: its values, gradients and Hessians are matched together, in
float64, by full-batch L-BFGS from a fixed seed on one thread, so that a run gives the same file again.

Letters: n samples, d inputs; all functions here have one output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.quasirandom import SobolEngine

import hessquik
from hessquik.calculus import Derivatives
from hessquik.ensemble import evaluator_of
from hessquik.layers import singleLayer
from hessquik.networks import NN, Ensemble

MODELS = Path(__file__).resolve().parent.parent / "models"
#: Points that the errors in a file are measured at; they have no part in the fit.
HELD_OUT_SAMPLES = 4096
#: Iterations between two looks at the progress.
ITERATIONS_PER_ROUND = 20
#: Pairs of steps and gradient differences that L-BFGS keeps; the networks are small, so many are cheap.
HISTORY = 100
#: What is fitted, and measured.
QUANTITIES = ("value", "gradient", "hessian")


@dataclass(frozen=True)
class Target:
    """A function f on a box, with what a user of its surrogate has to know.

    Attributes:
        name: Of the saved file.
        description: One sentence on what the network stands in for.
        reference: Where f comes from.
        function: f of one point (d,), a scalar, written in torch operations.
        inputs: Name with unit → lower and upper bound, in the order of the inputs.
        output: Name with unit.
        logarithmic: The inputs that f feels by their ratio, not by their difference.
    """

    name: str
    description: str
    reference: str
    function: Callable[[Tensor], Tensor]
    inputs: dict[str, tuple[float, float]]
    output: str
    logarithmic: tuple[str, ...] = ()

    def lower(self) -> Tensor:
        """Lower bounds (d,)."""
        return torch.tensor([low for low, _ in self.inputs.values()], dtype=torch.float64)

    def upper(self) -> Tensor:
        """Return upper bounds (d,)."""
        return torch.tensor([high for _, high in self.inputs.values()], dtype=torch.float64)

    def unit(self, x: Tensor) -> Tensor:
        """Return the derivatives of the points (n, d) by coordinates in which the box is [−1, 1]."""
        lower, upper = self.lower(), self.upper()
        logarithmic = torch.tensor([name in self.logarithmic for name in self.inputs])
        return torch.where(logarithmic, x * torch.log(upper / lower), upper - lower) / 2

    def spread_points(self, n: int, seed: int) -> Tensor:
        """Return points (n, d) that fill the box evenly: a scrambled Sobol sequence."""
        unit = SobolEngine(len(self.inputs), scramble=True, seed=seed).draw(n, dtype=torch.float64)
        return self.lower() + (self.upper() - self.lower()) * unit

    def random_points(self, n: int, seed: int) -> Tensor:
        """Return points (n, d) drawn from the uniform distribution on the box."""
        unit = torch.rand(n, len(self.inputs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.lower() + (self.upper() - self.lower()) * unit

    def derivatives(self, x: Tensor) -> Derivatives:
        """Return exact value (n, 1), gradient (n, d, 1) and Hessian (n, d, d, 1) of f by torch.func."""
        gradient = torch.func.grad(self.function)
        wanted = (self.function, gradient, torch.func.jacrev(gradient))
        found = (torch.func.vmap(of)(x).unsqueeze(-1) for of in wanted)
        return Derivatives(**dict(zip(QUANTITIES, found, strict=True)))


def affine_layer(scale: Tensor, offset: Tensor) -> singleLayer:
    """Return the layer y = scale ⊙ x + offset, which training does not change."""
    layer = singleLayer(len(scale), len(scale), dtype=torch.float64)
    layer.load_state_dict({"K": torch.diag(scale), "b": offset})
    return layer.requires_grad_(False)


def train(target: Target, network: NN | Ensemble, *points: Tensor, rounds: int, seed: int) -> None:
    """Fit a network to a target, measure it at points it has not seen, and save it in ``models/``.

    Args:
        target: What to fit.
        network: The network in float64, its weights as drawn; parameters without ``requires_grad`` stay. Or an
            ensemble of such, each fitted to points of its own.
        points: Where to fit it, (n, d); for each member of an ensemble.
        rounds: Rounds of :data:`ITERATIONS_PER_ROUND` iterations.
        seed: That points and weights were drawn with; the points that errors are measured at have the next one.
    """
    torch.set_num_threads(1)
    networks = network.networks() if isinstance(network, Ensemble) else [network]
    for one, x in zip(networks, points, strict=True):
        fit(one, target, x, rounds)

    x = target.random_points(HELD_OUT_SAMPLES, seed + 1)
    found = evaluator_of(network)(x, QUANTITIES)
    errors = relative_errors(found, target.derivatives(x), target.unit(x))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    path = MODELS / f"{target.name}.safetensors"
    hessquik.save(
        network,
        path,
        description=target.description,
        input_names=list(target.inputs),
        output_names=[target.output],
        lower_bounds=target.lower().tolist(),
        upper_bounds=target.upper().tolist(),
        training={
            "function": target.description,
            "reference": target.reference,
            "command": f"python examples/train_{target.name}.py",
            "method": "Hermite interpolation (values, gradients, Hessians) by L-BFGS",
            "samples": sum(map(len, points)),
            "seed": seed,
            "iterations": rounds * ITERATIONS_PER_ROUND,
            "parameters": parameters,
            "held_out_samples": HELD_OUT_SAMPLES,
            "errors": "root mean squares over the held-out points relative to the function's, derivatives by inputs "
            "scaled to [-1, 1]" + "".join(f", {name} on a logarithmic scale" for name in target.logarithmic),
            **{f"{name}_relative_error": error.item() for name, error in errors.items()},
        },
    )
    figures = ", ".join(f"{name} {error.item():.1e}" for name, error in errors.items())
    print(f"{path.relative_to(MODELS.parent)}: {parameters} parameters, relative errors: {figures}")


def fit(network: NN, target: Target, x: Tensor, rounds: int) -> None:
    """Minimise the sum of the squared relative errors of value, gradient and Hessian at the points (n, d)."""
    exact, unit = target.derivatives(x), target.unit(x)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.LBFGS(
        trained,
        max_iter=ITERATIONS_PER_ROUND,
        history_size=HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        names = ("value", "gradient", "hessian")
        found = Derivatives(**dict(zip(names, network(x, do_gradient=True, do_Hessian=True), strict=True)))
        loss = torch.stack([error**2 for error in relative_errors(found, exact, unit).values()]).sum()
        loss.backward()
        return loss

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"fitting {target.name}", total=rounds)
        for _ in range(rounds):
            loss = optimizer.step(closure)
            progress.update(task, advance=1, description=f"fitting {target.name}: relative error {loss**0.5:.1e}")


def relative_errors(found: Derivatives, exact: Derivatives, unit: Tensor) -> dict[str, Tensor]:
    """Return the errors ‖found − exact‖ / ‖exact‖ over all points, by quantity.

    Derivatives are taken per unit step, not per metre or year: otherwise those by the inputs with the smallest
    numbers would drown all others.

    Args:
        found: Value (n, 1), gradient (n, d, 1) and Hessian (n, d, d, 1) of the network.
        exact: The same of f.
        unit: What :meth:`Target.unit` gives at the points, (n, d).
    """
    step = unit.unsqueeze(-1)
    weights = {
        "value": torch.ones_like(step[:, 0]),
        "gradient": step,
        "hessian": step.unsqueeze(1) * step.unsqueeze(2),
    }
    return {
        name: ((getattr(found, name) - getattr(exact, name)) * weight).norm() / (getattr(exact, name) * weight).norm()
        for name, weight in weights.items()
    }
