"""The proof can fail: an error is planted in every pass, layout decision and backend in turn, and each is found.

Each sabotage is a small error that leaves programs within their memory: a factor of 1.01, a term that is left out, an
entry that is read in another's place.
"""

from dataclasses import replace

import pytest
import torch

from hessquik import Evaluator, graph, layout, operations, passes, pointwise, proof, strided
from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import siluActivation, sinActivation, softplusActivation, tanhActivation
from hessquik.backends import names
from hessquik.backends import torch as torch_backend
from hessquik.proof import prove
from hessquik.recent import Recent
from hessquik.steps import Congruence, Contract, Map, Product, SumProducts

ON_CPU = pytest.mark.skipif("cpu" not in names(), reason="needs the CPU kernel: install where there is a C compiler")


@pytest.fixture(autouse=True)
def no_steps_kept(monkeypatch):
    """Have every graph laid out and translated anew."""
    monkeypatch.setattr(layout, "recent", Recent(0))


def networks():
    """Return networks that together use every operation."""
    torch.manual_seed(0)
    tanh = tanhActivation()
    yield net.NN(lay.singleLayer(4, 6, tanh), net.resnetNN(6, 2, 0.5, siluActivation()), lay.singleLayer(6, 2))
    yield net.NN(net.ICNN(3, [None, 8, 5], softplusActivation()), lay.quadraticICNNLayer(3, 5, 2))
    yield net.NN(lay.singleLayer(2, 7, sinActivation()), lay.singleLayer(7, 9, tanh))  # forward mode
    yield net.NN(lay.singleLayer(9, 2, tanh), lay.singleLayer(2, 9, tanh))  # tangents start reduced
    yield net.NN(lay.singleLayer(2, 5, tanh), lay.ICNNLayer(3, 2, 4, tanh), lay.singleLayer(7, 2))  # cuts and joins


def refused(backend):
    """Return whether the proof of some network fails on a backend, by the calls at load or by the others."""
    for network in networks():
        evaluate = Evaluator(network.double(), backend=backend)
        trial = proof._set_up(network, torch.float64, None, None, samples=2, seed=0)
        for calls in (proof.CALLS, (proof.ALONG_AXES,)):
            rows = proof._against_autograd(trial, evaluate, [(names, False) for names in calls], backend)
            if not all(row.passed for row in rows):
                return True
    return False


@pytest.mark.parametrize("backend", names())
def test_what_nobody_sabotaged_is_proven(backend):
    assert not refused(backend)


# ---- Passes ----


@pytest.mark.parametrize("rule", sorted({*sum(passes.RULES.values(), ())}, key=str), ids=lambda rule: rule.__name__)
def test_a_rule_that_is_one_percent_off(rule, monkeypatch):
    def wrong(builder, node):
        found = rule(builder, node)
        if found is None:
            return None
        factor, is_shared = builder.full(1.01), builder.nodes[found].is_shared
        return builder.append(graph.Node("mul", (found, factor), node.shape, is_shared))

    for op, rules in passes.RULES.items():
        monkeypatch.setitem(passes.RULES, op, tuple(wrong if other is rule else other for other in rules))
    assert refused(names()[0])


def test_unequal_nodes_that_are_merged(monkeypatch):
    right = graph.Builder.append

    def append(self, node):
        for i, other in enumerate(self.nodes if node.op == "mul" else ()):
            if other.op == "mul" and other.shape == node.shape and other.inputs[0] == node.inputs[0]:
                return i
        return right(self, node)

    monkeypatch.setattr(graph.Builder, "append", append)
    assert refused(names()[0])


def test_a_node_that_is_taken_for_dead(monkeypatch):
    right = graph.Builder.finish

    def finish(self, outputs):
        found = right(self, outputs)
        nodes = list(found.nodes)
        for i, node in enumerate(nodes):
            source = nodes[node.inputs[0]] if node.inputs else None
            if node.op == "mul" and source is not None and source.shape == node.shape and not node.is_shared:
                nodes[i] = replace(node, op="reshape", inputs=node.inputs[:1], arguments=node.shape)
                break
        return graph.Graph(tuple(nodes), found.outputs)

    monkeypatch.setattr(graph.Builder, "finish", finish)
    assert refused(names()[0])


# ---- Layout: the kernels read what it says ----


def _alpha_off(self, i, fusion, right):
    right(self, i, fusion)
    fusion.alpha *= 1.01


def _same_place_for_all(self, terms, right):
    joint = right(self, terms)
    for j in terms:
        if j in self.destination and self.destination[j].buffer is joint.buffer:
            self.destination[j] = replace(self.destination[j], offset=0)
    return joint


def _last_step_missing(self, i, right):
    right(self, i)
    self.steps[-1] = self.steps[-2]


def _no_bias(self, a, b, add, out, scaling, right):
    return right(self, a, b, None, out, scaling)


LAYOUT = {
    "the factor of a scaling": ("fuse_scaling", _alpha_off),
    "a factor is forgotten": ("extends_by_factor", lambda self, i, fusion, factor, right: True),
    "a term is forgotten": ("extends_by_term", lambda self, i, fusion, step, term, right: True),
    "terms lie on one another": ("place_side", _same_place_for_all),
    "a pair is missing": ("emit_pairs", _last_step_missing),
    "a row of a triangle is missing": ("emit_unpack", _last_step_missing),
    "a sum in a product is missing": ("merged", _no_bias),
}


@ON_CPU
@pytest.mark.parametrize("decision", LAYOUT)
def test_a_wrong_decision_of_layout(decision, monkeypatch):
    name, wrong = LAYOUT[decision]
    right = getattr(layout._Layout, name)
    monkeypatch.setattr(layout._Layout, name, lambda *arguments: wrong(*arguments, right))
    assert refused("cpu")


@ON_CPU
def test_arrays_that_overlap(monkeypatch):
    right = layout._first_fit

    def first_fit(lives):
        total = right(lives)
        for _, _, buffer in lives:
            buffer.offset = 0
        return total

    monkeypatch.setattr(layout, "_first_fit", first_fit)
    assert refused("cpu")


def _columns_repeated(array):
    return replace(array, strides=(*array.strides[:-1], 0))


STRIDED = {
    "part": lambda found, self, axis, start, stop: replace(found, offset=self.offset),
    "permuted": lambda found, self, axes: (
        replace(found, strides=self.strides) if found.shape == self.shape else found
    ),
    "diagonal": lambda found, self: replace(found, strides=self.strides[1:]),
    "reshaped": lambda found, self, shape: None if found is None else _columns_repeated(found),
    "repeated": lambda found, self, shape: _columns_repeated(found),
}


@ON_CPU
@pytest.mark.parametrize("view", STRIDED)
def test_a_wrong_view(view, monkeypatch):
    right = getattr(strided.View, view)
    monkeypatch.setattr(
        strided.View, view, lambda self, *arguments: STRIDED[view](right(self, *arguments), self, *arguments)
    )
    assert refused("cpu")


@ON_CPU
def test_arrays_that_are_collapsed_wrongly(monkeypatch):
    def collapsed(arrays, keeps_columns):
        first, *rest = strided.collapsed(arrays, keeps_columns)
        return [_columns_repeated(first), *rest]

    monkeypatch.setattr(layout, "collapsed", collapsed)
    assert refused("cpu")


# ---- The compiled kernel ----


def _product(fields, behind):
    fields["depth"] = max(fields["depth"] - 1, 1)


def _map(fields, behind):
    last = [i for i, (name, _) in enumerate(behind) if name == "Instruction"][-1:]
    for i in last:
        del behind[i]
        fields["instructions"] -= 1


def _sum(fields, behind):
    fields["inner"] = max(fields["inner"] - 1, 1)


def _reduction(fields, behind):
    fields["columns"] = 0


@ON_CPU
@pytest.mark.parametrize(
    ("kind", "change"),
    [(Product, _product), (Map, _map), (SumProducts, _sum), (Contract, _reduction), (Congruence, _reduction)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_step_of_the_kernel(kind, change, monkeypatch):
    from hessquik.backends.cpu import translate

    right = translate._RULES[kind]
    changed = "Contract" if kind is Congruence else kind.__name__

    def wrong(self, step):
        name, fields, behind = right(self, step)
        if name == changed:
            change(fields, behind)
        return name, fields, behind

    monkeypatch.setitem(translate._RULES, kind, wrong)
    assert refused("cpu")


@ON_CPU
@pytest.mark.parametrize("name", ["pack_matrix", "pad_columns"])
def test_wrong_constants_of_the_kernel(name, monkeypatch):
    from hessquik.backends.cpu import translate

    right = getattr(translate, name)
    monkeypatch.setattr(translate, name, lambda *arguments: 1.01 * right(*arguments))
    assert refused("cpu")


@pytest.mark.slow
@ON_CPU
def test_a_kernel_that_is_wrong_in_the_second_tile_only(monkeypatch):
    from hessquik.backends.cpu import CpuProgram, structures

    right, place = CpuProgram.run, list(structures._STRUCTURES["Program"][1]).index("tile_rows")

    def run(self, arrays, start, stop):
        right(self, arrays, start, stop)
        if (rows := memoryview(self._words).cast("q")[place]) < stop and "value" in arrays:
            arrays["value"][rows:] *= 1.01

    monkeypatch.setattr(CpuProgram, "run", run)
    monkeypatch.setattr(proof, "backends", lambda: {"cpu": {"backend": "cpu"}})
    failed = {(row.quantity, row.computed_by, row.reference) for row in prove(next(networks())) if not row.passed}
    assert failed == {("value", f"cpu, {dtype}", "the same rows alone") for dtype in ("float32", "float64")}


# ---- Torch ----

#: A cat is copied, slices and reshapes are views; diagonals are read of what a congruence or a product has computed.
TORCH = (
    "matmul",
    "contract",
    "congruence",
    "sum",
    "pairs",
    "unpack",
    "pack",
    "cat",
    "slice",
    "permute",
    "reshape",
    "diagonal",
)


def test_every_operation_of_torch_is_sabotaged():
    assert set(TORCH) == set(operations._OPERATIONS)


@pytest.mark.parametrize("op", TORCH)
def test_a_wrong_operation_of_torch(op, monkeypatch):
    right = torch_backend.compute_node

    def compute_node(node, inputs):
        found = right(node, inputs)
        return 1.01 * found if node.op == op else found

    monkeypatch.setattr(torch_backend, "compute_node", compute_node)
    assert refused("torch")


@pytest.mark.parametrize("op", ["add", "sub", "mul", "tanh", "sigmoid", "sin", "cos"])
def test_a_wrong_primitive_of_torch(op, monkeypatch):
    right = pointwise.PRIMITIVES[op]
    wrong = replace(right, on_tensors=lambda *operands: 1.01 * right.on_tensors(*operands))
    monkeypatch.setitem(pointwise.PRIMITIVES, op, wrong)
    assert refused("torch")


def test_rows_that_torch_confuses(monkeypatch):
    right = torch_backend.TorchProgram._given

    def given(self, arrays, start, count):
        return {name: array.roll(1, 0) for name, array in right(self, arrays, start, count).items()}

    monkeypatch.setattr(torch_backend.TorchProgram, "_given", given)
    assert refused("torch")
