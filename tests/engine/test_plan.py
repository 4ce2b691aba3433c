"""The planner's choices, which follow from counting, and what a plan says about itself."""

import pytest
import torch

from hessquik import Evaluator
from hessquik.activations import tanhActivation
from hessquik.layers import quadraticICNNLayer, resnetLayer, singleLayer
from hessquik.networks import ICNN, NN

TANH = tanhActivation()
ALL_SECOND = ("value", "gradient", "hessian")


def network(d, w, m):
    return NN(singleLayer(d, w, TANH), resnetLayer(w, 0.5, TANH), resnetLayer(w, 0.5, TANH), singleLayer(w, m))


@pytest.mark.parametrize(
    ("net", "quantities", "start", "order"),
    [
        pytest.param(network(10, 64, 1), ALL_SECOND, "x", "backward", id="d below w, one output"),
        pytest.param(network(256, 16, 1), ALL_SECOND, "reduced", "backward", id="d above w"),
        pytest.param(network(10, 128, 1), ("laplacian",), "x", "backward", id="Laplacian, matrices stay in cache"),
        pytest.param(network(10, 400, 1), ("laplacian",), "x", "forward", id="Laplacian, one reading of matrices"),
        pytest.param(network(256, 16, 1), ("laplacian",), "reduced", "backward", id="Laplacian, d above w"),
        pytest.param(network(2, 32, 64), ALL_SECOND, "x", "forward", id="two inputs, many outputs"),
        pytest.param(network(10, 64, 1), ("value",), None, "backward", id="value alone"),
        pytest.param(
            NN(ICNN(64, [None, 8, 8]), quadraticICNNLayer(64, 8, 4)),
            ("laplacian",),
            "reduced",
            "forward",
            id="convex",
        ),
    ],
)
def test_the_cheapest_way_is_chosen(net, quantities, start, order):
    plan = Evaluator(net).plan(quantities)
    assert (plan.start, plan.order) == (start, order)


def steps(quantities, **given):
    plan = Evaluator(network(10, 32, 3)).plan(quantities, **given)
    return {step.operation for step in plan.program.steps}, plan


def test_nothing_is_computed_that_was_not_asked():
    kinds, value = steps(("value",))
    assert kinds == {"multiply", "activate", "scale"}
    kinds, laplacian = steps(("laplacian",))
    assert "congruence" not in kinds
    _, hessian = steps(("hessian",))
    assert value.operations < laplacian.operations < hessian.operations
    _, weighted = steps(("hessian",), weights=(3,))
    assert weighted.operations < hessian.operations


def test_a_laplacians_cost_hardly_grows_with_the_inputs():
    narrow, wide = (Evaluator(network(d, 16, 1)).plan(("laplacian",)).operations for d in (64, 1024))
    value = 2 * 16 * 1024
    assert wide < narrow + 3 * value


def test_a_plan_says_what_it_does():
    plan = Evaluator(network(10, 32, 3)).plan(("hvp",), directions=(2, 10))
    said = str(plan)
    assert said.startswith("hvp: tangents from")
    assert f"{plan.operations} operations and {plan.bytes} bytes a row" in said
    assert "multiply(" in said


def test_workspaces_stay_small():
    for net in (network(10, 64, 1), network(100, 128, 4), network(1024, 16, 1), network(50, 768, 1)):
        plan = Evaluator(net, dtype=torch.float64).plan(ALL_SECOND)
        assert plan.rows * plan.program.workspace * 8 <= 32 << 20


def test_plans_and_bits_are_the_same_after_a_restart():
    net, x = network(40, 16, 2), torch.randn(9, 40)
    first, second = Evaluator(net), Evaluator(net)
    assert str(first.plan(ALL_SECOND)) == str(second.plan(ALL_SECOND))
    assert torch.equal(first(x, ALL_SECOND).hessian, second(x, ALL_SECOND).hessian)
