"""Random estimators of scikit-learn: values and both derivatives against automatic differentiation in torch."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import Birch
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA, IncrementalPCA, KernelPCA
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import BaggingRegressor, RandomForestRegressor
from sklearn.feature_selection import RFE, RFECV, SequentialFeatureSelector
from sklearn.frozen import FrozenEstimator
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern
from sklearn.impute import SimpleImputer
from sklearn.isotonic import IsotonicRegression
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import GammaRegressor, LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    Normalizer,
    PowerTransformer,
    QuantileTransformer,
    SplineTransformer,
    StandardScaler,
)
from sklearn.random_projection import SparseRandomProjection
from sklearn.svm import SVR, NuSVR
from sklearn.tree import DecisionTreeRegressor
from sklearn.utils import all_estimators

import hessquik
from hessquik.errors import UnsupportedError
from hessquik.importing import sklearn_estimator
from tests.importing import sklearn_networks
from tests.importing.comparison import TOLERANCE, error, worst_error
from tests.whole import choose


def points(d, seed=0):
    """Return three points."""
    return 3 + 2 * torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fitted(seed, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one step of training does not converge
        return sklearn_networks.estimator(seed, **options)


@pytest.mark.parametrize("start", range(0, choose(100, 1000), 50))
def test_random_estimators(start):
    for seed in range(start, start + 50):
        estimator, d, f = fitted(seed)
        network = hessquik.from_sklearn(estimator)
        x = points(d)
        expected = torch.as_tensor(estimator.predict(x.numpy())).reshape(len(x), -1)
        assert error(network(x)[0].detach(), expected) <= TOLERANCE, seed
        assert worst_error(network, f, x) <= TOLERANCE, seed


def test_relu_is_refused_by_the_name_of_its_layer_unless_kinks_are_allowed():
    estimator, d, f = fitted(3, activations=("relu",), kinds="network")
    with pytest.raises(UnsupportedError, match=r"layer0 \(relu\) is linear in pieces.*softplus.*allow_kinks=True"):
        hessquik.from_sklearn(estimator)
    assert worst_error(hessquik.from_sklearn(estimator, allow_kinks=True), f, points(d)) <= TOLERANCE


X = np.random.default_rng(0).normal(3.0, 2.0, (30, 3))
Y = np.sin(X @ [1.0, 0.5, -0.3]) * 5 + 10
#: Estimators that are not fitted, and what the refusal says.
REFUSED = {
    "a forest": (RandomForestRegressor(2), "node RandomForestRegressor combines trees, .*; train a smooth model"),
    "a tree": (DecisionTreeRegressor(), "is a tree, which is constant in pieces; train a smooth model"),
    "a bag of trees": (BaggingRegressor(n_estimators=2), r"BaggingRegressor.estimators_\[0\] .* is a tree"),
    "neighbours": (
        make_pipeline(KNeighborsRegressor()),
        r"Pipeline.kneighborsregressor \(KNeighborsRegressor\) chooses neighbours",
    ),
    "a classifier": (LogisticRegression(), "LogisticRegression is a classifier, which has labels; use a regressor"),
    "a linear classifier": (RidgeClassifier(), "RidgeClassifier is a classifier"),
    "steps": (IsotonicRegression(), "IsotonicRegression is linear in pieces"),
    "quantiles": (make_pipeline(QuantileTransformer(n_quantiles=5), Ridge()), "is linear in pieces between the quan"),
    "splines": (make_pipeline(SplineTransformer(), Ridge()), "one polynomial for each interval .*; use PolynomialF"),
    "norms": (make_pipeline(Normalizer(), Ridge()), r"\(Normalizer\) divides features by their norm"),
    "Yeo-Johnson": (make_pipeline(PowerTransformer(), Ridge()), "one formula for numbers below 0 .*method='box-cox'"),
    "clipping": (make_pipeline(MinMaxScaler(clip=True), Ridge()), "clips its results, .*; fit it with clip=False"),
    "components of a kernel": (make_pipeline(KernelPCA(2), Ridge()), r"\(KernelPCA\) is not among what can be"),
    "clusters, which refer to each other": (make_pipeline(Birch(), Ridge()), r"\(Birch\) is not among what can be"),
    "a function": (
        make_pipeline(FunctionTransformer(np.abs), Ridge()),
        r"\(FunctionTransformer\) applies a function that cannot be read; use one of np.exp, .*np.log1p",
    ),
    "a kernel with kinks": (KernelRidge(kernel="laplacian"), r"a kernel \(laplacian\) that has kinks .*; use .* rbf"),
    "a component without variance": (
        make_pipeline(
            FunctionTransformer(), FeatureUnion([(n, "passthrough") for n in "ab"]), PCA(whiten=True), Ridge()
        ),
        r"\(PCA\) divides a component without variance .* nothing but rounding; fit it with fewer components",
    ),
    "another kernel": (KernelRidge(kernel="cosine"), r"a kernel \(cosine\) that is not among what can be imported"),
    "a Matern kernel": (
        GaussianProcessRegressor(Matern()),
        "Matern.* square root of a squared .*; use RBF or Rational",
    ),
    "a target": (
        TransformedTargetRegressor(Ridge(), transformer=PowerTransformer()),
        r"transformer_ \(PowerTransformer\) is undone by a function that is not among .*; scale the target by St",
    ),
    "a constant that becomes NaN": (
        make_pipeline(SimpleImputer(missing_values=3.0), Ridge()),
        "replaces, drops or adds features; use it for NaN alone",
    ),
    "a search without a result": (
        GridSearchCV(Ridge(), {"alpha": [1.0, 2.0]}, cv=2, refit=False),
        "GridSearchCV has no best estimator; fit it with refit=True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_by_its_step(name):
    estimator, message = REFUSED[name]
    x, y = (X[:, :1], Y) if name == "steps" else (X, (Y > 10).astype(int) if "classifier" in name else Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(x, y)
    with pytest.raises(UnsupportedError, match=message):
        hessquik.from_sklearn(estimator)


def test_missing_values_that_are_no_numbers_are_refused():
    imputer = SimpleImputer(missing_values=None, strategy="constant", fill_value=0.0)
    model = make_pipeline(imputer, Ridge()).fit(X.astype(object), Y)
    with pytest.raises(UnsupportedError, match="replaces, drops or adds features; use it for NaN alone"):
        hessquik.from_sklearn(model)


def test_numbers_that_do_not_fit_are_refused_by_their_step():
    model = Ridge().fit(X, Y)
    model.coef_ = np.zeros(5)
    with pytest.raises(UnsupportedError, match=r"node Ridge has arguments that cannot be read .* size 5"):
        hessquik.from_sklearn(model)


def test_what_has_not_been_fitted_is_named():
    half = make_pipeline(StandardScaler(), Ridge())
    half[0].fit(X)
    for estimator, message in (
        (RandomForestRegressor(), "node RandomForestRegressor has not been fitted to data; call fit before"),
        (make_pipeline(StandardScaler(), Ridge()), r"Pipeline.standardscaler \(\w+\) has not been fitted"),
        (half, r"node Pipeline.ridge \(Ridge\) has not been fitted to data; call fit before"),
        (make_pipeline(StandardScaler(), "passthrough").fit(X), r"Pipeline.passthrough .* predicts nothing; end the"),
        (object(), "node object is no estimator of scikit-learn"),
        (Ridge, "is no estimator of scikit-learn"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            hessquik.from_sklearn(estimator)


class Squared(Ridge):
    """A class of the user's, which predicts in its own way."""

    def predict(self, X):
        """Return the squares of the predictions."""
        return super().predict(X) ** 2


def test_subclasses_of_the_users_are_refused():
    with pytest.raises(UnsupportedError, match="node Squared is of a class that is not scikit-learn's own"):
        hessquik.from_sklearn(Squared().fit(X, Y))


def linear_models():
    """Return all regressors of scikit-learn that have coefficients, of one target."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: kind
            for name, kind in all_estimators("regressor")
            if {base.__name__ for base in kind.__mro__} & {*sklearn_estimator.BASES} and "MultiTask" not in name
        }


def test_every_linear_model_is_imported():
    kinds = linear_models()
    assert len(kinds) >= 20
    for name, kind in kinds.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = kind().fit(X, Y)
        assert worst_error(hessquik.from_sklearn(model), lambda u, m=model: _plane(m, u), points(3)) <= TOLERANCE, (
            name
        )


def _plane(model, u):
    return u @ torch.as_tensor(model.coef_).reshape(-1, 1) + torch.as_tensor(model.intercept_)


def test_columns_are_chosen_by_their_names_in_tables():
    pandas = pytest.importorskip("pandas")
    columns = ColumnTransformer([("a", StandardScaler(), ["p", "T"])], remainder="passthrough")
    model = make_pipeline(columns, Ridge()).fit(pandas.DataFrame(X, columns=["p", "T", "v"]), Y)
    network, x = hessquik.from_sklearn(model), points(3)
    expected = torch.as_tensor(model.predict(pandas.DataFrame(x.numpy(), columns=["p", "T", "v"])))
    assert error(network(x)[0].detach(), expected[:, None]) <= TOLERANCE


@pytest.mark.parametrize("weights", [{"a": 3.0, "b": 0.5}, {"a": 3.0, "remainder": 0.5}])
def test_transformers_of_columns_have_weights(weights):
    x, rng = points(3), np.random.default_rng(0)
    data = rng.normal(3, 2, (30, 3))
    columns = ColumnTransformer(
        [("a", StandardScaler(), [2]), ("b", MinMaxScaler(), [0])],
        remainder=StandardScaler(),
        transformer_weights=weights,
    )
    model = make_pipeline(columns, KernelRidge(kernel="rbf", alpha=0.1)).fit(data, np.sin(data[:, 0]))
    got = hessquik.from_sklearn(model)(x)[0].detach().reshape(-1)
    assert error(got, torch.as_tensor(model.predict(x.numpy()))) <= TOLERANCE


@pytest.mark.parametrize("kind", [RFE, RFECV, SequentialFeatureSelector])
def test_eliminations_of_features(kind):
    model = kind(Ridge()).fit(X, Y)
    model = model if hasattr(model, "predict") else make_pipeline(model, Ridge()).fit(X, Y)
    x = points(3)
    expected = torch.as_tensor(model.predict(x.numpy()))
    assert error(hessquik.from_sklearn(model)(x)[0].detach(), expected[:, None]) <= TOLERANCE


def halved(x, y):
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401 makes the class
    from sklearn.model_selection import HalvingGridSearchCV

    return HalvingGridSearchCV(Ridge(), {"alpha": [1.0, 2.0]}, cv=2).fit(x, y)


#: Fitted estimators that the random ones do not have.
OTHERS = {
    "a constant": lambda x, y: DummyRegressor().fit(x, y),
    "a frozen one": lambda x, y: FrozenEstimator(Ridge().fit(x, y)),
    "a random search": lambda x, y: RandomizedSearchCV(KernelRidge(kernel="rbf"), {"gamma": [0.1]}, n_iter=1).fit(
        x, y
    ),
    "a halving search": halved,
    "weighted transformers": lambda x, y: make_pipeline(
        FeatureUnion([("a", StandardScaler()), ("b", "passthrough")], transformer_weights={"a": 2.0}), SVR(gamma=0.1)
    ).fit(x, y),
    "columns without others": lambda x, y: make_pipeline(
        ColumnTransformer([("a", MinMaxScaler(), [2, 0]), ("b", "drop", [1])]), SVR(gamma=0.1)
    ).fit(x, y),
    "missing numbers": lambda x, y: make_pipeline(SimpleImputer(), SVR(gamma=0.1)).fit(x, y),
    "components in parts": lambda x, y: make_pipeline(IncrementalPCA(2, whiten=True), SVR(gamma=0.1)).fit(x, y),
    "components in float32": lambda x, y: make_pipeline(PCA(whiten=True), SVR(gamma=0.1)).fit(
        x.astype(np.float32), y.astype(np.float32)
    ),
    "a random projection": lambda x, y: make_pipeline(SparseRandomProjection(2, random_state=0), SVR(gamma=0.1)).fit(
        x, y
    ),
    "canonical correlations": lambda x, y: CCA(1).fit(x, y),
    "numbers of a kernel": lambda x, y: make_pipeline(
        Nystroem("poly", kernel_params={"degree": 2, "gamma": 0.1, "coef0": 2}, n_components=3, random_state=0),
        Ridge(),
    ).fit(x, y),
    "no support vectors": lambda x, y: SVR(epsilon=100.0).fit(x, y),
    "a kernel by default": lambda x, y: KernelRidge(kernel="polynomial").fit(x, y),
    "a gamma link": lambda x, y: GammaRegressor().fit(x, y),
    "kernels of a scaled target": lambda x, y: TransformedTargetRegressor(
        NuSVR(), transformer=make_pipeline(None, StandardScaler())
    ).fit(x, y),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_estimators_against_their_predictions(name):
    """Gradients are compared with central differences of predictions."""
    model, x, h = OTHERS[name](X, Y), points(3), 1e-5
    value, gradient, _ = hessquik.from_sklearn(model)(x, True, True)

    def predicted(at):
        return torch.as_tensor(model.predict(at.numpy())).reshape(len(at), -1)

    assert error(value.detach(), predicted(x)) <= TOLERANCE
    steps = h * torch.eye(3, dtype=torch.float64)
    differences = torch.stack([(predicted(x + step) - predicted(x - step)) / (2 * h) for step in steps], 1)
    assert error(gradient.detach(), differences) <= 1e-7


def test_a_process_without_noise_is_imported_though_its_weights_cancel():
    x = np.random.default_rng(0).uniform(-2.0, 2.0, (200, 3))
    model = GaussianProcessRegressor(RBF(2.0), optimizer=None).fit(x, np.sin(x.sum(1)))
    assert np.abs(model.alpha_).sum() > 1e5
    points = torch.as_tensor(x[:3])
    value, gradient, _ = hessquik.from_sklearn(model)(points, True, True)
    total = points.sum(1)
    assert error(value.detach(), total.sin()[:, None]) <= 1e-5
    assert error(gradient.detach(), total.cos()[:, None, None].expand(3, 3, 1)) <= 1e-2, "as the model fits its data"


def test_a_logarithm_of_the_inputs_needs_bounds():
    model = make_pipeline(FunctionTransformer(np.log), Ridge()).fit(np.abs(X) + 0.1, Y)
    with pytest.raises(UnsupportedError, match=r"gives NaN or infinity at points .*; pass bounds"):
        hessquik.from_sklearn(model)
    network = hessquik.from_sklearn(model, bounds=([1.0] * 3, [5.0] * 3))
    x = points(3).abs() + 0.1
    assert worst_error(network, lambda u: _plane(model[-1], u.log()), x) <= TOLERANCE
