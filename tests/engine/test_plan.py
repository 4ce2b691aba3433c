"""The planner's choices, which follow from counting; what steps are fused, placed and shared; what a plan prints."""

import random
from dataclasses import replace

import pytest
import torch

from hessquik import Evaluator, passes
from hessquik.activations import tanhActivation
from hessquik.backends.choice import Kernel
from hessquik.layers import quadraticICNNLayer, resnetLayer, singleLayer
from hessquik.networks import ICNN, NN
from hessquik.plan import least_operations
from hessquik.quantities import QUANTITIES
from hessquik.steps import Congruence, Contract, Map, Product, SumProducts
from hessquik.strided import Space
from tests.engine import random_networks as draws
from tests.test_layering import ROOT

TANH = tanhActivation()
ALL_SECOND = ("value", "gradient", "hessian")


def network(d, w, m):
    return NN(singleLayer(d, w, TANH), resnetLayer(w, 0.5, TANH), resnetLayer(w, 0.5, TANH), singleLayer(w, m))


@pytest.mark.parametrize(
    ("net", "quantities", "start", "mode"),
    [
        pytest.param(network(10, 64, 1), ALL_SECOND, "x", "backward", id="d below w, one output"),
        pytest.param(network(256, 16, 1), ALL_SECOND, "reduced", "backward", id="d above w"),
        pytest.param(network(10, 400, 1), ("laplacian",), "x", "forward", id="Laplacian, one reading of matrices"),
        pytest.param(network(256, 16, 1), ("laplacian",), "reduced", "forward", id="Laplacian, d above w"),
        pytest.param(network(2, 32, 64), ALL_SECOND, "x", "forward", id="two inputs, many outputs"),
        pytest.param(network(10, 64, 1), ("value",), "x", "backward", id="value alone"),
    ],
)
def test_the_cheapest_way_is_chosen(net, quantities, start, mode):
    plan = Evaluator(net).plan(quantities)
    assert (plan.start, plan.mode) == (start, mode)


def kinds(quantities, **given):
    plan = Evaluator(network(10, 32, 3)).plan(quantities, **given)
    return {type(step) for step in plan.program.steps}, plan


def test_nothing_is_computed_that_was_not_asked():
    found, value = kinds(("value",))
    assert found == {Product, Map}
    found, laplacian = kinds(("laplacian",))
    assert Congruence not in found
    _, hessian = kinds(("hessian",))
    assert value.operations < laplacian.operations < hessian.operations
    _, weighted = kinds(("hessian",), weights=(3,))
    assert weighted.operations < hessian.operations


@pytest.mark.parametrize("d", [2, 10, 256])
@pytest.mark.parametrize("weights", [None, (3,)])
def test_a_packed_hessian_costs_copies_and_no_second_pass(d, weights):
    evaluate = Evaluator(network(d, 32, 3))
    packed, whole = (evaluate.plan((name,), weights) for name in ("hessian_packed", "hessian"))
    both = evaluate.plan(("hessian", "hessian_packed"), weights)
    assert packed.operations == both.operations == whole.operations

    def copies(plan):
        return [step for step in plan.program.steps if isinstance(step, Map) and not step.instructions]

    def computed(plan):
        return [type(step) for step in plan.program.steps if not isinstance(step, Map) or step.instructions]

    assert computed(packed) == computed(both) == computed(whole)
    assert len(copies(both)) <= len(copies(whole)) + d


def test_a_packed_hessian_of_forward_mode_is_what_it_carries():
    plan = Evaluator(network(2, 32, 64)).plan(("hessian_packed",))
    assert plan.mode == "forward"
    assert not any(isinstance(step, Map) and not step.instructions for step in plan.program.steps)


@pytest.mark.parametrize(
    ("m", "k", "quantity", "mode"),
    [
        pytest.param(1, 4, "jvp", "backward", id="Jv, one output"),
        pytest.param(32, 1, "jvp", "forward", id="Jv, many outputs"),
        pytest.param(1, 4, "curvature", "backward", id="curvature, one output"),
        pytest.param(32, 1, "curvature", "forward", id="curvature, many outputs"),
        pytest.param(32, 1, "hvp", "backward", id="Hv"),
    ],
)
def test_directions_are_carried_forward_where_that_is_less_than_the_adjoints(m, k, quantity, mode):
    assert Evaluator(network(10, 64, m)).plan((quantity,), directions=(k, 10)).mode == mode


def test_jv_of_one_output_hardly_costs_more_in_more_directions():
    one, many = (Evaluator(network(10, 64, 1)).plan(("jvp",), directions=(k, 10)).operations for k in (2, 8))
    assert many < 1.02 * one


@pytest.mark.parametrize("quantity", ["jvp", "hvp", "curvature"])
def test_what_all_rows_share_is_computed_once(quantity):
    evaluate = Evaluator(network(10, 32, 40))  # so many outputs that Jv is carried forward
    shared = evaluate.plan((quantity,), directions=(3, 10)).program
    own = evaluate.plan((quantity,), directions=(7, 3, 10)).program

    def products_of_directions(steps):
        return [step for step in steps if isinstance(step, Product) and step.a.buffer.name == "directions"]

    assert len(products_of_directions(shared.once)) == 1
    assert not products_of_directions(shared.steps)
    assert len(products_of_directions(own.steps)) == 1
    assert not products_of_directions(own.once)
    assert own.operations > shared.operations


@pytest.mark.parametrize("quantity", [*QUANTITIES, ("value", "hvp")])
def test_every_step_is_for_something(quantity):
    quantities = (quantity,) if isinstance(quantity, str) else quantity
    for net in (network(10, 32, 3), NN(ICNN(6, [None, 8, 8]), quadraticICNNLayer(6, 8, 4))):
        evaluate = Evaluator(net)
        program = evaluate.plan(quantities, directions=(2, evaluate.d)).program
        steps = (*program.once, *program.steps)
        read = {id(view.buffer) for step in steps for view in step.reads()}
        for step in steps:
            for view in step.writes():
                assert view.buffer.name in quantities or id(view.buffer) in read, str(step)


def test_adjoints_of_x_and_the_last_value_are_not_computed_for_a_laplacian():
    evaluate = Evaluator(network(10, 32, 1))
    program = evaluate.plan(("laplacian",)).program
    products = [step for step in program.steps if isinstance(step, Product)]
    assert not [step for step in products if step.a.shape[1] == 1 and step.b.shape[2] == 10]
    scalars = [step for step in products if step.a.shape[1] == 1 and step.b.shape[2] == 1]
    assert all(view.buffer.name == "laplacian" for step in scalars for view in step.writes())


def test_scalings_and_biases_are_part_of_the_products_that_they_follow():
    """A first layer is the exception, since its tangents are constant."""
    program = Evaluator(network(10, 32, 1)).plan(("hvp",), directions=(2, 10)).program
    tangents = [step for step in program.steps if isinstance(step, Product) and step.a.shape[1] == 2]
    assert [step.scaling is not None for step in tangents].count(True) >= 3
    assert any(step.scaling is not None and step.scaling.add_by is not None for step in tangents)
    hidden = [step for step in program.steps if isinstance(step, Product) and step.b.shape[1:] == (32, 32)]
    forward = [step for step in hidden if step.a.shape[1] == 1 and step.scaling is None]
    assert forward
    assert all(step.add is not None for step in forward[:2])
    wide = [step for step in program.steps if isinstance(step, Map) and step.shape[1] == 2 and step.instructions]
    assert len(wide) <= 5


def test_the_steps_of_a_network_are_few():
    """Each of five hidden layers has a product and a map for the value, one step for tangents, two for adjoints.

    One congruence is added.
    """
    layers = [singleLayer(10, 64, TANH), *(singleLayer(64, 64, TANH) for _ in range(4)), singleLayer(64, 1)]
    program = Evaluator(NN(*layers)).plan(ALL_SECOND).program
    assert len(program.steps) <= 6 * 5 + 3
    assert sum(isinstance(step, Congruence) for step in program.steps) == 1
    assert not any(isinstance(step, Contract | SumProducts) for step in program.steps)


def test_a_laplacians_cost_hardly_grows_with_the_inputs():
    narrow, wide = (Evaluator(network(d, 16, 1)).plan(("laplacian",)).operations for d in (64, 1024))
    value = 2 * 16 * 1024
    assert wide < narrow + 3 * value


def test_results_are_written_where_they_are_wanted():
    program = Evaluator(network(10, 32, 1)).plan(ALL_SECOND).program
    copies = [step for step in program.steps if isinstance(step, Map) and not step.instructions]
    assert not copies
    written = {view.buffer.name for step in program.steps for view in step.writes() if view.buffer.name}
    assert written == set(ALL_SECOND)


def test_arrays_that_live_at_once_do_not_overlap():
    for net in (network(10, 32, 3), network(2, 16, 20), network(40, 8, 2)):
        evaluate = Evaluator(net)
        program = evaluate.plan((*ALL_SECOND, "laplacian", "hvp", "curvature"), directions=(2, evaluate.d)).program
        lives = {}
        for place, step in enumerate(program.steps):
            for view in (*step.reads(), *step.writes()):
                if view.buffer.space is Space.TILE:
                    first, _, buffer = lives.get(id(view.buffer), (place, place, view.buffer))
                    lives[id(view.buffer)] = (first, place, buffer)
        arrays = list(lives.values())
        for i, (begin, end, one) in enumerate(arrays):
            assert one.offset + one.size <= program.tile_size
            for start, stop, other in arrays[i + 1 :]:
                if begin <= stop and start <= end:
                    assert one.offset + one.size <= other.offset or other.offset + other.size <= one.offset


def test_a_plan_says_what_it_does():
    plan = Evaluator(network(10, 32, 3)).plan(("hvp",), directions=(2, 10))
    text = str(plan)
    assert text.startswith("hvp: backward, tangents from x")
    assert f"{plan.operations} operations and {plan.bytes} bytes a row" in text
    assert "product      " in text
    assert "map          " in text


def test_the_worked_example_of_the_architecture_page_is_what_is_printed():
    plan = Evaluator(NN(singleLayer(3, 8, TANH), singleLayer(8, 1))).plan(("laplacian",))
    page = (ROOT / "ARCHITECTURE.md").read_text()
    assert str(replace(plan, kernel=Kernel.CPU)) in page
    assert str(plan.graph) in page


def test_workspaces_stay_small():
    for net in (network(10, 64, 1), network(100, 128, 4), network(1024, 16, 1), network(50, 768, 1)):
        plan = Evaluator(net, dtype=torch.float64).plan(ALL_SECOND)
        assert plan.rows * plan.program.tile_size * 8 <= 32 << 20


def test_plans_and_bits_are_the_same_after_a_restart():
    net, x = network(40, 16, 2), torch.randn(9, 40)
    first, second = Evaluator(net), Evaluator(net)
    assert str(first.plan(ALL_SECOND)) == str(second.plan(ALL_SECOND))
    assert torch.equal(first(x, ALL_SECOND).hessian, second(x, ALL_SECOND).hessian)


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_takes_fewer_operations_than_the_sizes_say(seed):
    draw = random.Random(seed)
    net = draws.network(draw, *draws.shapes()[seed % 16])
    evaluate = Evaluator(net)
    for name, quantity in QUANTITIES.items():
        for weights in (None, (1, evaluate.m)):
            directions = (1, 3, evaluate.d) if quantity.is_directional else None
            ask = evaluate._ask((name,), weights, directions)
            least = least_operations(evaluate._forms, ask, evaluate.m)
            assert least <= evaluate.operations((name,), weights, directions), (name, weights)
            assert not least or evaluate.exceeds(least - 1, (name,), weights, directions)


def test_products_with_unit_vectors_and_zeros_are_not_computed(monkeypatch):
    """For d inputs they would take as long as d points; planning is linear in the weights."""
    folded, fold = [], passes.operations.fold
    monkeypatch.setattr(passes.operations, "fold", lambda node, inputs: folded.append(node.op) or fold(node, inputs))
    evaluate = Evaluator(NN(singleLayer(30, 30, tanhActivation()), singleLayer(30, 30, tanhActivation())))
    for quantities in (("value", "gradient", "hessian"), ("laplacian",), ("hessian_diagonal",)):
        evaluate.plan(quantities)
    assert "matmul" not in folded
    assert "mul" in folded  # the squares of the first layer's tangents
