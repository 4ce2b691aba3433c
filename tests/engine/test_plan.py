"""The planner's choices, which follow from counting, and what a plan says about itself."""

from itertools import pairwise

import pytest
import torch

from hessquik import Evaluator
from hessquik.activations import tanhActivation
from hessquik.calculus import QUANTITIES
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


@pytest.mark.parametrize(
    ("m", "k", "quantity", "order"),
    [
        pytest.param(1, 4, "jvp", "backward", id="Jv, one output"),
        pytest.param(32, 1, "jvp", "forward", id="Jv, many outputs"),
        pytest.param(1, 4, "curvature", "backward", id="curvature, one output"),
        pytest.param(32, 1, "curvature", "forward", id="curvature, many outputs"),
        pytest.param(32, 1, "hvp", "backward", id="Hv"),
    ],
)
def test_directions_are_carried_forward_where_that_is_less_than_the_adjoints(m, k, quantity, order):
    assert Evaluator(network(10, 64, m)).plan((quantity,), directions=(k, 10)).order == order


def test_jv_of_one_output_hardly_costs_more_in_more_directions():
    one, many = (Evaluator(network(10, 64, 1)).plan(("jvp",), directions=(k, 10)).operations for k in (2, 8))
    assert many < 1.02 * one


@pytest.mark.parametrize("quantity", ["jvp", "hvp", "curvature"])
def test_what_all_rows_share_is_computed_once(quantity):
    evaluate = Evaluator(network(10, 32, 40))  # so many outputs that Jv is carried forward
    shared = evaluate.plan((quantity,), directions=(3, 10)).program
    own = evaluate.plan((quantity,), directions=(7, 3, 10)).program
    assert [step.operation for step in shared.once if step.inputs[0].buffer.base == "directions"] == ["multiply"]
    assert not [step for step in own.once if step.inputs[0].buffer.base == "directions"]
    assert own.operations >= shared.operations + 2 * 3 * 10 * 32


@pytest.mark.parametrize("quantity", [*QUANTITIES, ("value", "hvp")])
def test_every_step_is_for_something(quantity):
    quantities = (quantity,) if isinstance(quantity, str) else quantity
    for net in (network(10, 32, 3), NN(ICNN(6, [None, 8, 8]), quadraticICNNLayer(6, 8, 4))):
        evaluate = Evaluator(net)
        program = evaluate.plan(quantities, directions=(2, evaluate.d)).program
        read = {id(view.buffer) for step in program.steps for view in step.inputs if view is not None}
        for step in program.steps:
            written = (step.out, *step.inputs[1:]) if step.operation == "activate" else (step.out,)
            buffers = [view.buffer for view in written if view is not None]
            assert any(buffer.base in quantities or id(buffer) in read for buffer in buffers), str(step)


def test_adjoints_of_x_and_the_last_value_are_not_computed_for_a_laplacian():
    evaluate = Evaluator(network(10, 32, 1))
    shapes = [step.out.shape for step in evaluate.plan(("laplacian",)).program.steps if step.operation == "multiply"]
    assert (1, 1, 10) not in shapes
    assert (1, 1, 1) not in shapes


def test_scalings_follow_what_they_scale():
    """All but those of a first layer, whose tangents are constant, and of what two of them scale."""
    program = Evaluator(network(10, 32, 1)).plan(("hvp",), directions=(2, 10)).program
    for before, step in pairwise(program.steps):
        if step.follows:
            assert step.operation == "scale"
            assert before.operation in {"multiply", "activate"}
            assert not before.follows
            assert step.inputs[0] == before.out
            assert id(step.out.buffer) not in {id(view.buffer) for view in before.views()}
    wide = [step for step in program.steps if step.operation == "scale" and step.out.shape[1] == 2]
    assert [step.follows for step in wide].count(False) == 2


def test_what_only_a_following_step_reads_is_not_moved():
    program = Evaluator(network(10, 32, 1)).plan(("value",)).program
    passing = [step for step in program.steps if not step.is_read]
    assert {step.operation for step in passing} == {"multiply", "activate"}
    for step in passing:
        assert step.out not in step.moved()
    follower = next(step for step in program.steps if step.follows)
    assert follower.inputs[0] not in follower.moved()


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
