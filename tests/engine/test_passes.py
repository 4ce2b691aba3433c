"""Tracing and passes: every rule alone keeps the results and has the effect that its name states."""

import contextlib
import itertools
import random

import pytest
import torch

from hessquik import calculus, passes
from hessquik.activations import ACTIVATIONS
from hessquik.calculus import Backward, Forward, Unavailable
from hessquik.errors import TraceError
from hessquik.graph import Builder
from hessquik.layout import lay_out
from hessquik.operations import compute_node
from hessquik.plan import Ask, trace
from hessquik.quantities import QUANTITIES
from hessquik.trace import Array
from tests.engine import random_networks as draws
from tests.engine.step_reference import interpret

#: Rounding of float64, relative to the largest entry; sums are taken in another order.
BOUND = 1e-10


def run(graph, inputs):
    """Compute a graph node by node and return its results, (rows, …) or (1, …)."""
    values = []
    for node in graph.nodes:
        if node.op == "constant":
            values.append(node.data.double().unsqueeze(0))
        elif node.op == "input":
            values.append(inputs[node.arguments[0]])
        else:
            values.append(compute_node(node, [values[i] for i in node.inputs]))
    return {name: values[i] for name, i in graph.outputs.items()}


def only(*rules):
    """Return the table of rules without all others."""
    return {op: tuple(rule for rule in tried if rule in rules) for op, tried in passes.RULES.items()}


def graph_of(*inputs, rules=(), **outputs):
    """Return the graph of functions of arrays, such as ``graph_of(("z", (1, 3)), y=lambda z: z + 0)``."""
    builder = Builder(only(*rules))
    arrays = [Array(builder, builder.input(name, shape)) for name, shape in inputs]
    return builder.finish({name: formula(*arrays).index for name, formula in outputs.items()})


def ops(graph):
    return [node.op for node in graph.nodes if node.op not in {"input", "constant"}]


def questions(seed, *sets_of_rules):
    """Return the graphs of random quantities of a random network, with inputs and expected results.

    There is one graph for each way to compute them and each set of rules.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    d, m, n, k = draw.choice((1, 2, 5, 17)), draw.choice((1, 2, 3, 20)), 5, draw.choice((1, 3))
    network = draws.network(draw, d, m).double()
    weights, directions = draw.choice((None, "shared", "each")), draw.choice(("shared", "each"))
    given = {
        "x": torch.randn(n, 1, d).double(),
        "directions": torch.randn(1 if directions == "shared" else n, k, d).double(),
    }
    if weights:
        given["weights"] = torch.randn(1 if weights == "shared" else n, 1, m).double()
    names = tuple(name for name in QUANTITIES if draw.random() < 0.5) or ("value",)
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(d, d).double()).Q
        lambdas = given["weights"].squeeze(1) if weights else None
        v = given["directions"]
        found = calculus.evaluate(network.forms(), given["x"].squeeze(1), names, lambdas, v.expand(n, -1, -1))
        graphs, forms, ask = [], network.forms(), Ask(frozenset(names), weights, directions, k)
        for mode, start in itertools.product((Backward, Forward), (None, basis)):
            with contextlib.suppress(Unavailable):
                graphs.append([trace(forms, ask, m, mode, start, rules) for rules in sets_of_rules])
    shared = {name for name, how in (("weights", weights), ("directions", directions)) if how == "shared"}
    return graphs, given, {name: getattr(found, name) for name in names}, shared


def assert_equal(found, expected):
    for name, wanted in expected.items():
        got = found[name].expand(wanted.shape[0], *found[name].shape[1:]).reshape(wanted.shape)
        size = max(1e-3, float(wanted.abs().max()))
        assert float((got - wanted).abs().max()) <= BOUND * size, name


@pytest.mark.parametrize("seed", range(12))
def test_no_rule_changes_what_a_graph_computes(seed):
    alone = [only(rule) for rule in dict.fromkeys(itertools.chain(*passes.RULES.values()))]
    graphs, given, expected, _ = questions(seed, None, passes.RULES, *alone)
    for traced, simplified, *others in graphs:
        for graph in (traced, simplified, *others):
            assert_equal(run(graph, given), expected)
        assert len(simplified.nodes) <= len(traced.nodes)


@pytest.mark.parametrize("lanes", [1, 4, 8])
@pytest.mark.parametrize("seed", range(6))
def test_the_steps_of_a_graph_compute_the_same(seed, lanes):
    graphs, given, expected, shared = questions(100 + seed, None, passes.RULES)
    inputs = {name: array[0] if name in shared else array for name, array in given.items()}
    for graph in itertools.chain(*graphs):
        assert_equal(interpret(lay_out(graph, lanes), inputs, 5, tile_rows=3), expected)


Z = ("z", (2, 3))
X = ("x", (1, 4))


@pytest.mark.parametrize(
    ("rule", "given", "formula", "kept"),
    [
        pytest.param(passes.fold_constants, Z, lambda z: z + z.constant(torch.ones(3)) * 2, ["add"], id="fold"),
        pytest.param(passes.drop_zeros, Z, lambda z: z + torch.zeros(3), [], id="x + 0"),
        pytest.param(passes.drop_zeros, Z, lambda z: z - torch.zeros(3), [], id="x - 0"),
        pytest.param(passes.drop_zeros, Z, lambda z: torch.zeros(3) - z, ["sub"], id="0 - x"),
        pytest.param(passes.drop_zeros, Z, lambda z: z * torch.zeros(3), [], id="x * 0"),
        pytest.param(passes.drop_zeros, Z, lambda z: z @ torch.zeros(3, 2), [], id="x @ 0"),
        pytest.param(passes.drop_ones, Z, lambda z: z * torch.ones(3), [], id="x * 1"),
        pytest.param(passes.drop_ones, Z, lambda z: z / 1.0, [], id="x / 1"),
        pytest.param(passes.drop_ones, Z, lambda z: 1.0 / z, ["div"], id="1 / x"),
        pytest.param(passes.drop_ones, Z, lambda z: z @ torch.eye(3), [], id="x @ I"),
        pytest.param(passes.drop_ones, Z, lambda z: torch.eye(2) @ z, [], id="I @ x"),
        pytest.param(passes.drop_ones, X, lambda x: x * torch.ones(5, 4), ["mul"], id="x * 1 repeats x"),
        pytest.param(passes.merge_scalars, Z, lambda z: 2 * (z * 3), ["mul"], id="scalars"),
        pytest.param(passes.merge_scalars, Z, lambda z: -z, ["mul"], id="-x"),
        pytest.param(passes.compose_views, Z, lambda z: z.mT.mT, [], id="transposed twice"),
        pytest.param(passes.compose_views, X, lambda x: x.sum(-2, keepdim=True), [], id="sum of one"),
        pytest.param(passes.recognise_contractions, Z, lambda z: z @ z.mT, ["contract"], id="contraction"),
    ],
)
def test_a_rule_does_what_its_name_says(rule, given, formula, kept):
    assert ops(graph_of(given, rules=(rule,), y=formula)) == kept


def test_reshapes_of_unit_axes_sink_and_vanish():
    def formula(z):
        return (z.unsqueeze(-2) * z.unsqueeze(-2)).flatten(-3, -2)

    assert ops(graph_of(Z, rules=(passes.sink_reshapes, passes.compose_views), y=formula)) == ["mul"]
    assert ops(graph_of(Z, rules=(passes.compose_views,), y=formula)) == ["reshape", "mul", "reshape"]


def test_sums_of_contractions_are_joined():
    def formula(z):
        return z @ z.mT + (2 * z) @ z.mT

    rules = (passes.recognise_contractions, passes.join_sums)
    assert ops(graph_of(Z, rules=rules, y=formula)) == ["mul", "contract"]
    assert ops(graph_of(Z, rules=rules[:1], y=formula)).count("contract") == 2


def test_equal_nodes_are_merged_and_dead_ones_left_out():
    def formula(z):
        torch.exp(z)
        return torch.tanh(z) * torch.tanh(z)

    assert ops(graph_of(Z, y=formula)) == ["tanh", "mul"]


def test_what_follows_from_shared_inputs_is_shared():
    builder = Builder()
    x = Array(builder, builder.input("x", (1, 4)))
    v = Array(builder, builder.input("directions", (2, 4), is_shared=True))
    product, mixed = v @ torch.ones(4, 3), v * x
    assert builder.nodes[product.index].is_shared
    assert not builder.nodes[mixed.index].is_shared


def test_a_graph_prints_and_compares():
    one, two = (graph_of(Z, y=lambda z: torch.tanh(z) @ torch.ones(3, 2)) for _ in range(2))
    other = graph_of(Z, y=lambda z: torch.tanh(z) @ torch.zeros(3, 2))
    assert one == two
    assert one != other
    assert str(one).splitlines() == [
        "%0[2, 3] = input(z)",
        "%1[2, 3] = tanh(%0)",
        "%2[3, 2] = constant()",
        "%3[2, 2] = matmul(%1, %2)",
        "return y=%3",
    ]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_trace_to_what_they_compute(name):
    activation = ACTIVATIONS[name]()
    z = torch.cat([torch.linspace(-50, 50, 401), torch.tensor([0.0, 1e30, -1e30])]).double().reshape(1, 1, -1)
    graph = graph_of(
        ("z", tuple(z.shape[1:])), **{f"order {i}": lambda z, i=i: activation.jet(z, 2)[i] for i in range(3)}
    )
    for found, wanted in zip(run(graph, {"z": z}).values(), activation.jet(z, 2), strict=True):
        torch.testing.assert_close(found.expand_as(wanted), wanted, rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: torch.cumsum(z, -1), "cumsum cannot be traced"),
        (lambda z: z if z > 0 else -z, "truth value"),
        (lambda z: z**1.5, "whole number"),
        (lambda z: torch.sum(z, -1, keepdim=True), "last axis but one"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(function, message):
    with pytest.raises(TraceError, match=message):
        graph_of(Z, y=function)


@pytest.mark.parametrize(
    "function",
    [
        torch.nn.functional.silu,
        torch.nn.functional.gelu,
        lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        lambda z: torch.nn.functional.softplus(z, 2.0, 15.0),
        lambda z: torch.nn.functional.elu(z, 1.5),
        torch.nn.functional.mish,
        torch.nn.functional.softsign,
        torch.nn.functional.logsigmoid,
        lambda z: torch.where(z > 0.5, z**3, z**-2),
        lambda z: z.abs().sqrt() + torch.rsqrt(z * z + 1),
        lambda z: z.clamp(-1, 1).masked_fill(z > 2, 7.0) - torch.square(z).reciprocal(),
    ],
)
def test_functions_of_torch_trace_to_the_same_numbers(function):
    z = torch.randn(3, 2, 3).double()
    found = run(graph_of(Z, y=function), {"z": z})["y"]
    torch.testing.assert_close(found, function(z), rtol=1e-13, atol=1e-13)
