"""Estimators of scikit-learn: networks, linear models, scalers, and pipelines of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessquik import activations as act
from hessquik.errors import UnsupportedError
from hessquik.importing.graph import Node, Pointwise, affine, refuse
from hessquik.importing.scaling import Scaling
from hessquik.importing.source import Imported, Source, import_source
from hessquik.networks import NN

__all__ = ["ESTIMATORS", "TRANSFORMERS", "from_sklearn", "import_estimator"]


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
        estimator: ``MLPRegressor``, a linear model, a ``Pipeline`` that ends with one, or a
            ``TransformedTargetRegressor`` of one.
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
    width = getattr(estimator, "n_features_in_", None)
    if not isinstance(width, int):
        raise UnsupportedError(
            f"{type(estimator).__name__} has not been fitted to data, or is no estimator of scikit-learn; call fit "
            "before"
        )

    def evaluate(x: Tensor) -> Tensor:
        return torch.as_tensor(estimator.predict(x.numpy())).reshape(len(x), -1)

    def read(point: Node) -> Node:
        return _predict(estimator, type(estimator).__name__, point)

    return import_source(
        Source(width, torch.float64, "scikit-learn", read, evaluate), scaling, allow_kinks, dtype, bounds
    )


def _predict(estimator: Any, place: str, point: Node) -> Node:
    """Return the prediction of an estimator as a value of the graph."""
    reader = ESTIMATORS.get(_kind(estimator))
    if reader is None:
        raise refuse(
            place,
            "is no smooth function of its inputs that can be exact here",
            f"use one of {', '.join(ESTIMATORS)}, in a Pipeline with {', '.join(TRANSFORMERS)}",
        )
    return reader(estimator, place, point)


def _transform(transformer: Any, place: str, value: Node) -> Node:
    """Return the result of a transformer as a value of the graph."""
    if transformer == "passthrough" or transformer is None:
        return value
    shift, scale = _moments(transformer, place)
    if _kind(transformer) == "PCA":
        matrix = _tensor(transformer.components_).T
        if transformer.whiten:
            matrix = matrix / _tensor(transformer.explained_variance_).sqrt()
        return affine(place, [(value, matrix)], -_tensor(transformer.mean_) @ matrix)
    return affine(place, [(value, torch.diag(scale))], shift)


def _kind(part: Any) -> str:
    """Return the class's name if it is one of scikit-learn's own."""
    kind = type(part)
    return kind.__name__ if kind.__module__.split(".")[0] == "sklearn" else ""


def _moments(transformer: Any, place: str) -> tuple[Tensor, Tensor]:
    """Return b and a of a transformer that computes ax + b."""
    moments = TRANSFORMERS.get(_kind(transformer))
    if moments is None:
        raise refuse(
            place,
            f"is a {type(transformer).__name__}, which is no affine map that is known here",
            f"use one of {', '.join(TRANSFORMERS)}",
        )
    if getattr(transformer, "clip", False):
        raise refuse(place, "clips its results, which has kinks", "fit it with clip=False")
    return moments(transformer)


def _standard(scaler: Any) -> tuple[Tensor, Tensor]:
    """Return −mean/scale and 1/scale, of StandardScaler; ``mean_`` is there without ``with_mean`` too."""
    return _centered(scaler, scaler.mean_ if scaler.with_mean else 0.0, scaler.scale_ if scaler.with_std else 1.0)


def _robust(scaler: Any) -> tuple[Tensor, Tensor]:
    """Return −center/scale and 1/scale, of RobustScaler."""
    center = scaler.center_ if scaler.with_centering else 0.0
    return _centered(scaler, center, scaler.scale_ if scaler.with_scaling else 1.0)


def _centered(scaler: Any, mean: Any, scale: Any) -> tuple[Tensor, Tensor]:
    ones = torch.ones(scaler.n_features_in_, dtype=torch.float64)
    return -_tensor(mean) / _tensor(scale) * ones, ones / _tensor(scale)


def _tensor(array: Any) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float64)


#: Affine transformers: b and a of ax + b. PCA has a matrix besides.
TRANSFORMERS: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "StandardScaler": _standard,
    "MinMaxScaler": lambda scaler: (_tensor(scaler.min_), _tensor(scaler.scale_)),
    "MaxAbsScaler": lambda scaler: (torch.zeros(scaler.n_features_in_).double(), 1 / _tensor(scaler.scale_)),
    "RobustScaler": _robust,
    "PCA": lambda pca: (_tensor(pca.mean_), torch.ones(1)),
}


def _network(network: Any, place: str, point: Node) -> Node:
    """Read MLPRegressor."""
    functions: dict[str, act.hessQuikActivationFunction | None] = {
        "identity": None,
        "logistic": act.sigmoidActivation(),
        "tanh": act.tanhActivation(),
        "relu": act.reluActivation(),
    }
    value, last = point, len(network.coefs_) - 1
    for layer, (matrix, offset) in enumerate(zip(network.coefs_, network.intercepts_, strict=True)):
        name = f"{place}.layer{layer}"
        value = affine(name, [(value, _tensor(matrix))], _tensor(offset))
        function = functions[network.out_activation_ if layer == last else network.activation]
        if function is not None:
            value = Pointwise(f"{name} ({network.activation})", value.width, value, function)
    return value


def _linear(model: Any, place: str, point: Node) -> Node:
    """Read a linear model."""
    coefficients = _tensor(model.coef_).reshape(-1, point.width).T
    offset = _tensor(model.intercept_).reshape(-1).expand(coefficients.shape[1]).clone()
    return affine(place, [(point, coefficients)], offset)


def _pipeline(pipeline: Any, place: str, point: Node) -> Node:
    """Read a pipeline: transformers, and an estimator at the end."""
    value = point
    for name, step in pipeline.steps[:-1]:
        value = _transform(step, f"{place}.{name} ({type(step).__name__})", value)
    name, last = pipeline.steps[-1]
    return _predict(last, f"{place}.{name} ({type(last).__name__})", value)


def _transformed(regressor: Any, place: str, point: Node) -> Node:
    """Read TransformedTargetRegressor, whose transformer is undone."""
    inner = regressor.regressor_
    value = _predict(inner, f"{place}.regressor_ ({type(inner).__name__})", point)
    transformer = regressor.transformer_
    name = f"{place}.transformer_ ({type(transformer).__name__})"
    if _kind(transformer) in {"", "PCA", "FunctionTransformer"}:
        raise refuse(name, "is undone by a function of its own", "scale the target by StandardScaler or MinMaxScaler")
    shift, scale = _moments(transformer, name)
    return affine(name, [(value, torch.diag(1 / scale))], -shift / scale)


#: Estimators by the names of their classes.
ESTIMATORS: dict[str, Callable[[Any, str, Node], Node]] = {
    "MLPRegressor": _network,
    "Pipeline": _pipeline,
    "TransformedTargetRegressor": _transformed,
    **dict.fromkeys(("LinearRegression", "Ridge", "RidgeCV", "Lasso", "LassoCV", "ElasticNet"), _linear),
}
