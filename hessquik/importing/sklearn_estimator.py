"""Estimators of scikit-learn: networks, linear and kernel models, and combinations of these."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessquik.importing.graph import Input, Node, affine, refuse
from hessquik.importing.interpreting import readable
from hessquik.importing.scaling import Scaling
from hessquik.importing.sklearn_kernels import kernel, process_kernel
from hessquik.importing.sklearn_parts import (
    child,
    constant,
    expect_fitted,
    found_for,
    inherited,
    is_own,
    numbers,
    select,
    stacked,
    tensor,
    unsupported,
)
from hessquik.importing.sklearn_transformers import invert, transform
from hessquik.importing.source import Imported, Source, import_source
from hessquik.importing.torch_operations import POINTWISE as TORCH
from hessquik.networks import NN

__all__ = ["BASES", "ESTIMATORS", "from_sklearn", "import_estimator"]

Reader = Callable[[Any, str, Node], Node]

#: Relative precision of sums of kernels, where large weights of both signs cancel, as without noise in the data.
KERNEL_PRECISION = 1e-5


def from_sklearn(
    estimator: Any,
    *,
    allow_kinks: bool = False,
    dtype: torch.dtype | None = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    **scaling: Any,
) -> NN:
    """Return a fitted estimator of scikit-learn as a network with exact derivatives.

    Args:
        estimator: A network, a linear or a kernel model, or one of these in a ``Pipeline``, a
            ``TransformedTargetRegressor``, a search or an average.
        allow_kinks: See :func:`hessquik.from_torch`; ``MLPRegressor`` has ReLU unless ``activation`` says otherwise.
        dtype: Of the weights; float64 if not given.
        bounds: See :func:`hessquik.from_torch`.
        scaling: See :func:`hessquik.from_torch`; a pipeline's own scalers need none.

    Raises:
        UnsupportedError: the estimator cannot be exact here; the message names the step.
        ShapeError: a scaling or the bounds do not fit.
    """
    return import_estimator(estimator, Scaling.of(scaling), allow_kinks, dtype, bounds).network


def import_estimator(
    estimator: Any,
    scaling: Scaling,
    allow_kinks: bool = False,
    dtype: torch.dtype | None = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Imported:
    """Import an estimator as :func:`from_sklearn` does; return the network with the comparison of its values."""
    name = type(estimator).__name__
    width = _width(estimator)
    if width is None:
        expect_fitted(estimator, name)
        _predict(estimator, name, Input("input", 1))  # which tells why
        raise refuse(name, "does not tell the number of its inputs", "fit it to an array (n, d)")

    def read(point: Node) -> Node:
        return _predict(estimator, name, point)

    def evaluate(x: Tensor) -> Tensor:
        return _evaluate(estimator, name, x)

    precision = KERNEL_PRECISION if _sums_kernels(estimator) else 0.0
    source = Source(width, torch.float64, "scikit-learn", read, evaluate, precision)
    return import_source(source, scaling, allow_kinks, dtype, bounds)


def _sums_kernels(estimator: Any) -> bool:
    """Return True if an estimator, or one that it holds, is a sum of kernels."""
    waiting, seen = [estimator], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:  # parts may refer to each other
            continue
        seen.add(id(part))
        if found_for(part, ESTIMATORS) in _KERNEL_SUMS:
            return True
        inner = getattr(part, "__dict__", {}).values() if is_own(part) else ()
        waiting += part if isinstance(part, list | tuple) else inner
    return False


def _evaluate(estimator: Any, name: str, x: Tensor) -> Tensor:
    """Return scikit-learn's own predictions; NaN if a step gives NaN, which scikit-learn does not let pass.

    Raises:
        UnsupportedError: scikit-learn cannot predict.
    """
    try:
        return tensor(estimator.predict(_named(estimator, x))).reshape(len(x), -1)
    except ValueError as error:
        if re.search("NaN|infinity|strictly positive", str(error)):
            return torch.full((len(x), 1), torch.nan)
        raise refuse(name, f"cannot be evaluated ({str(error)[:200]})", "fit it to an array of numbers") from None


def _named(estimator: Any, x: Tensor) -> Any:
    """Return points as an array, or as a table with the columns that the estimator was fitted to."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is None or importlib.util.find_spec("pandas") is None:
        return x.numpy()
    return importlib.import_module("pandas").DataFrame(x.numpy(), columns=names)


def _width(estimator: Any) -> int | None:
    """Return the number of inputs, which an estimator has from its parts if its own first step has none."""
    width: int | None = getattr(estimator, "n_features_in_", None)
    if width is not None:
        return width
    parts = [step for _, step in getattr(estimator, "steps", ())]
    parts += [getattr(estimator, name) for name in ("regressor_", "best_estimator_") if hasattr(estimator, name)]
    return next((found for part in parts if (found := _width(part)) is not None), None)


def _predict(estimator: Any, place: str, point: Node) -> Node:
    """Return the prediction of an estimator as a value of the graph.

    Raises:
        UnsupportedError: it cannot be exact here, or it has not been fitted.
    """
    from sklearn.base import is_classifier, is_regressor

    if estimator is None or isinstance(estimator, str):  # "passthrough"
        raise refuse(place, *_REASONS["sklearn.preprocessing"])
    if hasattr(estimator, "fit") and is_classifier(estimator):
        raise refuse(place, "is a classifier, which has labels", "use a regressor")
    reader = found_for(estimator, ESTIMATORS)
    if reader is None and hasattr(estimator, "fit") and is_regressor(estimator):
        reader = inherited(estimator, BASES)
    if reader is None:
        raise unsupported(place, estimator, _REASONS, "use one that the table of supported estimators lists")
    expect_fitted(estimator, place)
    with readable(place):
        return reader(estimator, place, point)


def _network(network: Any, place: str, point: Node) -> Node:
    """Read MLPRegressor."""
    value, last = point, len(network.coefs_) - 1
    for layer, (matrix, offset) in enumerate(zip(network.coefs_, network.intercepts_, strict=True)):
        function = network.out_activation_ if layer == last else network.activation
        name = f"{place}.layer{layer}"
        value = affine(name, [(value, tensor(matrix))], tensor(offset))
        if function != "identity":
            value = TORCH[_FUNCTIONS.get(function, function)](f"{name} ({function})", value)
    return value


#: Activations of MLPRegressor that have another name in torch.
_FUNCTIONS = {"logistic": "sigmoid"}


def _linear(model: Any, place: str, point: Node) -> Node:
    """Read a linear model."""
    coefficients = tensor(model.coef_).reshape(-1, point.width).T
    return affine(place, [(point, coefficients)], numbers(model.intercept_, coefficients.shape[1]))


def _generalised(model: Any, place: str, point: Node) -> Node:
    """Read a generalised linear model, whose link is the identity or the logarithm."""
    link = type(model._base_loss.link).__name__
    value = _linear(model, place, point)
    if link not in {"IdentityLink", "LogLink"}:
        raise refuse(place, f"has a link ({link}) that is not among what can be imported", "use link='log'")
    return value if link == "IdentityLink" else TORCH["exp"](place, value)


def _least_squares(model: Any, place: str, point: Node) -> Node:
    """Read a model of partial least squares, (x − mean) Cᵀ + b."""
    return _linear(model, place, affine(place, [(point, 1.0)], -tensor(model._x_mean)))


def _support_vectors(model: Any, place: str, point: Node) -> Node:
    """Read Σᵢ αᵢ k(x, cᵢ) + b, of support vectors c; there are none where all targets are within ε of b."""
    if not len(model.support_):
        return constant(place, point, tensor(model.intercept_))
    values = kernel(place, point, model.support_vectors_, model.kernel, model._gamma, model.degree, model.coef0)
    return affine(place, [(values, tensor(model.dual_coef_).T)], tensor(model.intercept_))


def _kernel_ridge(model: Any, place: str, point: Node) -> Node:
    """Read Σᵢ αᵢ k(x, cᵢ)."""
    values = kernel(place, point, model.X_fit_, model.kernel, model.gamma, model.degree, model.coef0)
    return affine(place, [(values, tensor(model.dual_coef_).reshape(values.width, -1))])


def _process(process: Any, place: str, point: Node) -> Node:
    """Read the mean of a Gaussian process, mean + scale Σᵢ αᵢ k(x, cᵢ)."""
    if not hasattr(process, "X_train_"):
        raise refuse(place, "has not been fitted to data", "call fit before")
    weights = tensor(process.alpha_).reshape(len(process.X_train_), -1)
    mean, scale = (numbers(each, weights.shape[1]) for each in (process._y_train_mean, process._y_train_std))
    values = process_kernel(process.kernel_, place, point, tensor(process.X_train_))
    return constant(place, point, mean) if values is None else affine(place, [(values, weights * scale)], mean)


def _pipeline(pipeline: Any, place: str, point: Node) -> Node:
    """Read a pipeline: transformers, and an estimator at the end."""
    value = point
    for name, step in pipeline.steps[:-1]:
        value = transform(step, child(place, name, step), value)
    name, last = pipeline.steps[-1]
    return _predict(last, child(place, name, last), value)


def _transformed(regressor: Any, place: str, point: Node) -> Node:
    """Read TransformedTargetRegressor, whose transformer is undone."""
    inner, transformer = regressor.regressor_, regressor.transformer_
    value = _predict(inner, child(place, "regressor_", inner), point)
    return invert(transformer, child(place, "transformer_", transformer), value)


def _best(search: Any, place: str, point: Node) -> Node:
    """Read the estimator that a search found."""
    if not hasattr(search, "best_estimator_"):
        raise refuse(place, "has no best estimator", "fit it with refit=True")
    return _inner("best_estimator_")(search, place, point)


def _inner(name: str) -> Reader:
    """Return a reader of an estimator that holds another one."""

    def read(estimator: Any, place: str, point: Node) -> Node:
        inner = getattr(estimator, name)
        return _predict(inner, child(place, name, inner), point)

    return read


def _each(estimator: Any, place: str, point: Node) -> list[Node]:
    """Return the predictions of all estimators, each of the features that it was fitted to."""
    columns = getattr(estimator, "estimators_features_", [slice(None)] * len(estimator.estimators_))
    return [
        _predict(part, child(place, f"estimators_[{i}]", part), _some(place, point, chosen))
        for i, (part, chosen) in enumerate(zip(estimator.estimators_, columns, strict=True))
    ]


def _some(place: str, point: Node, columns: Any) -> Node:
    return point if isinstance(columns, slice) else select(place, point, columns)


def _average(estimator: Any, place: str, point: Node) -> Node:
    """Read the weighted mean of some estimators."""
    parts = _each(estimator, place, point)
    given = getattr(estimator, "_weights_not_none", None)
    weights = numbers(1.0 if given is None else given, len(parts))
    return affine(place, [(part, float(weight / weights.sum())) for part, weight in zip(parts, weights, strict=True)])


def _stack(estimator: Any, place: str, point: Node) -> Node:
    """Read an estimator of the predictions of others, and of the inputs if it passes them through."""
    parts = _each(estimator, place, point) + ([point] if estimator.passthrough else [])
    last = estimator.final_estimator_
    return _predict(last, child(place, "final_estimator_", last), stacked(place, parts))


def _chain(estimator: Any, place: str, point: Node) -> Node:
    """Read estimators each of which takes the inputs and the predictions of those before it."""
    parts: list[Node] = []
    for i, part in enumerate(estimator.estimators_):
        parts.append(_predict(part, child(place, f"estimators_[{i}]", part), stacked(place, [point, *parts])))
    return select(place, stacked(place, parts), torch.tensor(list(estimator.order_)).argsort())


def _selected(estimator: Any, place: str, point: Node) -> Node:
    """Read an elimination of features, with the estimator of those that are left."""
    return _inner("estimator_")(estimator, place, transform(estimator, place, point))


#: Estimators by the names of their classes.
ESTIMATORS: dict[str, Reader] = {
    **dict.fromkeys(("BaggingRegressor", "VotingRegressor"), _average),
    **dict.fromkeys(("CCA", "PLSCanonical", "PLSRegression"), _least_squares),
    **dict.fromkeys(("GammaRegressor", "PoissonRegressor", "TweedieRegressor"), _generalised),
    **dict.fromkeys(("GridSearchCV", "HalvingGridSearchCV", "HalvingRandomSearchCV", "RandomizedSearchCV"), _best),
    **dict.fromkeys(("NuSVR", "SVR"), _support_vectors),
    **dict.fromkeys(("RFE", "RFECV"), _selected),
    "DummyRegressor": lambda model, place, point: constant(place, point, tensor(model.constant_).reshape(-1)),
    "FrozenEstimator": _inner("estimator"),
    "GaussianProcessRegressor": _process,
    "KernelRidge": _kernel_ridge,
    "MLPRegressor": _network,
    "MultiOutputRegressor": lambda model, place, point: stacked(place, _each(model, place, point)),
    "Pipeline": _pipeline,
    "RANSACRegressor": _inner("estimator_"),
    "RegressorChain": _chain,
    "StackingRegressor": _stack,
    "TransformedTargetRegressor": _transformed,
}

_KERNEL_SUMS = (_kernel_ridge, _process, _support_vectors)

#: Regressors by the names of their bases.
BASES: dict[str, Reader] = dict.fromkeys(("BaseSGDRegressor", "LinearModel"), _linear)

_SMOOTH = "train a smooth model, such as MLPRegressor or KernelRidge"
#: Reasons by the names of classes or of modules.
_REASONS: dict[str, tuple[str, str]] = {
    "sklearn.tree": ("is a tree, which is constant in pieces", _SMOOTH),
    "sklearn.ensemble": ("combines trees, or chooses among its members, so that it jumps", _SMOOTH),
    "sklearn.isotonic": ("is linear in pieces", _SMOOTH),
    "sklearn.neighbors": ("chooses neighbours, so that it jumps", _SMOOTH),
    "sklearn.preprocessing": ("is a transformer, which predicts nothing", "end the pipeline with a regressor"),
}
