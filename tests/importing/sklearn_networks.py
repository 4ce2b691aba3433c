"""Random estimators of scikit-learn, fitted to a few points, each with the same function in torch."""

import random

import numpy as np
import torch
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import PCA, FastICA, TruncatedSVD
from sklearn.ensemble import BaggingRegressor, StackingRegressor, VotingRegressor
from sklearn.feature_selection import SelectKBest, SelectorMixin, VarianceThreshold, f_regression
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    ARDRegression,
    BayesianRidge,
    ElasticNet,
    HuberRegressor,
    Lars,
    LinearRegression,
    MultiTaskLasso,
    PoissonRegressor,
    QuantileRegressor,
    RANSACRegressor,
    Ridge,
    SGDRegressor,
    TweedieRegressor,
)
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputRegressor, RegressorChain
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    PolynomialFeatures,
    PowerTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVR, LinearSVR, NuSVR

FUNCTIONS = {
    "identity": lambda z: z,
    "logistic": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "exp": torch.exp,
}
NUMPY = {None: lambda z: z, np.exp: torch.exp, np.log: torch.log, np.tanh: torch.tanh, np.square: torch.square}
SCALERS = (
    StandardScaler,
    lambda: StandardScaler(with_mean=False),
    MinMaxScaler,
    lambda: MinMaxScaler((-1.0, 1.0)),
    MaxAbsScaler,
    RobustScaler,
)
#: Of one target, or of several as well.
LINEAR = (ARDRegression, BayesianRidge, HuberRegressor, LinearSVR, QuantileRegressor, SGDRegressor, TweedieRegressor)
LINEAR_OF_ALL = (LinearRegression, Ridge, ElasticNet, Lars, lambda: PLSRegression(1))


def _tensor(array):
    return torch.as_tensor(np.asarray(array), dtype=torch.float64)


class Draw:
    """Random parts, which are not fitted."""

    def __init__(self, seed, activations, d, m):
        self.seed, self.activations, self.d, self.m = seed, activations, d, m
        self.random = random.Random(seed)
        self.takes_all, self.is_positive = False, False

    def choice(self, options):
        return self.random.choice(options)

    def network(self, **options):
        hidden = tuple(self.choice((1, 3, 5)) for _ in range(self.choice((1, 2, 3))))
        return MLPRegressor(
            hidden_layer_sizes=hidden,
            activation=self.choice(self.activations),
            max_iter=1,
            solver="sgd",
            random_state=self.seed,
            learning_rate_init=1e-4,
            **options,
        )

    def linear(self):
        return self.choice(LINEAR_OF_ALL if self.m > 1 else LINEAR + LINEAR_OF_ALL)()

    def process(self):
        k = kernels
        scales = [self.random.uniform(1.0, 3.0) for _ in range(self.d)] if self.takes_all else 2.0
        kernel = self.choice(
            (
                k.ConstantKernel(2.0) * k.RBF(2.0) + k.WhiteKernel(0.1),
                k.RBF(scales) + k.DotProduct(0.5),
                k.RationalQuadratic(2.0, 1.5) * k.ConstantKernel(0.5) + k.ConstantKernel(0.3),
                k.RBF(1.5) * k.DotProduct(1.0),
                k.DotProduct(1.0) ** 2,
            )
        )
        return GaussianProcessRegressor(kernel, alpha=0.5, optimizer=None, normalize_y=self.choice((True, False)))

    def regressor(self):
        """Return an estimator that holds no other."""
        kernel = {"kernel": self.choice(("rbf", "poly", "sigmoid", "linear")), "degree": self.choice((2, 3))}
        gamma = {"gamma": self.choice((0.01, 0.05))}
        makers = [self.network] * 5 + [self.linear] * 2 + [self.process]
        makers += [lambda: KernelRidge(**kernel, **gamma, coef0=0.5)]
        if self.m == 1:
            vectors = self.choice((SVR, NuSVR))
            makers += [lambda: vectors(**kernel, **gamma, coef0=0.5)]
            makers += [PoissonRegressor, lambda: self.network(loss="poisson")] if self.is_positive else []
        return self.choice(makers)()

    def combined(self):
        """Return an estimator that holds others."""
        members = [(name, self.regressor()) for name in "ab"]
        makers = [lambda: BaggingRegressor(self.regressor(), 2, max_features=0.8, random_state=0)]
        makers += [lambda: GridSearchCV(self.network(), {"alpha": [1e-3, 1e-4]}, cv=2)]
        makers += [lambda: Pipeline([("none", "passthrough"), *members[:1]])]
        if self.m == 1:
            passes = self.choice((True, False))
            makers += [lambda: VotingRegressor(members, weights=self.choice((None, [1.0, 3.0])))]
            makers += [lambda: StackingRegressor(members, Ridge(), cv=2, passthrough=passes)]
            makers += [lambda: RANSACRegressor(LinearRegression(), min_samples=6, random_state=0)]
        else:
            makers += [MultiTaskLasso, lambda: MultiOutputRegressor(Ridge())]
            makers += [lambda: RegressorChain(Ridge(), order=[1, 0])]
        return self.choice(makers)()

    def transformer(self):
        kernel = {"kernel": self.choice(("rbf", "poly", "sigmoid")), "gamma": 0.05, "degree": 2, "coef0": 1.0}
        makers = [
            lambda: PCA(whiten=self.choice((True, False))),
            lambda: make_pipeline(StandardScaler(), PolynomialFeatures(2), TruncatedSVD(2)),
            lambda: FastICA(random_state=0, max_iter=1000, tol=0.1),
            lambda: SelectKBest(f_regression, k=1) if self.m == 1 else VarianceThreshold(),
            lambda: make_pipeline(self.choice(SCALERS)(), self.choice(SCALERS)()),
            lambda: make_pipeline(StandardScaler(), PolynomialFeatures(self.choice((2, 3)))),
            lambda: make_pipeline(StandardScaler(), FunctionTransformer(self.choice((np.tanh, np.square, None)))),
            lambda: make_pipeline(StandardScaler(), FunctionTransformer(np.exp), PowerTransformer("box-cox")),
            lambda: make_pipeline(StandardScaler(), RBFSampler(gamma=0.2, n_components=4, random_state=0)),
            lambda: make_pipeline(StandardScaler(), Nystroem(**kernel, n_components=2, random_state=0)),
            lambda: make_union(self.choice(SCALERS)(), StandardScaler()),
            lambda: ColumnTransformer(
                [("a", StandardScaler(), [0])], remainder=self.choice(("passthrough", MinMaxScaler()))
            ),
        ]
        return self.choice(makers)()

    def target(self):
        """Return options of TransformedTargetRegressor."""
        scalers = [self.choice(SCALERS)() for _ in range(2)]
        return self.choice(
            (
                {"transformer": scalers[0]},
                {"transformer": scalers[0]},
                {"transformer": make_pipeline(*scalers)},
                {"func": np.log, "inverse_func": np.exp},
                {},
            )
        )


def estimator(seed, activations=("identity", "logistic", "tanh"), kinds="all"):
    """Return a fitted estimator, its number of inputs, and the function of float64 tensors that it predicts by.

    Args:
        seed: Of the random choices.
        activations: Of networks.
        kinds: ``"network"`` for networks and scalers alone, which skl2onnx exports.
    """
    choices, rng = random.Random(seed), np.random.default_rng(seed)
    d, m = choices.choice((1, 2, 3, 4)), choices.choice((1, 1, 2))
    draw = Draw(seed, activations, d, m)
    x = rng.normal(3.0, 2.0, (12, d))
    y = np.sin(x @ rng.normal(size=(d, m))) * 5 + 10
    y = y[:, 0] if m == 1 else y
    if kinds == "network":
        inner = LinearRegression() if choices.random() < 0.1 else draw.network()
        steps = [choices.choice(SCALERS)() for _ in range(choices.choice((0, 1, 1, 2)))]
        steps += [PCA(whiten=choices.random() < 0.5)] if choices.random() < 0.2 else []
        target = None
    else:
        target = draw.target() if choices.random() < 0.5 else None
        steps = [draw.choice(SCALERS)() for _ in range(choices.choice((0, 1)))]
        steps += [draw.transformer()] if choices.random() < 0.5 else []
        is_combined = choices.random() < 0.25
        draw.takes_all = not steps and not is_combined
        draw.is_positive = not (target and "transformer" in target)
        inner = draw.combined() if is_combined else draw.regressor()
    model = make_pipeline(*steps, inner) if steps else inner
    model = TransformedTargetRegressor(model, **target) if target is not None else model
    model.fit(x, y)
    return model, d, lambda points: predict(model, points)


def predict(model, u):
    """Return an estimator's prediction (n, m), written with its fitted numbers."""
    return PREDICTIONS.get(type(model), _linear)(model, u)


def _linear(model, u):
    return u @ _tensor(model.coef_).reshape(-1, u.shape[1]).T + _tensor(model.intercept_)


def _network(model, u):
    for i, (K, b) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        is_last = i == len(model.coefs_) - 1
        u = FUNCTIONS[model.out_activation_ if is_last else model.activation](u @ _tensor(K) + _tensor(b))
    return u


def _pipeline(model, u):
    for _, step in model.steps[:-1]:
        u = _transform(step, u)
    return predict(model.steps[-1][1], u)


def _vote(model, u):
    weights = model.weights or [1.0, 1.0]
    return sum(w * predict(part, u) for w, part in zip(weights, model.estimators_, strict=True)) / sum(weights)


def _bag(model, u):
    pairs = list(zip(model.estimators_, model.estimators_features_, strict=True))
    return sum(predict(part, u[:, torch.as_tensor(chosen)]) for part, chosen in pairs) / len(pairs)


def _stack(model, u):
    values = [predict(part, u) for part in model.estimators_]
    return predict(model.final_estimator_, torch.cat([*values, u] if model.passthrough else values, 1))


def _chain(model, u):
    first = predict(model.estimators_[0], u)
    return torch.cat([predict(model.estimators_[1], torch.cat([u, first], 1)), first], 1)  # the order is 1, 0


def _vectors(model, u):
    return _kernel(model, u, model.support_vectors_) @ _tensor(model.dual_coef_).T + _tensor(model.intercept_)


def _ridge(model, u):
    return _kernel(model, u, model.X_fit_) @ _tensor(model.dual_coef_).reshape(len(model.X_fit_), -1)


def _process(model, u):
    values = _process_kernel(model.kernel_, u, _tensor(model.X_train_))
    mean = values @ _tensor(model.alpha_).reshape(len(model.X_train_), -1)
    return mean * _tensor(model._y_train_std) + _tensor(model._y_train_mean)


PREDICTIONS = {
    BaggingRegressor: _bag,
    GaussianProcessRegressor: _process,
    GridSearchCV: lambda model, u: predict(model.best_estimator_, u),
    KernelRidge: _ridge,
    MLPRegressor: _network,
    MultiOutputRegressor: lambda model, u: torch.cat([predict(part, u) for part in model.estimators_], 1),
    NuSVR: _vectors,
    PLSRegression: lambda model, u: _linear(model, u - _tensor(model._x_mean)),
    Pipeline: _pipeline,
    PoissonRegressor: lambda model, u: _linear(model, u).exp(),
    RANSACRegressor: lambda model, u: predict(model.estimator_, u),
    RegressorChain: _chain,
    SVR: _vectors,
    StackingRegressor: _stack,
    TransformedTargetRegressor: lambda model, u: _untransform(model.transformer_, predict(model.regressor_, u)),
    VotingRegressor: _vote,
}


def _squares(u, points):
    return ((u[:, None] - points) ** 2).sum(-1)


def _kernel(model, u, points):
    points = _tensor(points)
    products = u @ points.T
    match model.kernel:
        case "linear":
            return products
        case "poly":
            return (model.gamma * products + model.coef0) ** model.degree
        case "sigmoid":
            return torch.tanh(model.gamma * products + model.coef0)
    return torch.exp(-model.gamma * _squares(u, points))


def _process_kernel(kernel, u, points):
    return PROCESSES[type(kernel)](kernel, u, points)


def _distances(kernel, u, points):
    scale = _tensor(kernel.length_scale)
    return _squares(u / scale, points / scale)


def _each(combine):
    return lambda k, u, points: combine(_process_kernel(k.k1, u, points), _process_kernel(k.k2, u, points))


PROCESSES = {
    kernels.ConstantKernel: lambda k, u, points: k.constant_value * torch.ones(len(u), len(points)).double(),
    kernels.DotProduct: lambda k, u, points: u @ points.T + k.sigma_0**2,
    kernels.Exponentiation: lambda k, u, points: _process_kernel(k.kernel, u, points) ** int(k.exponent),
    kernels.Product: _each(torch.mul),
    kernels.RBF: lambda k, u, points: torch.exp(-_distances(k, u, points) / 2),
    kernels.RationalQuadratic: lambda k, u, points: (1 + _distances(k, u, points) / (2 * k.alpha)) ** -k.alpha,
    kernels.Sum: _each(torch.add),
    kernels.WhiteKernel: lambda k, u, points: torch.zeros(len(u), len(points)).double(),
}


def _transform(step, u):
    if step is None or step == "passthrough":
        return u
    if isinstance(step, SelectorMixin):
        return u[:, torch.as_tensor(step.get_support())]
    return TRANSFORMS.get(type(step), _scale)(step, u)


def _scale(step, u):
    zero = np.zeros((1, u.shape[1]))
    shift = _tensor(step.transform(zero))
    return u * (_tensor(step.transform(zero + 1)) - shift) + shift


def _steps(step, u):
    for _, part in step.steps:
        u = _transform(part, u)
    return u


def _columns(step, u):
    pairs = [(part, columns) for _, part, columns in step.transformers_ if len(columns)]
    return torch.cat([_transform(part, u[:, list(columns)]) for part, columns in pairs], 1)


def _components(step, u):
    u = (u - _tensor(step.mean_)) @ _tensor(step.components_).T
    return u / _tensor(step.explained_variance_).sqrt() if isinstance(step, PCA) and step.whiten else u


def _polynomial(step, u):
    rows = [torch.stack([u[:, k] ** int(p) for k, p in enumerate(row)]).prod(0) for row in step.powers_]
    return torch.stack(rows, 1)


def _box_cox(step, u):
    u = torch.stack([(u[:, i] ** k - 1) / k for i, k in enumerate(step.lambdas_)], 1)
    return (u - _tensor(step._scaler.mean_)) / _tensor(step._scaler.scale_)


def _waves(step, u):
    angles = u @ _tensor(step.random_weights_) + _tensor(step.random_offset_)
    return torch.cos(angles) * (2 / step.n_components) ** 0.5


TRANSFORMS = {
    ColumnTransformer: _columns,
    FastICA: _components,
    FeatureUnion: lambda step, u: torch.cat([_transform(part, u) for _, part in step.transformer_list], 1),
    FunctionTransformer: lambda step, u: NUMPY[step.func](u),
    Nystroem: lambda step, u: _kernel(step, u, step.components_) @ _tensor(step.normalization_).T,
    PCA: _components,
    Pipeline: _steps,
    PolynomialFeatures: _polynomial,
    PowerTransformer: _box_cox,
    RBFSampler: _waves,
    TruncatedSVD: lambda step, u: u @ _tensor(step.components_).T,
}


def _untransform(step, value):
    if isinstance(step, Pipeline):
        for _, part in reversed(step.steps):
            value = _untransform(part, value)
        return value
    if isinstance(step, FunctionTransformer):
        return NUMPY[step.inverse_func](value)
    zero = np.zeros((1, value.shape[1]))
    shift = _tensor(step.inverse_transform(zero))
    return value * (_tensor(step.inverse_transform(zero + 1)) - shift) + shift
