"""Proof that the derivatives of a network are right, as the Evaluator computes them.

Every backend that an Evaluator may use on this machine computes every quantity at random points, in float64 and in
float32, and is compared with torch's automatic differentiation of an independent forward pass in float64
(:mod:`hessquik.reference`). A row computed in a large tile is compared with itself computed alone, to the last bit.
The documented interface is checked by Taylor tests and compared with finite differences.

All comparisons are in natural units: an input moves by ``scale``, half the distance of its bounds, so that
derivatives have the units of the value. Quantities that a user registered are the exception, since their units are
not known; their formulas are applied to automatic differentiation's derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hessquik import calculus
from hessquik.activations import kinks
from hessquik.backends import names as backend_names
from hessquik.ensemble import EnsembleEvaluator
from hessquik.errors import DerivativeError
from hessquik.evaluator import Evaluator
from hessquik.networks import NN, Ensemble
from hessquik.quantities import QUANTITIES, SPREADS, Quantity, needs_directions
from hessquik.reference import ReferenceDerivatives, ReferenceNetwork, slope, user_defined
from hessquik.utils import taylor

__all__ = ["Asked", "Row", "backends", "prove", "prove_quickly"]

#: A quantity, and whether it is asked of weighted sums of the outputs.
Asked = tuple[str, bool]

#: Bound of relative errors in float64; it leaves room for rounding that large weights amplify.
FLOAT64_BOUND = 1e-8
#: Bound in float32, and how many times larger errors may be than those of automatic differentiation in float32.
FLOAT32_BOUND, FLOAT32_FACTOR = 1e-4, 50.0
#: Steps ε of finite differences, and bounds of relative errors: truncation ε² plus rounding divided by ε or ε².
DIFFERENCES = {"gradient": (1e-5, 1e-6), "curvature": (1e-3, 1e-4)}
#: Tolerance of the observed orders of Taylor errors, below 2 and 3.
TAYLOR_SLACK = 0.1
TAYLOR_STEPS = tuple(2.0**-k for k in range(15))
#: Fraction of the value's size below which a derivative, in units of the value, counts as 0.
NEGLIGIBLE = 1e-3
#: Most bytes of one array of points, and of a Hessian that is requested.
MAX_BYTES = 256 << 20
#: Directions that are tried at each point.
DIRECTIONS = 3
#: Most operations of one call, and of a product of the Hessian by automatic differentiation, that
#: :func:`prove_quickly` spends unasked: less than a second each on one core.
QUICK_OPERATIONS = 1e10
#: Most operations of automatic differentiation for one dtype in :func:`prove`; minutes on one core.
THOROUGH_OPERATIONS = 1e12
#: Operations of a product Hv by automatic differentiation, per parameter, and the fewest axes that it is taken along.
OPERATIONS_PER_PRODUCT, FEWEST_AXES = 10, 8
#: Parameters from which :func:`prove_quickly` compares at one point and not at two.
MANY_PARAMETERS = 10_000_000
#: Calls that cover all quantities: the most common ones, and one for the rest.
CALLS = (
    ("value", "gradient", "hessian"),
    ("value", "gradient", "laplacian"),
    ("hessian_diagonal", "jvp", "hvp", "curvature", "hessian_packed"),
)
#: All of these quantities in one call, and those that forward mode computes in one call.
ALL = tuple(dict.fromkeys(name for names in CALLS for name in names))
ALONG_AXES = ("value", "gradient", "hessian", "laplacian", "hessian_diagonal")


def backends() -> dict[str, dict[str, Any]]:
    """Return the backends that an Evaluator may use on this machine, each with the arguments that choose it.

    Examples:
        >>> "torch" in backends()
        True
    """
    on_cpu = {name: {"backend": name} for name in backend_names("cpu")}
    if not torch.cuda.is_available():
        return on_cpu
    return on_cpu | {f"{name} on cuda": {"device": "cuda", "backend": name} for name in backend_names("cuda")}


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        quantity: The quantity that was compared, a name in :data:`hessquik.quantities.QUANTITIES`.
        computed_by: A backend of the Evaluator and its dtype, or a mode of the documented interface.
        reference: What it was compared with.
        measure: ``relative error``, to be at most the bound, or ``order``, to be at least the bound.
        found: The measured error or order.
        bound: Its bound.
    """

    quantity: str
    computed_by: str
    reference: str
    measure: str
    found: float
    bound: float

    @property
    def passed(self) -> bool:
        """True if the measure is within the bound; never if it is NaN."""
        return self.found <= self.bound if self.measure == "relative error" else self.found >= self.bound


@dataclass(frozen=True)
class _Trial:
    """Points at which a network is tested, with the reference values of Σⱼ λⱼ fⱼ.

    Attributes:
        network: The network.
        dtype: Dtype of the computation under test.
        x: Points (n, d) that are exact in the dtype, held in float64.
        weights: λ (n, m).
        directions: (n, k, d).
        scale: Natural units of x (d,).
        axes: Those inputs along which second derivatives are compared: all d, or of many a random part.
        expected: By automatic differentiation in float64, in natural units: the value (n,), gradient (n, d), hvp
            (n, k, d) and hessian_diagonal (n, axes).
        bounds: Bounds of the relative errors of the same quantities in the dtype.
    """

    network: NN
    dtype: torch.dtype
    x: Tensor
    weights: Tensor
    directions: Tensor
    scale: Tensor
    axes: Tensor
    expected: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)

    def error(self, got: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
        """Return the largest difference, relative to the size of what is expected or to a small part of the value."""
        size = expected if size is None else size
        unit = torch.stack([size.abs().max(), NEGLIGIBLE * self.expected["value"].abs().max()]).max()
        error = float((got - expected).abs().max())
        if not error:
            return 0.0
        return error / float(unit) if float(unit) else math.inf

    @property
    def has_all_axes(self) -> bool:
        """Return whether second derivatives are compared along all axes."""
        return len(self.axes) == len(self.scale)

    def value(self, x: Tensor) -> Tensor:
        """Return Σⱼ λⱼ fⱼ (n,) by the documented interface."""
        value: Tensor = self.network(x)[0]
        return (value * self.weights).sum(-1)


@torch.inference_mode(False)
def prove(
    network: NN | Ensemble,
    lower_bounds: Sequence[float] | None = None,
    upper_bounds: Sequence[float] | None = None,
    samples: int = 5,
    seed: int = 0,
) -> list[Row]:
    """Compare all quantities, on all backends and in both dtypes, with automatic differentiation.

    The documented interface is compared with Taylor tests and finite differences, unless activations have kinks.

    For an ensemble, each member is compared, and so are the means and standard deviations, with those that automatic
    differentiation gives.

    Args:
        network: The network or ensemble; it is left as it is.
        lower_bounds: Of the inputs, d numbers; points are drawn uniformly between the bounds, and from the standard
            normal distribution if they are not both given.
        upper_bounds: Of the inputs, d numbers.
        samples: Number of points.
        seed: Seed of the points, the weights of the outputs and the directions.

    Returns:
        One row per comparison; the network is right if all have passed.

    Examples:
        >>> from hessquik.networks import ICNN
        >>> rows = prove(ICNN(3, [None, 8, 2]))
        >>> all(row.passed for row in rows)
        True
    """
    if isinstance(network, Ensemble):
        return [
            *(
                replace(row, computed_by=f"{row.computed_by}, member {number}")
                for number, member in enumerate(network.networks())
                for row in prove(member, lower_bounds, upper_bounds, samples, seed)
            ),
            *_prove_moments(network, lower_bounds, upper_bounds, samples, seed),
        ]
    rows = []
    trials = {
        dtype: _set_up(network, dtype, lower_bounds, upper_bounds, samples, seed)
        for dtype in (torch.float64, torch.float32)
    }
    for backend, arguments in backends().items():
        for dtype, trial in trials.items():
            evaluate = Evaluator(network, dtype=dtype, **arguments)
            label = f"{backend}, {str(dtype).removeprefix('torch.')}"
            rows += _against_autograd(trial, evaluate, _thorough_calls(evaluate, samples), label)
            rows += _against_rows_alone(trial, evaluate, label)
    if kinks(network):  # Taylor's theorem and finite differences need smoothness; derivatives beside kinks do not
        return rows
    interface = replace(trials[torch.float64], network=deepcopy(network).to("cpu", torch.float64))
    return [*rows, *_against_taylor(interface), *_against_differences(interface)]


def _prove_moments(
    network: Ensemble,
    lower_bounds: Sequence[float] | None,
    upper_bounds: Sequence[float] | None,
    samples: int,
    seed: int,
) -> list[Row]:
    """Compare an ensemble's means and standard deviations with those of its members by automatic differentiation.

    A standard deviation's error is relative to the mean's size, since that of equal networks is nothing but rounding.
    """
    rows = []
    for dtype, bound in ((torch.float64, FLOAT64_BOUND), (torch.float32, FLOAT32_BOUND)):
        trials = [_set_up(member, dtype, lower_bounds, upper_bounds, samples, seed) for member in network.networks()]
        at = [
            ReferenceDerivatives(ReferenceNetwork(member, torch.float64), trials[0].x)
            for member in network.networks()
        ]
        for backend, arguments in backends().items():
            evaluate = EnsembleEvaluator(network, dtype=dtype, **arguments)
            asked = _affordable(tuple(SPREADS.values()), evaluate.members[0], samples)
            found = evaluate(trials[0].x, (*asked, *(name for name, of in SPREADS.items() if of in asked)))
            for name, of in SPREADS.items():
                if of not in asked:
                    continue
                shape = getattr(found, of).shape
                parts = torch.stack([getattr(one, of).reshape(shape) for one in at])
                units = _units(trials[0].scale, of)
                size = float((parts.mean(0) * units).abs().max()) or 1.0
                for quantity, expected in ((of, parts.mean(0)), (name, parts.std(0, correction=1))):
                    error = float(((getattr(found, quantity).double() - expected) * units).abs().max()) / size
                    label = f"{backend}, {str(dtype).removeprefix('torch.')}"
                    rows.append(Row(quantity, label, "members by autograd", "relative error", error, bound))
    return rows


def _units(scale: Tensor, quantity: str) -> Tensor:
    """Return the factors that bring a value, gradient or Hessian (…, m) into natural units."""
    steps = {
        "value": torch.ones(1),
        "gradient": scale.unsqueeze(-1),
        "hessian": (scale * scale[:, None]).unsqueeze(-1),
    }
    return steps[quantity]


@torch.inference_mode(False)
def prove_quickly(
    network: NN | Ensemble,
    lower_bounds: Sequence[float] | None = None,
    upper_bounds: Sequence[float] | None = None,
    evaluate: Evaluator | EnsembleEvaluator | None = None,
    asked: Collection[Asked] | None = None,
) -> frozenset[Asked]:
    """Compare the quantities of one Evaluator with automatic differentiation, at one or two points.

    The work is bounded. A large network is compared at one point. Quantities that take more than
    :data:`QUICK_OPERATIONS` there are left out and returned, unless they are asked for. If there are many inputs,
    second derivatives are compared along the directions and some of the axes, and a Laplacian with the sum of the
    Evaluator's own Hessian diagonal.

    Args:
        network: The network; it is left as it is.
        lower_bounds: As for :func:`prove`.
        upper_bounds: As for :func:`prove`.
        evaluate: The Evaluator of this network, or the EnsembleEvaluator of this ensemble, to compare; a new one if
            not given. It keeps the plans that are made here.
        asked: Pairs of a quantity and whether it is asked of weighted sums of the outputs, to compare whatever it
            takes. All quantities that are not left out, if not given.

    Returns:
        What was left out, and is to be compared by a further call before it is used.

    Raises:
        DerivativeError: some quantity disagrees, or is not finite.

    Examples:
        >>> from hessquik.networks import ICNN
        >>> prove_quickly(ICNN(3, [None, 8, 2]))
        frozenset()
    """
    if isinstance(network, Ensemble):
        of_members = EnsembleEvaluator(network) if evaluate is None else evaluate
        assert isinstance(of_members, EnsembleEvaluator)
        left_out: set[Asked] = set()
        for member, own in zip(network.networks(), of_members.members, strict=True):
            left_out |= prove_quickly(member, lower_bounds, upper_bounds, own, asked)
        return frozenset(left_out)
    evaluate = Evaluator(network) if evaluate is None else evaluate
    assert isinstance(evaluate, Evaluator)
    samples = 1 if _parameters(network) >= MANY_PARAMETERS else 2
    trial = _set_up(network, evaluate.dtype, lower_bounds, upper_bounds, samples, 0, QUICK_OPERATIONS)
    calls, left = _quick_calls(trial, evaluate) if asked is None else (_calls_of(asked), frozenset[Asked]())
    rows = _against_autograd(trial, evaluate, calls, "the Evaluator")
    failed = [f"{row.quantity} (relative error {row.found:.1e})" for row in rows if not row.passed]
    if failed:
        bounds = ", ".join(sorted({f"{row.bound:.0e}" for row in rows if not row.passed}))
        raise DerivativeError(
            f"results must be within {bounds} of automatic differentiation in float64, got {', '.join(failed)}"
        )
    return left


def _parameters(network: NN) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _quick_calls(trial: _Trial, evaluate: Evaluator) -> tuple[list[_Call], frozenset[Asked]]:
    """Return calls that cover every quantity and take few operations, and the quantities that none of them covers.

    A quantity that takes too many in a call for all outputs is called alone, or else for a weighted sum of them.
    """
    calls: list[_Call] = []
    left_out: set[Asked] = set()
    for names in (*CALLS, *((name,) for name in _registered())):
        if _is_quick(trial, evaluate, names, False):
            calls.append((names, False))
            continue
        for name in names:
            ways = [is_weighted for is_weighted in (False, True) if _is_quick(trial, evaluate, (name,), is_weighted)]
            calls += [((name,), is_weighted) for is_weighted in ways[:1]]
            left_out |= {
                (name, is_weighted) for is_weighted in (False, True) if ways[:1] not in ([False], [is_weighted])
            }
    return list(dict.fromkeys(calls)), frozenset(left_out)


def _is_quick(trial: _Trial, evaluate: Evaluator, names: Sequence[str], is_weighted: bool) -> bool:
    """Return whether a call at the points of a trial takes few operations and little memory."""
    n, outputs = len(trial.x), 1 if is_weighted else evaluate.m
    needs_diagonal = "laplacian" in names and not trial.has_all_axes  # as its reference
    if needs_diagonal and not _is_quick(trial, evaluate, ("hessian_diagonal",), is_weighted):
        return False
    if any(QUANTITIES[name].is_whole for name in names) and not _fits(evaluate, n, outputs):
        return False
    directions = (n, DIRECTIONS, evaluate.d) if needs_directions(names) else None
    weights = (n, evaluate.m) if is_weighted else None
    return not evaluate.exceeds(QUICK_OPERATIONS / n, names, weights, directions)


def _calls_of(asked: Collection[Asked]) -> list[_Call]:
    """Return the calls for pairs of a quantity and whether it is weighted: one for each."""
    return [((name,), is_weighted) for name, is_weighted in sorted(asked)]


def _set_up(
    network: NN,
    dtype: torch.dtype,
    lower_bounds: Sequence[float] | None,
    upper_bounds: Sequence[float] | None,
    samples: int,
    seed: int,
    operations: float = THOROUGH_OPERATIONS,
) -> _Trial:
    """Draw points, weights, directions and axes, and compute the reference derivatives there.

    Along how many axes depends on the operations that automatic differentiation may take.
    """
    generator = torch.Generator().manual_seed(seed)
    d, m = network.dim_input(), network.dim_output()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if lower_bounds is None or upper_bounds is None:
        scale = torch.ones(d, dtype=torch.float64)
        x = normal(samples, d)
    else:
        lower, upper = (torch.as_tensor(bounds, dtype=torch.float64) for bounds in (lower_bounds, upper_bounds))
        scale = (upper - lower) / 2
        x = lower + (upper - lower) * torch.rand(samples, d, dtype=torch.float64, generator=generator)
    directions = torch.nn.functional.normalize(normal(samples, DIRECTIONS, d), dim=-1) * scale
    x, weights, directions = (part.to(dtype).double() for part in (x, normal(samples, m), directions))
    per_axis = samples * OPERATIONS_PER_PRODUCT * max(1, _parameters(network))
    axes = torch.arange(d)
    if d > (most := max(FEWEST_AXES, int(operations / per_axis))):
        inner = 1 + torch.randperm(d - 2, generator=generator)[: most - 2]
        axes = torch.cat([torch.tensor([0, d - 1]), inner]).sort().values
    trial = _Trial(network, dtype, x, weights, directions, scale, axes)
    trial.expected.update(_differentiate(trial, torch.float64))
    if dtype == torch.float64:
        trial.bounds.update(dict.fromkeys(trial.expected, FLOAT64_BOUND))
    else:
        rounded = _differentiate(trial, dtype)
        errors = {name: trial.error(rounded[name], expected) for name, expected in trial.expected.items()}
        trial.bounds.update({name: max(FLOAT32_BOUND, FLOAT32_FACTOR * error) for name, error in errors.items()})
    return trial


def _differentiate(trial: _Trial, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the quantities of :attr:`_Trial.expected`, computed in a dtype.

    The points are repeated, once per direction and once per axis, so that two passes backward give all products.
    """
    n, d = trial.x.shape
    scale = trial.scale.to(dtype)
    f, weights = ReferenceNetwork(trial.network, dtype), trial.weights.to(dtype)

    def products(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value (n, j), gradient (n, j, d) and Hv (n, j, d) for vectors (n, j, d)."""
        j = vectors.shape[1]
        with torch.enable_grad():
            x = trial.x.to(dtype).repeat_interleave(j, dim=0).requires_grad_()
            value = (f(x) * weights.repeat_interleave(j, dim=0)).sum(-1)
            gradient = slope(value.sum(), x)
            hv = slope((gradient * vectors.flatten(0, 1)).sum(), x)
        value, gradient, hv = (part.detach().unflatten(0, (n, j)) for part in (value, gradient, hv))
        return value, gradient, hv

    step = max(1, MAX_BYTES // (8 * n * d * dtype.itemsize))
    diagonals = []
    for start in range(0, len(trial.axes), step):
        axes = trial.axes[start : start + step]
        along = torch.zeros(len(axes), d, dtype=dtype)
        along[torch.arange(len(axes)), axes] = scale[axes]
        vectors = along.expand(n, -1, -1)
        if start == 0:
            vectors = torch.cat([trial.directions.to(dtype), vectors], dim=1)
        value, gradient, hv = products(vectors)
        gradient, hv = gradient * scale, hv * scale
        if start == 0:
            found = {"value": value[:, 0], "gradient": gradient[:, 0], "hvp": hv[:, :DIRECTIONS]}
            hv = hv[:, DIRECTIONS:]
        diagonals.append(hv[:, torch.arange(len(axes)), axes])
    found["hessian_diagonal"] = torch.cat(diagonals, dim=1)
    return {name: part.double() for name, part in found.items()}


#: The quantities of one call, and whether it is for a weighted sum of the outputs.
_Call = tuple[tuple[str, ...], bool]


def _thorough_calls(evaluate: Evaluator, n: int) -> list[_Call]:
    """Return calls for all quantities, together and alone, for all outputs and for weighted sums of them.

    Whole Hessians that would be too large at n points are left out.
    """
    together = [*CALLS, ALONG_AXES, ALL, *((name,) for name in _registered())]
    calls = [(names, is_weighted) for is_weighted in (False, True) for names in together]
    calls += [((name,), False) for name in ALL]
    affordable = [(_affordable(names, evaluate, n), is_weighted) for names, is_weighted in calls]
    return [(names, is_weighted) for names, is_weighted in affordable if names]


def _against_autograd(trial: _Trial, evaluate: Evaluator, calls: Sequence[_Call], computed_by: str) -> list[Row]:
    """Compare calls of an Evaluator with automatic differentiation; one row has the worst error of a quantity."""
    x, weights, directions = (
        part.to(evaluate.device, evaluate.dtype) for part in (trial.x, trial.weights, trial.directions)
    )
    comparisons = _comparisons(trial) | {name: _by_formula(trial, QUANTITIES[name]) for name in _registered()}
    worst: dict[str, float] = {}

    def found(name: str, result: Tensor, is_weighted: bool) -> None:
        error = comparisons[name].error(result.to("cpu", torch.float64), is_weighted)
        worst[name] = max(worst.get(name, 0.0), error, key=_severity)

    for quantities, is_weighted in calls:
        given = weights if is_weighted else None
        if "laplacian" in quantities and not trial.has_all_axes:
            # Automatic differentiation gives a part of the diagonal; with that compared, its sum is the reference.
            diagonal = evaluate(x, ("hessian_diagonal",), given).hessian_diagonal
            assert diagonal is not None
            found("hessian_diagonal", diagonal, is_weighted)
            comparisons["laplacian"] = _with_own_diagonal(trial, diagonal.to("cpu", torch.float64), is_weighted)
        results = evaluate(x, quantities, given, directions if needs_directions(quantities) else None)
        for name in quantities:
            found(name, getattr(results, name), is_weighted)
    return [
        Row(name, computed_by, comparisons[name].reference, "relative error", error, comparisons[name].bound)
        for name, error in worst.items()
    ]


def _against_rows_alone(trial: _Trial, evaluate: Evaluator, computed_by: str) -> list[Row]:
    """Compare rows in large tiles with the same rows alone, which must have the same bits."""
    x, directions = (part.to(evaluate.device, evaluate.dtype) for part in (trial.x, trial.directions))
    asked = ("value", "gradient", "hessian", "hvp")
    count = evaluate.plan(asked, directions=directions).rows + x.shape[0]
    quantities = _affordable(asked, evaluate, count)
    row = torch.arange(count) % x.shape[0]
    alone = evaluate(x, quantities, directions=directions)
    together = evaluate(x[row], quantities, directions=directions[row])
    differences = {
        name: float((getattr(together, name) - getattr(alone, name)[row]).abs().max()) for name in quantities
    }
    return [
        Row(name, computed_by, "the same rows alone", "relative error", error, 0.0)
        for name, error in differences.items()
    ]


def _affordable(names: Sequence[str], evaluate: Evaluator, n: int) -> tuple[str, ...]:
    """Return the quantities without those that have a whole Hessian if it would be too large."""
    fits = _fits(evaluate, n, evaluate.m)
    return tuple(name for name in names if fits or not QUANTITIES[name].is_whole)


def _fits(evaluate: Evaluator, n: int, outputs: int) -> bool:
    """Return whether the Hessians of n points are within the bound on memory."""
    return n * evaluate.d**2 * outputs * evaluate.dtype.itemsize <= MAX_BYTES


def _weighted(result: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sums (n, …) of a result (n, …, m)."""
    shape = (weights.shape[0], *(1,) * (result.ndim - 2), weights.shape[1])
    return (result * weights.view(shape)).sum(-1)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A comparison of the results of one quantity.

    Attributes:
        error: Returns the relative error of a result (n, …, m), or (n, …, 1) of a weighted sum of the outputs.
        bound: Bound of this error.
        reference: Description of the reference.
    """

    error: Callable[[Tensor, bool], float]
    bound: float
    reference: str


def _registered() -> tuple[str, ...]:
    """Return the quantities that users registered."""
    return tuple(name for name in QUANTITIES if name not in ALL)


def _comparisons(trial: _Trial) -> dict[str, _Comparison]:
    """Return the comparisons of the package's own quantities, of Σⱼ λⱼ fⱼ and in natural units.

    A Hessian is compared by its diagonal and its products with the directions.
    """
    scale, v = trial.scale, trial.directions / trial.scale
    gradient, hv, diagonal = (trial.expected[name] for name in ("gradient", "hvp", "hessian_diagonal"))
    terms = diagonal * scale[trial.axes] ** -2 * _laplacian_unit(trial)
    own = user_defined(trial.network)
    reference = f"autograd of the own forward of {', '.join(own)}" if own else "autograd"

    def compared(
        natural: Callable[[Tensor], Tensor], expected: Tensor, bound: str, size: Tensor | None = None
    ) -> _Comparison:
        """Return a comparison in natural units; the error is relative to ``size``, or to the expected result."""

        def error(result: Tensor, is_weighted: bool) -> float:
            sums = result.squeeze(-1) if is_weighted else _weighted(result, trial.weights)
            return trial.error(natural(sums), expected, size)

        return _Comparison(error, trial.bounds[bound], reference)

    def sections(hessian: Tensor) -> Tensor:
        natural = hessian * scale * scale.unsqueeze(-1)
        return torch.cat([(v @ natural).flatten(1), natural.diagonal(dim1=1, dim2=2)[:, trial.axes]], dim=1)

    def packed_sections(packed: Tensor) -> Tensor:
        # Entry (a, b) of the lower triangle has the index a(a+1)/2 + b.
        a = torch.arange(len(scale))
        high, low = torch.maximum(a, a.unsqueeze(-1)), torch.minimum(a, a.unsqueeze(-1))
        return sections(packed[:, high * (high + 1) // 2 + low])

    whole = torch.cat([hv.flatten(1), diagonal], dim=1)
    return {
        "value": compared(lambda got: got, trial.expected["value"], "value"),
        "gradient": compared(lambda got: got * scale, gradient, "gradient"),
        "jvp": compared(lambda got: got, (v @ gradient.unsqueeze(-1)).squeeze(-1), "gradient"),
        "hvp": compared(lambda got: got * scale, hv, "hvp"),
        "curvature": compared(lambda got: got, (v * hv).sum(-1), "hvp"),
        "hessian": compared(sections, whole, "hvp"),
        "hessian_packed": compared(packed_sections, whole, "hvp"),
        "hessian_diagonal": compared(lambda got: (got * scale**2)[:, trial.axes], diagonal, "hessian_diagonal"),
        "laplacian": compared(
            lambda got: got * _laplacian_unit(trial), terms.sum(-1), "hessian_diagonal", size=terms.abs().sum(-1)
        ),
    }


def _laplacian_unit(trial: _Trial) -> Tensor:
    """Return the factor with which the Laplacian is a mean of the diagonal in natural units."""
    return 1 / (trial.scale**-2).sum()


def _with_own_diagonal(trial: _Trial, diagonal: Tensor, is_weighted: bool) -> _Comparison:
    """Return the comparison of a Laplacian with the sum of the Evaluator's own diagonal (n, d, m)."""
    sums = diagonal.squeeze(-1) if is_weighted else _weighted(diagonal, trial.weights)
    terms = sums * _laplacian_unit(trial)

    def error(result: Tensor, is_weighted: bool) -> float:
        got = result.squeeze(-1) if is_weighted else _weighted(result, trial.weights)
        return trial.error(got * _laplacian_unit(trial), terms.sum(-1), terms.abs().sum(-1))

    return _Comparison(error, trial.bounds["hessian_diagonal"], "the sum of its hessian_diagonal")


def _by_formula(trial: _Trial, quantity: Quantity) -> _Comparison:
    """Return the comparison of a registered quantity with its formula on automatic differentiation's derivatives.

    Errors are relative to the size of the result or, if it is larger, to the error of automatic differentiation in
    float32, so that cancellation does not count as an error.
    """
    own = user_defined(trial.network)
    reference = f"its formula on autograd{' of the own forward of ' + ', '.join(own) if own else ''}"
    single = torch.float32
    expected, sizes, errors = {}, {}, [0.0]
    for is_weighted in (False, True):
        try:
            exact, rounded = (
                _formula_on_autograd(trial, quantity, dtype, is_weighted) for dtype in (torch.float64, single)
            )
        except (AttributeError, NotImplementedError):
            reference = "its formula on the layers' forms, which is no independent reference"
            exact, rounded = (
                _formula_on_forms(trial, quantity, dtype, is_weighted) for dtype in (torch.float64, single)
            )
        error = float((exact - rounded).abs().max())
        expected[is_weighted], sizes[is_weighted] = exact, max(float(exact.abs().max()), error)
        errors.append(error / sizes[is_weighted] if error else 0.0)
    bound = FLOAT64_BOUND if trial.dtype == torch.float64 else max(FLOAT32_BOUND, FLOAT32_FACTOR * max(errors))

    def relative_error(result: Tensor, is_weighted: bool) -> float:
        difference = float((result - expected[is_weighted]).abs().max())
        if not difference:
            return 0.0
        return difference / sizes[is_weighted] if sizes[is_weighted] else math.inf

    return _Comparison(relative_error, bound, reference)


def _formula_on_autograd(trial: _Trial, quantity: Quantity, dtype: torch.dtype, is_weighted: bool) -> Tensor:
    """Return a quantity (n, …) of the reference network, computed in a dtype."""
    x, weights, directions = (part.to(dtype) for part in (trial.x, trial.weights, trial.directions))
    at = ReferenceDerivatives(ReferenceNetwork(trial.network, dtype), x, weights if is_weighted else None, directions)
    m = 1 if is_weighted else weights.shape[1]
    found: Tensor = quantity.formula(at)
    return found.reshape(len(x), *quantity.shape(x.shape[1], m, directions.shape[1])).double()


def _formula_on_forms(trial: _Trial, quantity: Quantity, dtype: torch.dtype, is_weighted: bool) -> Tensor:
    """Return a quantity (n, …) by the calculus on tensors, computed in a dtype."""
    x, weights, directions = (part.to(dtype) for part in (trial.x, trial.weights, trial.directions))
    forms = deepcopy(trial.network).to("cpu", dtype).requires_grad_(False).forms()
    found = calculus.evaluate(forms, x, (quantity.name,), weights if is_weighted else None, directions)
    result: Tensor = getattr(found, quantity.name)
    return result.double()


def _severity(error: float) -> float:
    """Return an error as a sort key, with NaN as the largest."""
    return math.inf if math.isnan(error) else error


def _against_taylor(trial: _Trial) -> list[Row]:
    """Compare gradient and Hessian of the documented interface, in both modes, with the orders of Taylor errors."""
    rows = []
    x, v = trial.x, trial.directions[:, 0]
    for mode, forward in (("forward", True), ("backward", False)):
        with torch.no_grad():
            _, gradient, hessian = trial.network(x, do_gradient=True, do_Hessian=True, forward_mode=forward)
            terms = [
                trial.value(x),
                torch.einsum("nam,na,nm->n", gradient, v, trial.weights),
                torch.einsum("nabm,na,nb,nm->n", hessian, v, v, trial.weights),
            ]
            found = taylor.errors(lambda h: trial.value(x + h * v), terms, TAYLOR_STEPS)
        for order, quantity in ((2, "gradient"), (3, "hessian")):
            noise = taylor.rounding(terms[:order])
            seen = taylor.observed_order([row[order - 1] for row in found], order, 2.0, noise)
            rows.append(Row(quantity, f"{mode} mode", "Taylor", "order", seen, order - TAYLOR_SLACK))
    return rows


def _against_differences(trial: _Trial) -> list[Row]:
    """Compare slope and curvature along a direction, by the documented interface, with central differences."""
    x, v = trial.x, trial.directions[:, 1]
    with torch.no_grad():
        _, slope, bent = trial.network(x, do_gradient=True, do_Hessian=True, v=v.unsqueeze(1), forward_mode=True)
        slope, bent = ((part.flatten(1) * trial.weights).sum(-1) for part in (slope, bent))
        eps, bound = DIFFERENCES["gradient"]
        first = (trial.value(x + eps * v) - trial.value(x - eps * v)) / (2 * eps)
        rows = [("gradient", trial.error(slope, first), bound)]
        eps, bound = DIFFERENCES["curvature"]
        second = (trial.value(x + eps * v) - 2 * trial.value(x) + trial.value(x - eps * v)) / eps**2
        rows.append(("curvature", trial.error(bent, second), bound))
    return [
        Row(name, "forward mode", "finite differences", "relative error", error, bound) for name, error, bound in rows
    ]
