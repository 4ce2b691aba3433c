"""Random estimators of scikit-learn: values and both derivatives against automatic differentiation in torch."""

import warnings

import numpy as np
import pytest
import torch

import hessquik
from hessquik.errors import UnsupportedError
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
    estimator, d, f = fitted(3, activations=("relu",))
    with pytest.raises(UnsupportedError, match=r"layer0 \(relu\) is linear in pieces.*softplus.*allow_kinks=True"):
        hessquik.from_sklearn(estimator)
    assert worst_error(hessquik.from_sklearn(estimator, allow_kinks=True), f, points(d)) <= TOLERANCE


def test_what_is_no_smooth_function_is_refused_by_its_step():
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler, PolynomialFeatures, QuantileTransformer

    x, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30.0)
    forest = RandomForestRegressor(2)
    cases = [
        (forest, "RandomForestRegressor is no smooth function"),
        (make_pipeline(KNeighborsRegressor()), r"Pipeline.kneighborsregressor \(KNeighborsRegressor\)"),
        (LogisticRegression(), "LogisticRegression is no smooth function"),
        (MLPClassifier(max_iter=1), "MLPClassifier is no smooth function"),
        (make_pipeline(QuantileTransformer(n_quantiles=5), forest), r"\(QuantileTransformer\) is a"),
        (make_pipeline(PolynomialFeatures(), forest), r"PolynomialFeatures\) is a"),
        (make_pipeline(MinMaxScaler(clip=True), forest), "clips its results"),
    ]
    for estimator, message in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator.fit(x, (y > 14).astype(int) if "Log" in message or "Classifier" in message else y)
        with pytest.raises(UnsupportedError, match=message):
            hessquik.from_sklearn(estimator)
    with pytest.raises(UnsupportedError, match="has not been fitted"):
        hessquik.from_sklearn(RandomForestRegressor())
