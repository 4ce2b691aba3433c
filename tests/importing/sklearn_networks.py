"""Random estimators of scikit-learn, fitted to a few points, each with the same function in torch."""

import random

import numpy as np
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

FUNCTIONS = {"identity": lambda z: z, "logistic": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
SCALERS = (
    StandardScaler,
    lambda: StandardScaler(with_mean=False),
    MinMaxScaler,
    lambda: MinMaxScaler((-1.0, 1.0)),
    MaxAbsScaler,
    RobustScaler,
)


def _tensor(array):
    return torch.as_tensor(np.asarray(array), dtype=torch.float64)


def estimator(seed, activations=("identity", "logistic", "tanh")):
    """Return a fitted estimator, its number of inputs, and the function of float64 tensors that it predicts by."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    d, m = draw.choice((1, 2, 3, 4)), draw.choice((1, 1, 2))
    x = rng.normal(3.0, 2.0, (12, d))
    y = np.sin(x @ rng.normal(size=(d, m))) * 5 + 10
    y = y[:, 0] if m == 1 else y
    kind = draw.choice(activations)
    hidden = tuple(draw.choice((1, 3, 5)) for _ in range(draw.choice((1, 2, 3))))
    network = MLPRegressor(
        hidden_layer_sizes=hidden,
        activation=kind,
        max_iter=1,
        solver="sgd",
        random_state=seed,
        learning_rate_init=1e-4,
    )
    if draw.random() < 0.1:
        network = LinearRegression()
    steps = [draw.choice(SCALERS)() for _ in range(draw.choice((0, 1, 1, 2)))]
    if draw.random() < 0.2:
        steps.append(PCA(whiten=draw.random() < 0.5))
    model = make_pipeline(*steps, network) if steps else network
    scaler = draw.choice(SCALERS)() if draw.random() < 0.5 else None
    model = TransformedTargetRegressor(model, transformer=scaler) if scaler else model
    model.fit(x, y)
    return model, d, lambda points: _predict(model, points)


def _predict(model, u):
    """Return the estimator's prediction, written with its fitted numbers."""
    match model:
        case TransformedTargetRegressor():
            inner, scaler = _predict(model.regressor_, u), model.transformer_
            zero = np.zeros((1, inner.shape[1]))
            shift = _tensor(scaler.inverse_transform(zero))
            return inner * (_tensor(scaler.inverse_transform(zero + 1)) - shift) + shift
        case MLPRegressor():
            for i, (K, b) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
                z = u @ _tensor(K) + _tensor(b)
                u = z if i == len(model.coefs_) - 1 else FUNCTIONS[model.activation](z)
            return u
        case LinearRegression():
            return u @ _tensor(model.coef_).reshape(-1, u.shape[1]).T + _tensor(model.intercept_)
    for _, step in model.steps[:-1]:
        if isinstance(step, PCA):
            u = (u - _tensor(step.mean_)) @ _tensor(step.components_).T
            u = u / _tensor(step.explained_variance_).sqrt() if step.whiten else u
        else:
            zero = np.zeros((1, u.shape[1]))
            shift = _tensor(step.transform(zero))
            u = u * (_tensor(step.transform(zero + 1)) - shift) + shift
    return _predict(model.steps[-1][1], u)
