"""The proof of a network's derivatives passes what is right and refuses every wrong quantity."""

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch

from hessquik import Evaluator, calculus, load, proof
from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import ACTIVATIONS, expActivation, sinActivation, softplusActivation, tanhActivation
from hessquik.architecture import TYPES
from hessquik.calculus import QUANTITIES
from hessquik.errors import DerivativeError
from hessquik.layers.base import hessQuikLayer
from hessquik.layers.form import Form, Linearization
from hessquik.proof import Row, prove, prove_quickly
from hessquik.reference import LAYERS, SIGMA
from tests.engine import random_networks as draws
from tests.test_layering import ROOT
from tests.whole import choose


def network():
    torch.manual_seed(0)
    return net.NN(lay.singleLayer(4, 6, tanhActivation()), net.resnetNN(6, 2, 0.5), lay.singleLayer(6, 3))


@pytest.fixture(scope="module")
def planned():
    """Return a network with the Evaluators that proofs of it have made, by their arguments."""
    return network().double(), {}


@pytest.fixture
def prove_planned(planned, monkeypatch):
    """Return :func:`prove` of that network, which plans once and not for each proof."""
    f, evaluators = planned

    def evaluator(of, **arguments):
        assert of is f
        key = tuple(sorted(arguments.items(), key=str))
        if key not in evaluators:
            evaluators[key] = Evaluator(of, **arguments)
        return evaluators[key]

    def prove_it(**arguments):
        with monkeypatch.context() as patch:
            patch.setattr(proof, "Evaluator", evaluator)
            return prove(f, **arguments)

    return prove_it


def failed(rows):
    return {(row.quantity, row.computed_by, row.reference) for row in rows if not row.passed}


@pytest.mark.slow
def test_right_networks_pass():
    for seed in range(choose(3, 24)):
        draw = random.Random(seed)
        f = draws.tame(draws.network(draw, *draws.shapes()[seed % 16]), seed, scale=0.3)
        assert failed(prove(f, seed=seed)) == set(), seed
        prove_quickly(f)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.whole] if "ensemble" in path.stem else [], id=path.stem)
        for path in sorted((ROOT / "models").glob("**/*.safetensors"))
    ],
)
def test_shipped_models_pass(path):
    assert failed(prove(load(path))) == set()


def test_bounds_say_where_points_and_steps_are():
    """A network for inputs of about 10⁶ is curved there and not near 0; with its bounds it passes."""
    f = net.fullyConnectedNN([2, 8, 1], tanhActivation(), dtype=torch.float64)
    with torch.no_grad():
        f[0].K.div_(1e6)
    rows = prove(f, [1e6, -3e6], [5e6, 2e6])
    assert failed(rows) == set()
    prove_quickly(f, [1e6, -3e6], [5e6, 2e6])


@pytest.mark.slow
def test_the_network_is_left_as_it_was():
    f = network()
    before = {name: tensor.clone() for name, tensor in f.state_dict().items()}
    prove(f)
    assert all(torch.equal(tensor, before[name]) for name, tensor in f.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in f.parameters())
    assert all(parameter.dtype is torch.float32 for parameter in f.parameters())


@pytest.mark.slow
def test_the_rows_are_the_same_every_time(planned, prove_planned):
    rows = prove_planned()
    assert prove(planned[0]) == rows
    assert prove_planned(seed=1) != rows


def test_a_proof_holds_nothing_of_the_network():
    """Not even until garbage is collected: the weights of a model that is unloaded are freed at once."""
    f = network()
    alive = [weakref.ref(f), *map(weakref.ref, f.parameters())]
    gc.disable()
    try:
        evaluate = Evaluator(f, owned=True)
        prove_quickly(f, evaluate=evaluate)
        del f, evaluate
        assert [one() for one in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_networks_in_inference_mode_are_proven_too():
    with torch.inference_mode():
        prove_quickly(network())


@pytest.mark.parametrize(
    "change", [lambda t: 1.0001 * t, lambda t: -t, lambda t: t * torch.nan], ids=["off", "negative", "nan"]
)
@pytest.mark.parametrize("quantity", calculus.QUANTITIES)
def test_each_wrong_quantity_is_refused(quantity, change, planned, prove_planned, monkeypatch):
    right = Evaluator.__call__

    def wrong(self, *arguments, **keywords):
        found = right(self, *arguments, **keywords)
        changed = {name: getattr(found, name) for name in calculus.QUANTITIES}
        if changed[quantity] is not None:
            changed[quantity] = change(changed[quantity])
        return calculus.Derivatives(**changed)

    monkeypatch.setattr(Evaluator, "__call__", wrong)
    if change(torch.ones(1)) == 1.0001:
        assert {row.quantity for row in prove_planned() if not row.passed} == {quantity}
    with pytest.raises(DerivativeError, match=rf"got {quantity} \(relative error"):
        prove_quickly(planned[0])


def test_a_wrong_hessian_of_a_network_that_is_zero_is_refused(monkeypatch):
    """The network is zero, so there is no size that the error could be relative to."""
    f = network()
    for parameter in f.parameters():
        torch.nn.init.zeros_(parameter)
    prove_quickly(f)
    right = Evaluator.__call__

    def wrong(self, *arguments, **keywords):
        found = right(self, *arguments, **keywords)
        kept = {name: getattr(found, name) for name in QUANTITIES if getattr(found, name) is not None}
        return calculus.Derivatives(**(kept | {"hessian": kept["hessian"] + 1.0} if "hessian" in kept else kept))

    monkeypatch.setattr(Evaluator, "__call__", wrong)
    with pytest.raises(DerivativeError, match="hessian"):
        prove_quickly(f)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", proof.backends())
def test_each_wrong_backend_is_refused(backend, dtype, prove_planned, monkeypatch):
    """One backend gives wrong Hessians in one dtype: its rows fail, and those of the others pass."""
    right = Evaluator.__call__

    def wrong(self, *arguments, **keywords):
        found = right(self, *arguments, **keywords)
        if found.hessian is not None and self.dtype == dtype and self.backend == backend:
            found.hessian[:, 0, 0] *= 1.01
        return found

    monkeypatch.setattr(Evaluator, "__call__", wrong)
    expected = f"{backend}, {str(dtype).removeprefix('torch.')}"
    assert {(row.quantity, row.computed_by) for row in prove_planned() if not row.passed} == {("hessian", expected)}


def test_every_backend_of_this_machine_is_proven(prove_planned):
    rows = prove_planned()
    proven = {row.computed_by for row in rows if row.reference == "autograd"}
    assert proven == {f"{backend}, {dtype}" for backend in proof.backends() for dtype in ("float32", "float64")}
    for computed_by in proven:
        assert {row.quantity for row in rows if row.computed_by == computed_by} == set(calculus.QUANTITIES) | {
            "value"
        }


def test_the_evaluator_that_is_given_is_the_one_that_is_proven(monkeypatch):
    f = network()
    evaluate = Evaluator(f)
    prove_quickly(f, evaluate=evaluate)
    with torch.no_grad():
        f[0].K.mul_(1.01)  # the Evaluator keeps the old weights
    with pytest.raises(DerivativeError):
        prove_quickly(f, evaluate=evaluate)
    prove_quickly(f)


@pytest.mark.parametrize("flushes", [False, True], ids=["denormal numbers", "without denormal numbers"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_results_that_are_not_finite_are_refused(dtype, flushes):
    """softplus with β = 1e-320 is ∞ at the points; so is a sum of exponentials beyond 709."""
    f = net.fullyConnectedNN([2, 4, 1], softplusActivation(1e-320), dtype=dtype)
    with torch.no_grad():
        f[1].K.abs_()  # a sum of -∞ alone would pass softplus as 0
    torch.set_flush_denormal(flushes)
    try:
        with pytest.raises(DerivativeError, match="value"):
            prove_quickly(f)
    finally:
        torch.set_flush_denormal(False)


def test_what_overflows_in_float32_only_is_refused_in_float32_only():
    f = net.fullyConnectedNN([2, 4, 1], expActivation(), dtype=torch.float64)
    with torch.no_grad():
        f[1].K.fill_(0.0)
        f[1].b.fill_(100.0)
        f[1].K[0, 0] = 1e-3
    prove_quickly(f)
    with pytest.raises(DerivativeError):
        prove_quickly(f, evaluate=Evaluator(f, dtype=torch.float32))


def test_single_precision_is_judged_by_what_single_precision_can():
    """A steep network has errors of 1e-2 in float32 with any formula; a wrong formula has larger ones."""
    f = net.fullyConnectedNN([2, 6, 1], sinActivation(), dtype=torch.float32)
    with torch.no_grad():
        f[0].K.mul_(3e4)
    prove_quickly(f)


def test_scales_far_apart_do_not_hide_a_wrong_laplacian(monkeypatch):
    f = net.fullyConnectedNN([2, 8, 1], tanhActivation(), dtype=torch.float64)
    with torch.no_grad():
        f[0].K.div_(1e6)
    right = Evaluator.__call__

    def wrong(self, *arguments, **keywords):
        found = right(self, *arguments, **keywords)
        kept = {name: getattr(found, name) for name in QUANTITIES if getattr(found, name) is not None}
        if found.laplacian is not None:
            kept["laplacian"] = 1.001 * found.laplacian
        return type(found)(**kept)

    monkeypatch.setattr(Evaluator, "__call__", wrong)
    with pytest.raises(DerivativeError, match="laplacian"):
        prove_quickly(f, [-1e6, -1e6], [1e6, 1e6])


@pytest.mark.parametrize("step", [1, 2, 5])
def test_many_inputs_are_differentiated_in_parts(step, monkeypatch):
    f = net.fullyConnectedNN([7, 5, 2], tanhActivation(), dtype=torch.float64)
    monkeypatch.setattr(proof, "MAX_BYTES", 8 * 2 * 7 * 8 * step)
    prove_quickly(f)


@pytest.mark.slow
def test_a_hessian_that_is_too_large_is_left_out(monkeypatch):
    f = net.fullyConnectedNN([7, 5, 2], tanhActivation(), dtype=torch.float64)
    monkeypatch.setattr(proof, "MAX_BYTES", 100)
    proven = {row.quantity for row in prove(f) if row.reference == "autograd"}
    assert proven == set(calculus.QUANTITIES) - {"hessian", "hessian_packed"}


class ownLayer(hessQuikLayer):
    """y = u + sin(2u)."""

    def __init__(self, act=None):
        super().__init__()
        self.act = sinActivation() if act is None else act

    def form(self):
        return Form(self.act, (3,), into=(2.0,), skip=(1.0,))

    def input_widths(self):
        return (3,)

    output_widths = input_widths


@pytest.mark.slow
def test_what_is_user_defined_is_named():
    rows = prove(net.NN(lay.singleLayer(2, 3, wrongSlope()), ownLayer(), lay.singleLayer(3, 1)).double())
    references = {row.reference for row in rows if row.computed_by.startswith("torch")}
    assert references == {"autograd of the own forward of ownLayer, wrongSlope", "the same rows alone"}
    assert "gradient" in {row.quantity for row in rows if not row.passed}  # of wrongSlope
    rows = prove(net.NN(ownLayer(), lay.singleLayer(3, 1)).double())
    assert all(row.passed for row in rows)


@pytest.mark.slow
def test_a_function_of_ones_own_that_makes_weights_positive_is_followed():
    f = net.NN(net.ICNN(3, [None, 4, 2]), lay.quadraticICNNLayer(3, 2, 1)).double()
    f[0][1].nonneg = torch.square
    f[1].nonneg = torch.exp
    assert failed(prove(f)) == set()


def test_the_reference_knows_nothing_of_forms(monkeypatch):
    """The reference is the same if every form is wrong while it is computed."""
    right = Form.linearize

    def linearize(self, features, order):
        here = right(self, features, order)
        return replace(here, value=(2.0 * here.value[0], *here.value[1:]))

    f = network().double()
    monkeypatch.setattr(Form, "linearize", linearize)
    trial = proof._set_up(f, torch.float64, None, None, samples=2, seed=0)
    monkeypatch.undo()
    torch.testing.assert_close(trial.expected["value"], trial.value(trial.x))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_reference_has_every_activation(name):
    """Its values and first two derivatives are those of the documented formulas, also at large arguments."""
    act = ACTIVATIONS[name]()
    z = torch.linspace(-30.1, 30.2, 121, dtype=torch.float64).requires_grad_()
    value = SIGMA[name](z, act)
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    second = torch.autograd.grad(slope.sum(), z)[0] if slope.requires_grad else torch.zeros_like(z)
    for got, expected in zip((value, slope, second), act(z, do_gradient=True, do_Hessian=True), strict=True):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


def test_the_reference_has_every_layer():
    assert SIGMA.keys() == ACTIVATIONS.keys()
    assert LAYERS.keys() == {name for name, kind in TYPES.items() if issubclass(kind, hessQuikLayer)}


class wrongSlope(tanhActivation):
    def compute_derivatives(self, *args, do_Hessian=False):
        dsigma, d2sigma = super().compute_derivatives(*args, do_Hessian=do_Hessian)
        return 1.001 * dsigma, d2sigma


class wrongCurvature(tanhActivation):
    def compute_derivatives(self, *args, do_Hessian=False):
        dsigma, d2sigma = super().compute_derivatives(*args, do_Hessian=do_Hessian)
        return dsigma, None if d2sigma is None else 1.001 * d2sigma


@pytest.mark.parametrize(
    ("act", "first_order_too"), [(wrongSlope, True), (wrongCurvature, False)], ids=["slope", "curvature"]
)
def test_a_wrong_activation_is_refused_by_every_reference(act, first_order_too):
    f = net.fullyConnectedNN([3, 6, 2], act(), dtype=torch.float64)
    torch.manual_seed(0)
    rows = failed(prove(f))
    own = f"autograd of the own forward of {act.__name__}"
    for backend in proof.backends():
        assert ("hessian", f"{backend}, float64", own) in rows
        assert ("hessian", f"{backend}, float32", own) in rows
        assert (("gradient", f"{backend}, float64", own) in rows) is first_order_too
    assert ("hessian", "forward mode", "Taylor") in rows
    assert ("hessian", "backward mode", "Taylor") in rows
    assert ("curvature", "forward mode", "finite differences") in rows
    assert (("gradient", "forward mode", "finite differences") in rows) is first_order_too
    with pytest.raises(DerivativeError, match=r"within 1e-08 of automatic differentiation in float64, got .*hessian"):
        prove_quickly(f)


def test_a_layer_that_carries_derivatives_wrongly_is_refused(prove_planned, monkeypatch):
    assert failed(prove_planned()) == set()  # the Evaluators are planned, with the right layer
    right = Linearization.push

    def push(self, du):
        dz, dy = right(self, du)
        return 1.01 * dz, dy

    monkeypatch.setattr(Linearization, "push", push)
    assert ("hessian", "backward mode", "Taylor") in failed(prove_planned())


def test_what_is_not_finite_is_refused():
    f = net.fullyConnectedNN([2, 4, 1], softplusActivation(), dtype=torch.float64)
    with torch.no_grad():
        f[1].K.fill_(1e300)
        f[0].K.fill_(1e300)
    with pytest.raises(DerivativeError, match="nan"):
        prove_quickly(f)


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (Row("gradient", "torch, float64", "autograd", "relative error", 1e-9, 1e-8), True),
        (Row("gradient", "torch, float64", "autograd", "relative error", 1e-7, 1e-8), False),
        (Row("gradient", "torch, float64", "autograd", "relative error", float("nan"), 1e-8), False),
        (Row("gradient", "forward mode", "Taylor", "order", 2.0, 1.9), True),
        (Row("gradient", "forward mode", "Taylor", "order", 1.0, 1.9), False),
        (Row("gradient", "forward mode", "Taylor", "order", float("nan"), 1.9), False),
    ],
)
def test_rows_judge_by_their_measure(row, passed):
    assert row.passed is passed


def wide():
    """Return a network with more inputs than axes that are compared under :func:`few_operations`."""
    torch.manual_seed(3)
    return net.NN(
        lay.singleLayer(20, 12, tanhActivation()), net.resnetNN(12, 1, 0.5), lay.singleLayer(12, 4)
    ).double()


@pytest.fixture
def few_operations(monkeypatch):
    """Let the proof spend so few operations that only quantities of cheap calls are compared unasked."""
    monkeypatch.setattr(proof, "QUICK_OPERATIONS", 2e4)


def spoil(monkeypatch, quantity, change):
    """Make every Evaluator return another result for a quantity; return the calls, as they come."""
    right, calls = Evaluator.__call__, []

    def wrong(self, x, quantities=("value",), weights=None, directions=None, **keywords):
        calls.append((tuple(quantities), weights is not None, len(x)))
        found = right(self, x, quantities, weights, directions, **keywords)
        kept = {name: getattr(found, name) for name in quantities}
        return calculus.Derivatives(**kept | ({quantity: change(kept[quantity])} if quantity in kept else {}))

    monkeypatch.setattr(Evaluator, "__call__", wrong)
    return calls


def test_what_takes_many_operations_is_left_out_and_named(few_operations, monkeypatch):
    calls = spoil(monkeypatch, "", None)
    f = wide()
    left_out = prove_quickly(f, evaluate=(evaluate := Evaluator(f)))
    compared = {(name, is_weighted) for names, is_weighted, _ in calls for name in names}
    assert left_out == {(name, w) for name in QUANTITIES for w in (False, True)} - compared - {
        (name, True) for name, is_weighted in compared if not is_weighted
    }
    assert {("hessian", False), ("hessian", True), ("laplacian", False), ("hvp", False)} <= left_out
    assert {("value", False), ("gradient", False), ("laplacian", True), ("hvp", True)} <= compared
    for names, is_weighted, n in calls:
        directions = (n, proof.DIRECTIONS, f.dim_input())
        assert n * evaluate.operations(names, (n, 4) if is_weighted else None, directions) <= proof.QUICK_OPERATIONS


@pytest.mark.parametrize("is_weighted", [False, True])
def test_what_was_left_out_is_compared_when_it_is_asked_for(is_weighted, few_operations, monkeypatch):
    f = wide()
    evaluate = Evaluator(f)
    for quantity in QUANTITIES:
        asked = [(quantity, is_weighted)]
        assert prove_quickly(f, evaluate=evaluate, asked=asked) == frozenset()
        with monkeypatch.context() as patch:
            calls = spoil(patch, quantity, lambda result: 1.001 * result)
            with pytest.raises(DerivativeError, match=f"got {quantity} "):
                prove_quickly(f, evaluate=evaluate, asked=asked)
        assert {(names, w) for names, w, _ in calls} <= {
            ((name,), is_weighted) for name in (quantity, "hessian_diagonal")
        }


def test_second_derivatives_are_compared_along_some_of_many_axes(few_operations, monkeypatch):
    """The first and the last are among them; the proof counts with all others by the directions and the Laplacian."""
    f = wide()
    evaluate = Evaluator(f)
    trial = proof._set_up(f, torch.float64, None, None, samples=2, seed=0, operations=proof.QUICK_OPERATIONS)
    axes = trial.axes.tolist()
    assert len(axes) == proof.FEWEST_AXES < 20
    assert {0, 19} < set(axes)
    for axis in range(20):
        with monkeypatch.context() as patch:
            spoil(
                patch, "hessian_diagonal", lambda result, axis=axis: result.index_fill(1, torch.tensor([axis]), 9.0)
            )
            with pytest.raises(DerivativeError):
                prove_quickly(f, evaluate=evaluate, asked=[("laplacian", False)])


def test_a_large_network_is_compared_at_one_point(monkeypatch):
    monkeypatch.setattr(proof, "MANY_PARAMETERS", 100)
    calls = spoil(monkeypatch, "", None)
    prove_quickly(wide())
    assert {n for _, _, n in calls} == {1}
