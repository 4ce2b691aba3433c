"""Transformers of scikit-learn as functions of a value of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessquik.importing.graph import Node, Pointwise, Product, affine, refuse
from hessquik.importing.interpreting import readable
from hessquik.importing.sklearn_kernels import KERNEL_NUMBERS, kernel
from hessquik.importing.sklearn_parts import (
    child,
    constant,
    diagonal,
    expect_fitted,
    found_for,
    inherited,
    numbers,
    select,
    stacked,
    tensor,
    unsupported,
)
from hessquik.importing.torch_operations import POINTWISE as TORCH

__all__ = ["BASES", "INVERSES", "TRANSFORMERS", "invert", "transform"]

#: Deviations of components below this part of the largest are rounding.
WHITENED = 1e-12
#: Scale and shift of x ↦ ax + b.
Moments = tuple[Tensor, Tensor]
Reader = Callable[[Any, str, Node], Node]

#: Functions of numpy by the names that they have in torch.
FUNCTIONS: dict[Any, str] = {
    np.exp: "exp",
    np.exp2: "exp2",
    np.expm1: "expm1",
    np.log: "log",
    np.log2: "log2",
    np.log10: "log10",
    np.log1p: "log1p",
    np.sin: "sin",
    np.cos: "cos",
    np.sinh: "sinh",
    np.cosh: "cosh",
    np.tanh: "tanh",
    np.arctan: "atan",
    np.sqrt: "sqrt",
    np.square: "square",
    np.reciprocal: "reciprocal",
}


def transform(transformer: Any, place: str, value: Node) -> Node:
    """Return the result of a transformer.

    Raises:
        UnsupportedError: it cannot be exact here, or it has not been fitted.
    """
    if transformer is None or isinstance(transformer, str):  # "passthrough"
        return value
    reader = found_for(transformer, TRANSFORMERS) or inherited(transformer, BASES)
    if reader is None:
        raise unsupported(place, transformer, _REASONS, "use a transformer that the table of supported ones lists")
    expect_fitted(transformer, place)
    with readable(place):
        return reader(transformer, place, value)


def invert(transformer: Any, place: str, value: Node) -> Node:
    """Return what a transformer made a value of, as targets are scaled back.

    Raises:
        UnsupportedError: it cannot be exact here.
    """
    reader = found_for(transformer, INVERSES)
    if reader is None:
        raise refuse(
            place,
            "is undone by a function that is not among what can be imported",
            "scale the target by StandardScaler or MinMaxScaler, or by a function of numpy",
        )
    return reader(transformer, place, value)


def _standard(scaler: Any, place: str) -> Moments:
    """Return the numbers of StandardScaler; ``mean_`` is there without ``with_mean`` too."""
    return _centred(scaler, scaler.mean_ if scaler.with_mean else 0.0, scaler.scale_ if scaler.with_std else 1.0)


def _robust(scaler: Any, place: str) -> Moments:
    center = scaler.center_ if scaler.with_centering else 0.0
    return _centred(scaler, center, scaler.scale_ if scaler.with_scaling else 1.0)


def _max_abs(scaler: Any, place: str) -> Moments:
    _refuse_clipping(scaler, place)
    return _centred(scaler, 0.0, scaler.scale_)


def _min_max(scaler: Any, place: str) -> Moments:
    _refuse_clipping(scaler, place)
    return tensor(scaler.scale_), tensor(scaler.min_)


def _refuse_clipping(scaler: Any, place: str) -> None:
    if getattr(scaler, "clip", False):
        raise refuse(place, "clips its results, which has kinks", "fit it with clip=False")


def _centred(scaler: Any, mean: Any, scale: Any) -> Moments:
    mean, scale = (numbers(each, scaler.n_features_in_) for each in (mean, scale))
    return 1 / scale, -mean / scale


#: Scalers: a and b of x ↦ ax + b.
SCALERS: dict[str, Callable[[Any, str], Moments]] = {
    "MaxAbsScaler": _max_abs,
    "MinMaxScaler": _min_max,
    "RobustScaler": _robust,
    "StandardScaler": _standard,
}


def _scaled(scaler: Any, place: str, value: Node) -> Node:
    scale, shift = SCALERS[type(scaler).__name__](scaler, place)
    return affine(place, [(value, diagonal(scale))], shift)


def _unscaled(scaler: Any, place: str, value: Node) -> Node:
    scale, shift = SCALERS[type(scaler).__name__](scaler, place)
    return affine(place, [(value, diagonal(1 / scale))], -shift / scale)


def _projected(part: Any, place: str, value: Node) -> Node:
    """Return (x − mean) Cᵀ, of decompositions and random projections."""
    matrix, mean = tensor(part.components_).T, getattr(part, "mean_", None)
    return affine(place, [(value, matrix)], None if mean is None else -tensor(mean) @ matrix)


def _principal(part: Any, place: str, value: Node) -> Node:
    """Return (x Cᵀ − mean Cᵀ) / deviations, of PCA, which has the latter two in the dtype that it was fitted in."""
    matrix, shift = tensor(part.components_).T, tensor(part.mean_ @ part.components_.T)
    deviations = tensor(np.sqrt(part.explained_variance_)) if part.whiten else torch.ones_like(shift)
    if not bool((deviations > WHITENED * deviations.max()).all()):
        raise refuse(
            place,
            "divides a component without variance by its deviation, so that it is nothing but rounding",
            "fit it with fewer components (n_components)",
        )
    return affine(place, [(value, matrix / deviations)], -shift / deviations)


def _pipeline(pipeline: Any, place: str, value: Node) -> Node:
    for name, step in pipeline.steps:
        value = transform(step, child(place, name, step), value)
    return value


def _unpipeline(pipeline: Any, place: str, value: Node) -> Node:
    for name, step in reversed(pipeline.steps):
        if step is not None and not isinstance(step, str):
            value = invert(step, child(place, name, step), value)
    return value


def _union(union: Any, place: str, value: Node) -> Node:
    """Return the results of all transformers in a row, multiplied by their weights."""
    weights = union.transformer_weights or {}
    parts = [
        affine(place, [(transform(part, child(place, name, part), value), float(weights.get(name, 1.0)))])
        for name, part in union.transformer_list
        if not _is_dropped(part)
    ]
    return stacked(place, parts)


def _columns(transformer: Any, place: str, value: Node) -> Node:
    """Return the results of all transformers of columns in a row, multiplied by their weights."""
    positions, weights = transformer._transformer_to_input_indices, transformer.transformer_weights or {}
    parts = []
    for name, part, _ in transformer.transformers_:
        if not _is_dropped(part) and len(positions[name]):
            result = transform(part, child(place, name, part), select(place, value, list(positions[name])))
            parts.append(affine(place, [(result, float(weights.get(name, 1.0)))]))
    return stacked(place, parts)


def _is_dropped(part: Any) -> bool:
    return isinstance(part, str) and part == "drop"


def _function(function: Any, arguments: Any, place: str, value: Node) -> Node:
    """Return a function of numpy."""
    if function is None:
        return value
    try:
        name = None if arguments else FUNCTIONS.get(function)
    except TypeError:  # it cannot be hashed
        name = None
    if name is None:
        known = ", ".join(f"np.{each.__name__}" for each in FUNCTIONS)
        raise refuse(place, "applies a function that cannot be read", f"use one of {known}")
    return TORCH[name](place, value)


def _powers(transformer: Any, place: str, value: Node) -> Node:
    """Return PolynomialFeatures: products of powers of the features, those with equal exponents at once."""
    powers = torch.as_tensor(transformer.powers_)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, exponents in enumerate(powers):
        groups.setdefault(tuple(exponents[exponents > 0].tolist()), []).append(row)
    parts = []
    for exponents, rows in groups.items():
        columns = torch.stack([powers[row].nonzero()[:, 0] for row in rows])
        factors = [TORCH["pow"](place, select(place, value, columns[:, i]), k) for i, k in enumerate(exponents)]
        total = constant(place, value, torch.ones(len(rows), dtype=torch.float64)) if not factors else factors[0]
        for factor in factors[1:]:
            total = Product(place, len(rows), total, factor)
        parts.append(total)
    order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
    return select(place, stacked(place, parts), order)


def _box_cox(transformer: Any, place: str, value: Node) -> Node:
    """Return (x^λ − 1) / λ of each feature, or log x where λ is 0, scaled."""
    if transformer.method != "box-cox":
        raise refuse(
            place,
            "has one formula for numbers below 0 and another for those above",
            "fit it with method='box-cox', or use StandardScaler",
        )
    logs = TORCH["log"](place, value)
    parts = [_power_of_log(place, select(place, logs, [i]), float(k)) for i, k in enumerate(transformer.lambdas_)]
    result = stacked(place, parts)
    return _scaled(transformer._scaler, place, result) if transformer.standardize else result


def _power_of_log(place: str, z: Node, exponent: float) -> Node:
    """Return (exp(λz) − 1) / λ."""
    if exponent == 0:
        return z
    return Pointwise(place, 1, z, ["div", ["expm1", ["mul", exponent, "z"]], exponent])


def _imputer(imputer: Any, place: str, value: Node) -> Node:
    """Return the value, since the inputs of a network are numbers."""
    missing = imputer.missing_values
    is_plain = isinstance(missing, float) and np.isnan(missing) and imputer.indicator_ is None
    if not is_plain or np.isnan(np.asarray(imputer.statistics_, dtype=float)).any():
        raise refuse(place, "replaces, drops or adds features", "use it for NaN alone, without add_indicator")
    return value


def _nystroem(part: Any, place: str, value: Node) -> Node:
    given = part.kernel_params or {}
    given = {name: given.get(name) if getattr(part, name) is None else getattr(part, name) for name in KERNEL_NUMBERS}
    values = kernel(place, value, part.components_, part.kernel, *given.values())
    return affine(place, [(values, tensor(part.normalization_).T)])


def _random_waves(part: Any, place: str, value: Node) -> Node:
    """Return √(2 / n) cos(x W + b), of RBFSampler."""
    waves = TORCH["cos"](place, affine(place, [(value, tensor(part.random_weights_))], tensor(part.random_offset_)))
    return affine(place, [(waves, (2 / waves.width) ** 0.5)])


#: Transformers by the names of their classes.
TRANSFORMERS: dict[str, Reader] = {
    **dict.fromkeys(SCALERS, _scaled),
    **dict.fromkeys(
        ("FastICA", "GaussianRandomProjection", "SparseRandomProjection", "TruncatedSVD"),
        _projected,
    ),
    **dict.fromkeys(("IncrementalPCA", "PCA"), _principal),
    "ColumnTransformer": _columns,
    "FeatureUnion": _union,
    "FunctionTransformer": lambda part, place, value: _function(part.func, part.kw_args, place, value),
    "Nystroem": _nystroem,
    "Pipeline": _pipeline,
    "PolynomialFeatures": _powers,
    "PowerTransformer": _box_cox,
    "RBFSampler": _random_waves,
    "SimpleImputer": _imputer,
}

#: Transformers by the names of their bases.
BASES: dict[str, Reader] = {"SelectorMixin": lambda part, place, value: select(place, value, part.get_support())}

#: Inverses of transformers, for targets.
INVERSES: dict[str, Reader] = {
    **dict.fromkeys(SCALERS, _unscaled),
    "FunctionTransformer": lambda part, place, value: _function(part.inverse_func, part.inv_kw_args, place, value),
    "Pipeline": _unpipeline,
}

_CONSTANT = ("is constant in pieces, so that its derivatives are 0 or undefined", "use StandardScaler")
_TABLE = ("looks up a table of categories", "import the estimator behind it, which takes real numbers")
_REASONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("Binarizer", "KBinsDiscretizer"), _CONSTANT),
    **dict.fromkeys(("OneHotEncoder", "OrdinalEncoder", "TargetEncoder", "FeatureHasher"), _TABLE),
    "KNNImputer": ("chooses neighbours, so that it jumps", "use SimpleImputer"),
    "Normalizer": ("divides features by their norm, which has a kink where they are 0", "use StandardScaler"),
    "QuantileTransformer": ("is linear in pieces between the quantiles of its data", "use StandardScaler"),
    "SplineTransformer": (
        "has one polynomial for each interval between its knots",
        "use PolynomialFeatures, RBFSampler or Nystroem",
    ),
}
