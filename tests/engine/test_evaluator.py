"""The Evaluator: every quantity of every kind of network, by both machines, as torch.func computes it."""

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from hessquik import Evaluator, ShapeError, backends, evaluator
from hessquik.activations import ACTIVATIONS, softplusActivation, tanhActivation
from hessquik.calculus import QUANTITIES
from hessquik.layers import ICNNLayer, quadraticICNNLayer, resnetLayer, singleLayer
from hessquik.networks import ICNN, NN, fullyConnectedNN, resnetNN
from tests import oracle
from tests.engine import random_networks as draws
from tests.whole import choose

#: Rounding alone; relative to the largest entry, see oracle.difference.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
#: In the short form each is asked for once, with one of the six kinds of weights and directions; a network has three
#: of these in float32 and the others in float64.
SUBSETS = [("value", "gradient", "hessian"), ("laplacian", "gradient"), ("jvp",), *((name,) for name in QUANTITIES)]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
BACKENDS = backends.names()
TANH = tanhActivation()
NETWORKS = {
    "residual": lambda: NN(singleLayer(4, 8, TANH), resnetLayer(8, 0.5, softplusActivation()), singleLayer(8, 3)),
    "one input, one output": lambda: fullyConnectedNN([1, 7, 1], TANH),
    "many inputs": lambda: NN(singleLayer(40, 8, TANH), resnetLayer(8, 0.5, TANH), singleLayer(8, 2)),
    "many inputs and outputs": lambda: NN(singleLayer(20, 6, TANH), resnetLayer(6, 0.5, TANH), singleLayer(6, 11)),
    "many outputs": lambda: NN(singleLayer(2, 32, TANH), resnetLayer(32, 0.5, TANH), singleLayer(32, 40)),
    "convex": lambda: NN(ICNN(3, [None, 8, 5]), quadraticICNNLayer(3, 5, 2)),
    "convex, many inputs": lambda: NN(ICNN(30, [None, 4, 5]), quadraticICNNLayer(30, 5, 2)),
    "convex in the middle": lambda: NN(singleLayer(4, 8, TANH), ICNNLayer(3, 5, 6), ICNNLayer(3, 6, 2)),
    "residual on [u x]": lambda: NN(ICNNLayer(3, None, 5), resnetLayer(8, 0.3, TANH), singleLayer(8, 2)),
    "linear": lambda: NN(singleLayer(3, 4), singleLayer(4, 2)),
    "nested, curved at the end": lambda: NN(NN(singleLayer(3, 8, TANH)), NN(NN(singleLayer(8, 2, TANH)))),
}


def expected(network, x, weights=None, directions=None):
    """Return all quantities, computed from the oracle's value, gradient and Hessian."""
    value, gradient, hessian = oracle.derivatives(network, x.double(), network.dim_output())
    if weights is not None:
        weights = weights.double().expand(len(x), -1)
        value = torch.einsum("nm,nm->n", value, weights).unsqueeze(-1)
        gradient = torch.einsum("ndm,nm->nd", gradient, weights).unsqueeze(-1)
        hessian = torch.einsum("ndem,nm->nde", hessian, weights).unsqueeze(-1)
    found = {
        "value": value,
        "gradient": gradient,
        "hessian": hessian,
        "laplacian": torch.einsum("naam->nm", hessian),
        "hessian_diagonal": torch.einsum("naam->nam", hessian),
        "hessian_packed": hessian[:, *torch.tril_indices(x.shape[1], x.shape[1])],
    }
    if directions is not None:
        v = directions.double().expand(len(x), -1, -1)
        found["jvp"] = torch.einsum("nkd,ndm->nkm", v, gradient)
        found["hvp"] = torch.einsum("nkd,ndem->nkem", v, hessian)
        found["curvature"] = torch.einsum("nkem,nke->nkm", found["hvp"], v)
    return found


def agree(out, found, quantities):
    """Check that the requested quantities are right, and that there are no others."""
    for name in QUANTITIES:
        got = getattr(out, name)
        if name in quantities:
            assert oracle.difference(got, found[name]) <= TOLERANCE[got.dtype], name
            assert got.is_contiguous()
        else:
            assert got is None, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_quantity_with_weights_and_directions_is_that_of_torch_func(name, dtype, backend):
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype)
    d, m, n = network.dim_input(), network.dim_output(), 11
    evaluate = Evaluator(network, backend=backend)
    x = torch.randn(n, d, dtype=dtype)
    given = itertools.product(
        (None, torch.randn(m, dtype=dtype), torch.randn(n, m, dtype=dtype)),
        (torch.randn(3, d, dtype=dtype), torch.randn(n, 2, d, dtype=dtype)),
    )
    first = (list(NETWORKS).index(name) + (dtype == torch.float32)) % 2
    for number, (weights, directions) in list(enumerate(given))[choose(first, 0) :: choose(2, 1)]:
        found = expected(network.double(), x, weights, directions)
        for quantities in [QUANTITIES, *SUBSETS[choose(number, 0) :: choose(12, 1)]]:
            agree(evaluate(x, quantities, weights, directions), found, quantities)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_random_networks_of_every_kind_agree_with_torch_func(backend):
    for seed in range(choose(32, 80)):
        draw = random.Random(seed)
        d, m = draws.shapes()[seed % 16]
        network = draws.convex_network(draw, d) if seed % 5 == 0 else draws.network(draw, d, m)
        draws.tame(network.requires_grad_(False), seed, 0.3)
        x = torch.randn(3, d, dtype=torch.float64)
        v = torch.randn(2, d, dtype=torch.float64)
        agree(Evaluator(network, backend=backend)(x, QUANTITIES, None, v), expected(network, x, None, v), QUANTITIES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_right_far_out_too(name, dtype, backend):
    network = NN(singleLayer(1, 1, ACTIVATIONS[name](), dtype=dtype))
    with torch.no_grad():
        network[0].K.fill_(1.0)
        network[0].b.zero_()
    top = 80.0 if name == "expActivation" else 1e4
    x = torch.cat([torch.linspace(-12, 12, 4001, dtype=dtype), torch.tensor([-top, -30.0, 30.0, top], dtype=dtype)])
    out = Evaluator(network, backend=backend)(x.unsqueeze(1), ("value", "gradient", "hessian"))
    sigma, slope, curvature = network[0].act.double().jet(x.double(), 2)
    resolution = 8 * torch.finfo(dtype).eps
    for got, exact in ((out.value, sigma), (out.gradient, slope), (out.hessian, curvature)):
        error = (got.flatten().double() - exact).abs()
        assert float((error / exact.abs().clamp(min=1.0)).max()) <= resolution


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_one_row_keep_their_shapes(backend):
    evaluate = Evaluator(NETWORKS["residual"](), backend=backend)
    for n in (0, 1):
        out = evaluate(torch.zeros(n, 4), QUANTITIES, None, torch.zeros(2, 4))
        assert {name: tuple(getattr(out, name).shape) for name in QUANTITIES} == {
            "value": (n, 3),
            "gradient": (n, 4, 3),
            "hessian": (n, 4, 4, 3),
            "laplacian": (n, 3),
            "hessian_diagonal": (n, 4, 3),
            "jvp": (n, 2, 3),
            "hvp": (n, 2, 4, 3),
            "curvature": (n, 2, 3),
            "hessian_packed": (n, 10, 3),
        }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 1, 9, 1000])
def test_tiles_are_the_rows_of_the_whole(n, backend):
    evaluate = Evaluator(NETWORKS["residual"](), backend=backend)
    x, weights, directions = torch.randn(n, 4), torch.randn(n, 3), torch.randn(5, 4)
    whole = evaluate(x, QUANTITIES, weights, directions)
    tiles = list(evaluate.tiles(x, QUANTITIES, weights, directions))
    assert all(tile.value.shape[0] <= evaluate.tile_rows[-1] for tile in tiles)
    for name in QUANTITIES:
        assert torch.equal(torch.cat([getattr(tile, name) for tile in tiles]), getattr(whole, name))


def test_points_of_another_dtype_or_layout_are_taken():
    network = NETWORKS["residual"]()
    x = torch.randn(4, 9, dtype=torch.float64).T
    for dtype in (torch.float32, torch.float64):
        out = Evaluator(network, dtype=dtype)(x)
        assert out.value.dtype is dtype
        assert oracle.difference(out.value, oracle.value(network.double(), x)) < 1e-5


def test_later_changes_of_the_network_do_not_reach_it():
    network = NETWORKS["residual"]()
    evaluate, x = Evaluator(network), torch.randn(3, 4)
    before = evaluate(x).value.clone()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert torch.equal(evaluate(x).value, before)
    assert torch.equal(evaluate(x, ("value", "hessian")).value, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_stay_what_they_were_when_more_is_computed(backend):
    evaluate = Evaluator(NETWORKS["many inputs"](), backend=backend)
    first = evaluate(torch.randn(300, 40), ("value", "hessian"))
    kept = first.hessian.clone()
    for _ in range(3):
        evaluate(torch.randn(300, 40), ("value", "hessian"))
    assert torch.equal(first.hessian, kept)


def assert_threads_agree(evaluate, rows):
    """Check that four threads at once, each with its own points, get the same results as one after the other."""
    points = [torch.randn(rows, evaluate.d) for _ in range(4)]
    alone = [evaluate(x, ("value", "hessian")).hessian for x in points]

    def agrees(i):
        return all(torch.equal(evaluate(points[i], ("value", "hessian")).hessian, alone[i]) for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(agrees, range(4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_may_share_it(backend):
    assert_threads_agree(Evaluator(NETWORKS["residual"](), backend=backend), 40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_of_its_own_give_the_same_bits(backend):
    network = NETWORKS["many inputs"]()
    x = torch.randn(700, 40)
    alone = Evaluator(network, backend=backend)(x, ("value", "hessian"))
    together = Evaluator(network, threads=3, backend=backend)(x, ("value", "hessian"))
    assert torch.equal(alone.hessian, together.hessian)


def test_points_of_another_device_get_their_results_there(monkeypatch):
    """The kernels write memory of their own device only; the other one's numbers are ones here."""
    move = torch.Tensor.to

    def to(tensor, *args, **options):
        if tensor.is_meta and args[0] == torch.device("cpu"):
            return torch.ones(tensor.shape)
        return move(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    computed, run = [], evaluator.Evaluator._run
    monkeypatch.setattr(
        evaluator.Evaluator,
        "_run",
        lambda self, runner, arrays, *rows: computed.append(arrays) or run(self, runner, arrays, *rows),
    )
    evaluate, x = Evaluator(fullyConnectedNN([3, 8, 2]), backend="torch"), torch.empty(5, 3, device="meta")
    out = {"hessian": torch.empty(5, 3, 3, 2, device="meta")}
    for found in (evaluate(x, ("hessian",)), evaluate(x, ("hessian",), out=out), *evaluate.tiles(x, ("hessian",))):
        assert found.hessian.is_meta
        assert found.hessian.shape == (5, 3, 3, 2)
    assert all(array.is_cpu for arrays in computed for array in arrays.values())
    with pytest.raises(ShapeError, match="contiguous hessian"):
        evaluate(x, ("hessian",), out={"hessian": torch.empty(5, 3, 3, 2)})


@pytest.mark.parametrize(
    ("own", "other", "moves"),
    [("cuda:0", "cuda:0", False), ("cuda:0", "cuda:1", True), ("cuda:0", "cpu", False), ("cpu", "cuda:0", True),
     ("xpu", "xpu:0", False), ("cpu", "cpu", False)],
)  # fmt: skip
def test_only_points_of_another_gpu_are_moved(own, other, moves):
    device = torch.device(other)
    x = SimpleNamespace(device=device, is_cpu=device.type == "cpu")
    assert evaluator.Evaluator._is_elsewhere(SimpleNamespace(device=torch.device(own)), x) is moves


def test_on_a_gpu_all_work_is_on_the_callers_stream():
    evaluate = Evaluator(NETWORKS["residual"](), torch.device("cuda", 0), threads=3, backend="torch")
    runner = SimpleNamespace(plan=evaluate.plan(), tile_rows=(1,))
    assert evaluate._piece(runner, 1 << 30) == 1 << 30


def divided(monkeypatch):
    """Return an evaluator that divides calls of 256 rows among two threads, and what runs their pieces."""
    monkeypatch.setattr(evaluator, "PIECE_OPERATIONS", 1e4)
    evaluate = Evaluator(NETWORKS["residual"](), threads=2, backend=BACKENDS[0])
    runner = evaluate._runner(evaluate._ask(("value",), None, None))
    assert evaluate._piece(runner, 256) < 256
    return evaluate, runner


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the CPU kernel: install where there is a C compiler")
def test_a_call_does_not_wait_for_a_thread_that_another_call_has(monkeypatch):
    evaluate, _ = divided(monkeypatch)
    x, over = torch.randn(256, 4), threading.Event()
    expected = evaluate(x, ("value",)).value
    other = evaluate._pool.submit(over.wait, 20)
    found = evaluate(x, ("value",)).value
    assert not other.done()
    over.set()
    assert torch.equal(found, expected)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the CPU kernel: install where there is a C compiler")
def test_a_call_that_fails_on_one_thread_ends_on_all(monkeypatch):
    evaluate, runner = divided(monkeypatch)
    right, running, taken = runner.run, set(), []
    begun, ends, submit = threading.Event(), threading.Event(), evaluate._pool.submit

    def run(arrays, start, stop):
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(20)
            raise MemoryError("no memory for a tile")
        running.add(start)
        taken.append(start)
        begun.set()
        assert ends.wait(20)
        right(arrays, start, stop)
        running.discard(start)

    def submit_noting_the_end(work):
        future = submit(work)
        cancel = future.cancel
        future.cancel = lambda: ends.set() or cancel()
        return future

    runner.run = run
    monkeypatch.setattr(evaluate._pool, "submit", submit_noting_the_end)
    with pytest.raises(MemoryError, match="no memory"):
        evaluate(torch.randn(256, 4), ("value",))
    assert not running
    assert len(taken) == 1, "the other pieces are left"


def pieces_of(evaluate, n, quantities):
    """Return the pieces of rows that threads computed in a call, in order, and whether several threads did.

    Each of the two threads has one piece before one of them has another, as on a machine with a core for each.
    """
    runner = evaluate._runner(evaluate._ask(quantities, None, None))
    right, pieces, threads, both_began = runner.run, [], set(), threading.Barrier(2)

    def run(arrays, start, stop):
        pieces.append((start, stop))
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            both_began.wait(20)
        right(arrays, start, stop)

    runner.run = run
    evaluate(torch.randn(n, evaluate.d), quantities)
    return sorted(pieces), len(threads) > 1


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the CPU kernel: install where there is a C compiler")
def test_threads_divide_a_call_by_its_work_also_within_one_tile(monkeypatch):
    monkeypatch.setattr(evaluator, "PIECE_OPERATIONS", 2e6)
    network = fullyConnectedNN([10, 128, 128, 128, 1], TANH)
    evaluate = Evaluator(network, threads=2)
    asked = ("value", "gradient")
    evaluate(torch.randn(1, 10), asked)
    assert evaluate._runner(evaluate._ask(asked, None, None)).tile_rows[-1] >= 256
    pieces, are_several = pieces_of(evaluate, 256, asked)
    assert are_several
    sizes = [stop - start for start, stop in pieces]
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == 256
    assert 2 <= len(pieces) <= 2 * evaluator.PIECES
    assert max(sizes[:-1]) == min(sizes[:-1]) >= sizes[-1]
    assert pieces_of(evaluate, 3, asked) == ([], False), "few rows are one call of the kernel"
    operations = evaluate.operations(asked)
    monkeypatch.setattr(evaluator, "PIECE_OPERATIONS", 256 * operations / 5.5)
    assert len(pieces_of(evaluate, 256, asked)[0]) == 4, "not five: each thread has as much to do"
    alone = Evaluator(network, threads=1)
    x = torch.randn(256, 10)
    assert torch.equal(evaluate(x, asked).gradient, alone(x, asked).gradient)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"x": torch.zeros(2, 3)}, r"expected points of shape \(n, 4\), got \(2, 3\)", id="points"),
        pytest.param({"x": torch.zeros(4)}, r"got \(4,\)", id="one point"),
        pytest.param({"quantities": ("slope",)}, "expected quantities out of value.*got", id="unknown quantity"),
        pytest.param({"quantities": ()}, "expected quantities", id="no quantity"),
        pytest.param({"weights": torch.zeros(2)}, r"expected weights of shape \(3,\) or \(2, 3\)", id="weights"),
        pytest.param({"quantities": ("hvp",)}, "expected directions.*got none", id="no directions"),
        pytest.param({"directions": torch.zeros(2, 3)}, r"\(k, 4\) or \(2, k, 4\), got \(2, 3\)", id="directions"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    evaluate = Evaluator(NETWORKS["residual"]())
    with pytest.raises(ShapeError, match=words):
        evaluate(**{"x": torch.zeros(2, 4), **arguments})


@pytest.mark.slow
def test_plans_of_many_kinds_do_not_fill_the_memory():
    evaluate = Evaluator(NN(singleLayer(2, 3, tanhActivation())))
    for k in range(1, 300):
        evaluate.plan(("curvature",), directions=(k, 2))
        evaluate(torch.zeros(1, 2), ("jvp",), directions=torch.zeros(k, 2))
    assert len(evaluate._runners) == 256
    assert 0 < len(evaluate._plans) <= 256
    x = torch.randn(3, 2)
    assert torch.equal(evaluate(x, ("hessian",)).hessian, evaluate(x, ("hessian",)).hessian)


def test_a_plan_that_only_tells_a_cost_is_not_translated_and_a_large_one_not_kept(monkeypatch):
    evaluate = Evaluator(fullyConnectedNN([4, 8, 2], TANH))
    cost = evaluate.operations(("hessian",))
    assert not evaluate._runners
    assert len(evaluate._plans) == 1
    evaluate(torch.zeros(1, 4), ("hessian",))
    assert not evaluate._plans
    assert evaluate.operations(("hessian",)) == cost
    monkeypatch.setattr(evaluator, "MAX_WAITING_BYTES", 0)
    evaluate.operations(("laplacian",))
    assert not evaluate._plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_held_once_and_packed_once_for_each_direction(dtype):
    """In their own dtype, although what is computed of them is computed in float64."""
    f = resnetNN(160, 2, act=TANH, dtype=dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in f.parameters()}
    evaluate = Evaluator(f, owned=True)
    assert evaluate._own_data == weights
    x = torch.ones(1, 160, dtype=dtype)
    for quantities in (("value",), ("value", "gradient"), ("gradient",), ("jvp", "curvature"), ("hvp", "value")):
        evaluate(x, quantities, weights=torch.ones(160, dtype=dtype), directions=torch.ones(1, 160, dtype=dtype))
    for runner in evaluate._runners.values():
        large = [node.data for node in runner.plan.graph.nodes if node.data is not None and node.data.numel() > 160]
        assert {data.untyped_storage().data_ptr() for data in large} <= weights
    if evaluate._packed is not None:
        large = [array for array in evaluate._packed.known.values() if array.numel() > 160]
        assert len(large) == 2 * 2  # two layers, forwards and backwards
        assert all(array.dtype == dtype for array in large)


def test_the_bytes_of_plans_are_bounded_and_those_not_used_for_longest_go_first(monkeypatch):
    monkeypatch.setattr(evaluator, "MAX_PLAN_BYTES", 100_000)
    evaluate = Evaluator(NN(singleLayer(40, 50, tanhActivation()), singleLayer(50, 3)), dtype=torch.float64)
    x = torch.randn(3, 40, dtype=torch.float64)
    expected = evaluate(x, ("laplacian",)).laplacian
    for k in range(1, 12):
        evaluate(x, ("curvature", "hessian"), directions=torch.randn(k, 40, dtype=torch.float64))
        kept = evaluate._runners[next(ask for ask in evaluate._runners if ask.quantities == {"laplacian"})]
        assert torch.equal(evaluate(x, ("laplacian",)).laplacian, expected)
        assert evaluate._runners[kept.plan.ask] is kept, "what is used stays"
        assert evaluate.plan_bytes <= 100_000
    monkeypatch.setattr(evaluator, "MAX_PLAN_BYTES", 0)
    evaluate(x, ("gradient",))
    assert [ask.quantities for ask in evaluate._runners] == [{"gradient"}]


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_written_where_the_caller_wants_them(backend):
    evaluate = Evaluator(fullyConnectedNN([4, 8, 2], TANH, dtype=torch.float64), backend=backend)
    x = torch.randn(1000, 4, dtype=torch.float64)
    places = {
        "value": torch.full((1000, 2), torch.nan).double(),
        "hessian": torch.full((1000, 4, 4, 2), torch.nan).double(),
    }
    found, alone = evaluate(x, ("value", "hessian"), out=places), evaluate(x, ("value", "hessian"))
    assert found.value is places["value"]
    for name, place in places.items():
        assert torch.equal(place, getattr(alone, name)), name


@pytest.mark.parametrize(
    "out",
    [
        {},
        {"value": torch.empty(9, 2)},
        {"value": torch.empty(10, 2).double()},
        {"value": torch.empty(2, 10).T},
        {"value": torch.empty(10, 2), "hessian": torch.empty(10, 4, 4, 2)},
    ],
    ids=["none", "shape", "dtype", "strides", "another"],
)
def test_places_that_do_not_fit_are_refused(out):
    with pytest.raises(ShapeError, match="expected"):
        Evaluator(fullyConnectedNN([4, 8, 2], TANH))(torch.randn(10, 4), ("value",), out=out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_something_else_may_be_done_between_two_tiles(backend, threads):
    evaluate = Evaluator(NETWORKS["residual"](), threads=threads, backend=backend)
    x, other, between = torch.randn(20_000, 4), torch.randn(3, 4), []
    found = evaluate(x, ("value", "hessian"), between=lambda: between.append(evaluate(other, ("hessian",)).hessian))
    assert between
    assert torch.equal(found.hessian, evaluate(x, ("value", "hessian")).hessian)
    alone = evaluate(other, ("hessian",)).hessian
    assert all(torch.equal(hessian, alone) for hessian in between)
