"""The Triton kernel, interpreted: random programs, quantities, primitives, layers, bits, and what it compiles to."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import mpmath
import pytest
import torch
from torch import Tensor

from tests.engine import triton_interpreter  # noqa: F401

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the compiled kernel", allow_module_level=True)

from hessquik import Evaluator, ShapeError, evaluator, from_torch
from hessquik.backends import choice, gpu_compile
from hessquik.backends import triton as backend
from hessquik.backends.gpu_table import OPCODES
from hessquik.backends.gpu_unrolled import Unrolled, Unrolling
from hessquik.backends.torch import TorchProgram
from hessquik.backends.triton import TritonProgram, UnrolledProgram
from hessquik.evaluator import COMMON
from hessquik.layers import ICNNLayer, quadraticLayer, singleLayer, skipLayer
from hessquik.networks import NN, fullyConnectedNN, resnetNN
from hessquik.pointwise import PRIMITIVES
from hessquik.steps import Instruction, Map, Program
from hessquik.strided import Buffer, Space, View
from tests.engine.extensions import mishActivation
from tests.engine.step_reference import interpret, outputs_of, random_case
from tests.whole import choose

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


#: Tiles of one row, of a few, and of more than there are.
TILES = (Unrolling(rows=1, instances=4), Unrolling(rows=4, instances=2), Unrolling(rows=32, instances=1))


def run(
    program: Program, inputs: dict[str, Tensor], n: int, dtype: torch.dtype, tiles: Unrolling | None = None
) -> dict[str, Tensor]:
    """Run a program on the table kernel, or on a plan kernel if ``tiles`` are given; outputs are NaN before."""
    arrays = {name: array.to(dtype).contiguous() for name, array in inputs.items()}
    out = {name: torch.full((n, size), float("nan"), dtype=dtype) for name, size in outputs_of(program).items()}
    ready = TritonProgram(program, dtype, CPU) if tiles is None else UnrolledProgram(program, dtype, CPU, tiles)
    ready.run({**arrays, **out}, 0, n)
    return out


@pytest.mark.parametrize("seed", choose(range(1), range(4)))
def test_random_programs(seed: int) -> None:
    dtype = (torch.float32, torch.float64)[seed % 2]
    case = random_case(seed, vector=4, count=8)
    n = (5, 3, 2, 1)[seed % 4]
    inputs = case.inputs(n)
    expected = interpret(case.program, inputs, n, 3)
    found = run(case.program, inputs, n, dtype)
    for name, wanted in expected.items():
        torch.testing.assert_close(
            found[name].double(), wanted, rtol=3000 * torch.finfo(dtype).eps, atol=3000 * torch.finfo(dtype).eps
        )
    unrolled = run(case.program, inputs, n, dtype, TILES[seed % 3])
    assert all(torch.equal(unrolled[name], array) for name, array in found.items()), "interpreted, both round alike"


@pytest.mark.parametrize("seed", choose(range(4, 6), range(4, 12)))
def test_kernels_made_for_random_programs(seed: int) -> None:
    dtype = (torch.float32, torch.float64)[seed % 2]
    case = random_case(seed, vector=4, count=8)
    n = (1, 9, 3, choose(34, 70))[seed % 4]
    inputs = case.inputs(n)
    found = run(case.program, inputs, n, dtype, TILES[seed % 3] if n < 10 else TILES[2])
    bound = 3000 * torch.finfo(dtype).eps
    for name, wanted in interpret(case.program, inputs, n, 3).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=bound, atol=bound)


def _map_of(op: str, dtype: torch.dtype, *operands: Tensor) -> Tensor:
    """Return the results of a primitive on the kernel."""
    columns = operands[0].numel()
    inputs = tuple(
        View(Buffer(Space.INPUT, columns, f"x{i}"), (1, 1, columns), (0, 0, 1)) for i in range(len(operands))
    )
    out = View(Buffer(Space.OUTPUT, columns, "y"), (1, 1, columns), (0, 0, 1))
    step = Map(inputs, (Instruction(op, tuple(range(len(operands)))),), ((len(operands), out),))
    program = Program((), (step,), 0, 0, 4)
    return run(program, {f"x{i}": x[None] for i, x in enumerate(operands)}, 1, dtype)["y"][0]


SPECIAL = [
    0.0,
    -0.0,
    1e30,
    -1e30,
    float("inf"),
    -float("inf"),
    float("nan"),
    1e-30,
    -1e-8,
    88.0,
    -88.0,
    1.0,
    -1.0,
    20.5,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", sorted(PRIMITIVES))
def test_primitives_agree_with_their_definition(op: str, dtype: torch.dtype) -> None:
    assert op in OPCODES
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [torch.tensor(SPECIAL), torch.randn(60, generator=generator), 12 * torch.randn(54, generator=generator)]
    )
    operands = [x.roll(3 * i).to(dtype) for i in range(PRIMITIVES[op].arity)]
    found = _map_of(op, dtype, *operands)
    expected = PRIMITIVES[op].on_tensors(*operands)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # Torch takes the normal distribution's lower tail from a difference; it is compared with exact numbers below.
    least = eps if op == "ndtr" else tiny
    close = (found - expected).abs() <= 4 * eps * expected.abs() + least
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert (close | same).all(), (x[~(close | same)], found[~(close | same)], expected[~(close | same)])


EXACT = {
    "exp": mpmath.exp, "expm1": mpmath.expm1, "log": mpmath.log, "log1p": mpmath.log1p, "tanh": mpmath.tanh,
    "erf": mpmath.erf, "atan": mpmath.atan, "ndtr": lambda x: mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", sorted(EXACT))
def test_primitives_are_accurate_to_two_units_in_the_last_place(op: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([scale * torch.randn(48, generator=generator) for scale in (1e-3, 1.0, 10.0)]).to(dtype)
    x = x.abs() if op in {"log", "log1p"} else x
    found = _map_of(op, dtype, x)
    with mpmath.workdps(40):
        for argument, value in zip(x.tolist(), found.tolist(), strict=True):
            exact = EXACT[op](mpmath.mpf(argument))
            # The argument of the error function is rounded, which the tail multiplies by its square.
            bound = 2 + argument**2 if op == "ndtr" else 2
            close = bound * torch.finfo(dtype).eps * abs(exact) + torch.finfo(dtype).tiny
            assert abs(mpmath.mpf(value) - exact) <= close, argument


def _networks() -> dict[str, NN]:
    torch.manual_seed(3)
    return {
        "full": fullyConnectedNN([5, 18, 7, 2]),
        "residual": resnetNN(3, 4, 1),
        "convex": NN(ICNNLayer(4, None, 6), ICNNLayer(4, 6, 5), quadraticLayer(9, 2)),
    }


ALL = ("value", "gradient", "hessian", "laplacian", "jvp", "hvp", "curvature")


#: One network in one dtype, or all in both.
CASES = choose(
    [("convex", torch.float64)],
    [(name, dtype) for name in ("full", "residual", "convex") for dtype in (torch.float32, torch.float64)],
)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_all_quantities(name: str, dtype: torch.dtype) -> None:
    network = _networks()[name].double()
    evaluate = Evaluator(network, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, evaluate.d, generator=generator).to(dtype)
    v = torch.randn(2, evaluate.d, generator=generator).to(dtype)
    plan = evaluate.plan(ALL, directions=v)
    expected = evaluate(x, ALL, directions=v)
    out = {quantity: torch.full_like(getattr(expected, quantity), float("nan")) for quantity in ALL}
    TritonProgram(plan.program, dtype, CPU).run({"x": x, "directions": v, **out}, 0, 3)
    unrolled = {quantity: torch.full_like(array, float("nan")) for quantity, array in out.items()}
    UnrolledProgram(plan.program, dtype, CPU, TILES[1]).run({"x": x, "directions": v, **unrolled}, 0, 3)
    for quantity, found in out.items():
        wanted = getattr(expected, quantity)
        bound = 200 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound * (1 + wanted.abs().max().item()))
        assert torch.equal(unrolled[quantity], found), "interpreted, both round alike"


class Skips(torch.nn.Module):
    """A module whose import has skip layers that mix, carry features along and add offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (torch.nn.Linear(*sizes) for sizes in ((2, 3), (5, 3), (5, 2)))

    def forward(self, x: Tensor) -> Tensor:
        u = torch.cat([torch.tanh(self.first(x)), x], 1)
        return self.last(torch.cat([torch.tanh(self.second(u)), x], 1)) + 0.5 * x


def test_skip_layers_of_an_imported_network() -> None:
    torch.manual_seed(0)
    network = from_torch(Skips().double())
    assert sum(isinstance(layer, skipLayer) for layer in network) == 2
    evaluate, x = Evaluator(network), torch.randn(3, 2, dtype=torch.float64)
    for asked in choose([("gradient",)], [(name,) for name in ("value", "gradient", "hessian", "laplacian")]):
        (expected,) = (getattr(evaluate(x, asked), name) for name in asked)
        out = {name: torch.full_like(expected, float("nan")) for name in asked}
        TritonProgram(evaluate.plan(asked).program, torch.float64, CPU).run({"x": x, **out}, 0, 3)
        torch.testing.assert_close(out[asked[0]], expected, rtol=1e-13, atol=1e-13)


def test_a_users_activation_and_quantity_run_in_the_kernel(registered) -> None:
    registered("squared_slope", "m", 1, lambda at: (at.gradient * at.gradient).sum(-2, keepdim=True))
    f = NN(singleLayer(3, 4, mishActivation()), singleLayer(4, 2)).double()
    plan = Evaluator(f).plan(("squared_slope",))
    x = torch.randn(3, 3, dtype=torch.float64)
    found = torch.full((3, 2), float("nan"), dtype=torch.float64)
    TritonProgram(plan.program, torch.float64, CPU).run({"x": x, "squared_slope": found}, 0, 3)
    torch.testing.assert_close(found, f(x, do_gradient=True)[1].square().sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tiles", choose([TILES[1]], [None, *TILES]))
def test_bits_do_not_depend_on_company_position_or_tile(tiles: Unrolling | None) -> None:
    evaluate = Evaluator(fullyConnectedNN(choose([3, 20, 1], [3, 20, 20, 1])), dtype=torch.float32)
    quantities = ("value", "gradient", "hessian")
    program = TritonProgram(evaluate.plan(quantities).program, torch.float32, CPU)
    if tiles is not None:
        program = UnrolledProgram(evaluate.plan(quantities).program, torch.float32, CPU, tiles)
    x = torch.randn(37, 3, generator=torch.Generator().manual_seed(4))

    def evaluated(rows: Tensor) -> Tensor:
        shapes = {"value": (1,), "gradient": (3, 1), "hessian": (3, 3, 1)}
        out = {name: torch.full((len(rows), *shape), float("nan")) for name, shape in shapes.items()}
        program.run({"x": rows, **out}, 0, len(rows))
        return torch.cat([array.flatten(1) for array in out.values()], 1)

    whole = evaluated(x)
    assert torch.equal(evaluated(x[36:]), whole[36:])
    assert torch.equal(evaluated(x.flip(0)[:7]), whole.flip(0)[:7])


def test_other_rows_are_left_alone() -> None:
    evaluate = Evaluator(fullyConnectedNN([2, 4, 1]), dtype=torch.float64)
    x = torch.randn(6, 2, dtype=torch.float64)
    value = torch.full((6, 1), 7.0, dtype=torch.float64)
    TritonProgram(evaluate.plan(("value",)).program, torch.float64, CPU).run({"x": x, "value": value}, 2, 4)
    assert torch.equal(value[[0, 1, 4, 5]], torch.full((4, 1), 7.0, dtype=torch.float64))
    torch.testing.assert_close(value[2:4], evaluate(x[2:4]).value)


def test_maps_with_more_values_than_registers() -> None:
    columns, count = 5, 12
    inputs = tuple(View(Buffer(Space.INPUT, columns, f"x{i}"), (1, 1, columns), (0, 0, 1)) for i in range(count))
    out = View(Buffer(Space.OUTPUT, columns, "y"), (1, 1, columns), (0, 0, 1))
    instructions = [Instruction("exp", (i,)) for i in range(count)]
    total = count
    for i in range(1, count):
        instructions.append(Instruction("add", (total, count + i)))
        total = count + len(instructions) - 1
    program = Program((), (Map(inputs, tuple(instructions), ((total, out),)),), 0, 0, 4)
    given = {f"x{i}": torch.randn(2, columns, dtype=torch.float64) for i in range(count)}
    found = run(program, given, 2, torch.float64)["y"]
    torch.testing.assert_close(found, sum(x.exp() for x in given.values()))


@pytest.mark.parametrize("failures", choose([4], [1, 4]))
def test_smaller_tiles_when_memory_is_short(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    evaluate = Evaluator(fullyConnectedNN([2, 4, 1]), dtype=torch.float64)
    program = TritonProgram(evaluate.plan(("value",)).program, torch.float64, CPU)
    make, asked, freed = program._scratch, [], []

    def scratch(count: int) -> Tensor:
        asked.append(count)
        if len(asked) <= failures:
            raise torch.OutOfMemoryError("no memory")
        return make(count)

    monkeypatch.setattr(program, "_scratch", scratch)
    monkeypatch.setattr(program._state, "free_memory", lambda: freed.append(len(asked)))
    x = torch.randn(10, 2, dtype=torch.float64)
    value = torch.full((10, 1), float("nan"), dtype=torch.float64)
    program.run({"x": x, "value": value}, 0, 10)
    torch.testing.assert_close(value, evaluate(x).value)
    assert freed[0] == 1, "cached memory is given back before tiles become smaller"
    assert asked[-1] < asked[0] or failures == 1
    monkeypatch.setattr(program, "_scratch", lambda count: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        program.run({"x": x, "value": value}, 0, 10)


_COMPILE = """
import json, sys, torch
from hessquik.backends.gpu_compile import BLOCKS, compile_kernel
found = {}
for arch in map(int, sys.argv[2:]):
    for dtype in list(BLOCKS)[:int(sys.argv[1])]:
        kernel = compile_kernel(dtype, arch)
        shared, code = kernel.metadata.shared, len(kernel.kernel)
        found[f"{arch} {dtype}"] = {"shared": shared, "code": code, "tf32": "tf32" in kernel.asm["ptx"]}
print(json.dumps(found))
"""


def test_it_compiles_for_a_gpu_without_one(tmp_path: Path) -> None:
    # A cache of its own: the usual one may have binaries alone.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPILE, *choose(("1", "90"), ("2", "80", "90"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ran.returncode, ran.stderr
    for name, kernel in json.loads(ran.stdout).items():
        assert kernel["shared"] <= 160 << 10, name
        assert not kernel["tf32"], f"{name}: products must be in full precision"


_COMPILE_PLANS = """
import json, sys, torch
from benchmarks.gpu_kernels import resources
from hessquik import Evaluator, storage
from hessquik.backends.gpu_unrolled import source
from hessquik.backends.gpu_compile import compile_unrolled
from hessquik.backends.triton import MOST_FORMS, unrolling
from hessquik.device import GPU
from hessquik.evaluator import COMMON
from hessquik.plan import Ask, choose
found = {}
for arch, path, names in json.loads(sys.argv[1]):
    network = storage.load(path)
    for network in getattr(network, "members", [network])[:1]:
        forms, dtype, outputs = network.forms(), torch.float64, Evaluator(network).m
        for quantities in [names] if names else COMMON:
            plan = choose(forms, Ask(frozenset(quantities)), dtype, outputs, GPU)
            kernel = source(plan.program, dtype.itemsize, unrolling(dtype, arch))
            assert kernel.forms <= MOST_FORMS
            compiled = compile_unrolled(kernel, arch)
            used = resources(compiled.asm["cubin"])
            found[f"{arch} {path} {quantities}"] = {"shared": compiled.metadata.shared, "stack": used["stack"]}
print(json.dumps(found))
"""
MODELS = sorted(map(str, Path("models").glob("*.safetensors")))


@pytest.mark.parametrize("arch", choose([100], [80, 90, 100]))
def test_kernels_of_shipped_models_keep_their_numbers_in_registers(arch: int) -> None:
    """In the short form one kernel, for a GPU whose products in float64 need the most registers."""
    cases = choose([(arch, "models/ising_ring.safetensors", ["laplacian"])], [(arch, path, []) for path in MODELS])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPILE_PLANS, json.dumps(cases)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ran.returncode, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == choose(1, len(MODELS) * len(COMMON))
    for name, kernel in found.items():
        assert kernel["shared"] <= 160 << 10, name
        assert kernel["stack"] <= 64, f"{name}: registers are spilled"


def test_what_is_too_large_for_its_indices_is_refused() -> None:
    columns = 1 << 20
    x = View(Buffer(Space.INPUT, columns, "x"), (1, 1, columns), (0, 0, 1))
    y = View(Buffer(Space.OUTPUT, columns, "y"), (1, 1, columns), (0, 0, 1))
    step = Map((x,), (Instruction("neg", (0,)),), ((1, y),))
    with pytest.raises(ValueError, match="entries per row"):
        TritonProgram(Program((), (step,), 0, 0, 4), torch.float32, CPU)


@pytest.mark.parametrize("tiles", [None, TILES[0]], ids=["table", "own"])
def test_constants_are_freed_with_the_last_reference_to_a_program(tiles: Unrolling | None) -> None:
    program = Evaluator(fullyConnectedNN([3, 6, 1])).plan().program
    ready = (
        TritonProgram(program, torch.float32, CPU)
        if tiles is None
        else UnrolledProgram(program, torch.float32, CPU, tiles)
    )
    constants = [weakref.ref(constant) for constant in ready._keep]
    assert constants
    gc.disable()
    try:
        del ready
        assert not any(constant() for constant in constants)
    finally:
        gc.enable()


def test_memory_of_a_program_is_kept_until_its_streams_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator is told once of each stream that reads the program's constants and table."""
    device, told, launched = backend._Device(CPU), list[object](), list[object]()
    device.is_cuda, streams = True, iter([7, 7, 8, 7])
    monkeypatch.setattr(backend, "_shared_state", lambda _: device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "stream")
    monkeypatch.setattr(Tensor, "record_stream", lambda array, stream: told.append(array.data_ptr()))
    now = SimpleNamespace(get_current_stream=lambda index: next(streams))
    monkeypatch.setattr(backend.triton.runtime.driver, "_active", now)

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *given, stream: launched.append(stream)

    monkeypatch.setattr(device, "_compiled", lambda key, compiled: Kernel())
    program = TritonProgram(Evaluator(fullyConnectedNN([3, 6, 1])).plan().program, torch.float32, CPU)
    arrays = {"x": torch.zeros(2, 3), "value": torch.zeros(2, 1)}
    for _ in range(4):
        program.run(arrays, 0, 2)
    assert launched == [7, 7, 8, 7]
    held = [array.data_ptr() for array in (program._numbers, *program._keep)]
    assert told == held * 2


def test_backend_names_its_kernel_once() -> None:
    assert backend.is_available(CPU)
    assert not backend.is_available(torch.device("meta"))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the Triton backend available on the CPU."""
    monkeypatch.setattr(choice, "names", lambda device: ("triton", "torch"))


def _kernel(evaluate: Evaluator, *quantities: str, **given: Tensor) -> type[TritonProgram]:
    """Return the class of the program that computes some quantities."""
    runner = evaluate._runner(evaluate._ask(quantities, given.get("weights"), given.get("directions")))
    return type(runner.run.__self__)  # type: ignore[attr-defined]


def test_common_questions_have_kernels_of_their_own_for_as_long_as_the_evaluator(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = fullyConnectedNN([2, 4, 2]).double()
    evaluate = Evaluator(network, backend="triton", compiled=COMMON)
    assert set(map(frozenset, evaluate.compiled)) == set(map(frozenset, COMMON))
    monkeypatch.setattr(backend, "define_kernel", lambda text: pytest.fail("a request compiles a kernel"))
    monkeypatch.setattr(evaluator, "MAX_PLANS", 1)
    for quantities in (*COMMON, COMMON[0]):
        assert _kernel(evaluate, *quantities) is _kernel(evaluate, *quantities[::-1]) is UnrolledProgram
        # Of the kept plans, other ones are dropped, but never these.
        assert _kernel(evaluate, "value", weights=torch.ones(2)) is TritonProgram
    assert _kernel(evaluate, "gradient") is TritonProgram
    x = torch.randn(1, 2, dtype=torch.float64)
    exact = Evaluator(network)(x, ("value", "gradient", "hessian", "laplacian"))
    for quantities in COMMON:
        found = evaluate(x, quantities)
        for name in quantities:
            torch.testing.assert_close(getattr(found, name), getattr(exact, name))


def test_without_a_list_one_kernel_answers_all(interpreted: None) -> None:
    evaluate = Evaluator(fullyConnectedNN([3, 6, 1]), backend="triton")
    assert {_kernel(evaluate, *quantities) for quantities in COMMON} == {TritonProgram}
    assert evaluate.compiled == ()


@pytest.mark.parametrize("limit", ["MOST_FORMS", "MEMORY_BYTES", "MOST_ENTRIES"])
def test_what_is_too_large_for_a_kernel_of_its_own_goes_to_the_table(
    interpreted: None, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    # A row's entries fit the indices, those of a tile do not.
    monkeypatch.setattr(backend, limit, {"MOST_FORMS": 3, "MEMORY_BYTES": 1 << 10, "MOST_ENTRIES": 500}[limit])
    evaluate = Evaluator(fullyConnectedNN([3, 6, 1]), backend="triton", compiled=COMMON)
    assert _kernel(evaluate, "value", "gradient", "hessian") is TritonProgram


@pytest.mark.parametrize("limit", ["MOST_ENTRIES", "LARGEST_ROW_NUMBERS", "CALL_ARRAYS"])
def test_what_is_too_large_for_the_table_goes_to_torch(
    interpreted: None, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(backend, limit, 1)
    evaluate, x = Evaluator(fullyConnectedNN([3, 6, 1]), backend="triton", compiled=[("hessian",)]), torch.randn(2, 3)
    for quantities in (("hessian",), ("gradient", "hessian")):
        assert _kernel(evaluate, *quantities) is TorchProgram
        assert evaluate(x, quantities).hessian.shape == (2, 3, 3, 1)


def test_only_questions_that_can_be_asked_are_compiled() -> None:
    for names in ([], ["hvp"], ["value", "nothing"]):
        with pytest.raises(ShapeError, match="expected quantities to compile out of value, gradient"):
            Evaluator(fullyConnectedNN([3, 6, 1]), compiled=[("value",), names])
    assert Evaluator(fullyConnectedNN([3, 6, 1]), compiled=COMMON).compiled == (), "a CPU has no such kernels"


_COMPILE_AHEAD = """
import os, sys, triton
sys.path.insert(0, sys.argv[1])
from hessquik import Evaluator
from hessquik.backends import gpu_compile
from hessquik.backends.gpu_unrolled import source
from hessquik.backends.triton import unrolling
from hessquik.networks import fullyConnectedNN
import torch
evaluate = Evaluator(fullyConnectedNN([3, 6, 1]))
plans = [evaluate.plan(quantities).program for quantities in (("value",), ("value", "gradient"))]
kernels = [source(program, 4, unrolling(torch.float32, 90)) for program in plans]
os.sched_getaffinity = lambda _: range(int(sys.argv[2]))
gpu_compile.compile_ahead(kernels, 90)
hits = []
triton.knobs.compilation.listener = lambda **found: hits.append(found["cache_hit"])
for kernel in kernels:
    gpu_compile.compile_unrolled(kernel, 90)
print(*hits)
gpu_compile.subprocess = None
gpu_compile.compile_ahead(kernels, 90)
"""


@pytest.mark.parametrize("processors", choose([2], [1, 2]))
def test_kernels_are_compiled_in_processes_and_once(tmp_path: Path, processors: int) -> None:
    cache, packages = tmp_path / "cache", tmp_path / "packages"
    packages.mkdir()
    # A package that only this process's path has, as those of a checkout that is not installed.
    (packages / "sitecustomize.py").write_text(f"open({str(tmp_path / 'found')!r}, 'a').write('x')")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPILE_AHEAD, packages, str(processors)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "True True\n"
    assert not list(cache.rglob("*.ptx")), "binaries alone"
    assert (tmp_path / "found").read_text() == "x" * processors, "they find packages where this process does"


def test_compiled_kernels_in_a_cache_that_is_read_only_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def touch(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_compile.os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(gpu_compile, "_compile_share", lambda kernels, arch: kernels)
    monkeypatch.setattr(Path, "touch", touch)
    gpu_compile.compile_ahead([Unrolled("a"), Unrolled("b")], 90)


def test_process_that_compiles_ends_with_the_one_that_it_compiles_for() -> None:
    command = [sys.executable, "-m", "hessquik.backends.gpu_compile", "90", "--plans"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    assert child.stdin is not None
    # A kernel that never ends to be read: its source waits.
    text = "import time; time.sleep(600)"
    child.stdin.write(json.dumps([{"text": text, "arguments": []}]).encode() + b"\n")
    child.stdin.close()
    assert child.wait(60) == 1


@pytest.mark.parametrize("is_writable", [True, False])
def test_workers_of_several_devices_compile_a_kernel_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_writable: bool
) -> None:
    folder, compiled, both = tmp_path / "cache", list[object](), threading.Barrier(2)
    if not is_writable:
        folder.write_text("not a folder")

    def compile_share(kernels: list[Unrolled], arch: int) -> list[Unrolled]:
        if not is_writable:
            both.wait(10)  # nothing makes one wait for the other
        compiled.extend(kernels)
        return kernels

    def load(_: int) -> None:
        gpu_compile.compile_ahead([Unrolled("a")], 90)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(gpu_compile, "_compile_share", compile_share)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load, range(2)))
    assert len(compiled) == (1 if is_writable else 2)


@pytest.mark.parametrize("python", ["/bin/false", "/no/python"])
def test_kernels_that_cannot_be_compiled_ahead_are_left_to_the_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, python: str
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_compile.sys, "executable", python)
    monkeypatch.setattr(gpu_compile.os, "sched_getaffinity", lambda _: range(2))
    gpu_compile.compile_ahead([Unrolled("a"), Unrolled("b")], 90)
    assert [path.name for path in tmp_path.iterdir()] == ["hessquik.lock"]


@pytest.mark.parametrize(("failures", "what"), [(1, "out of memory"), (9, "out of memory"), (9, "invalid image")])
def test_kernels_are_loaded_before_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, failures: int, what: str
) -> None:
    """A device whose memory is full of what torch keeps for later has room after that is freed."""
    device, turns, freed = backend._Device(CPU), list[object](), list[object]()
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(device, "free_memory", lambda: freed.append(len(turns)))

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> None:
            turns.append(grid)
            if len(turns) <= failures:
                raise RuntimeError(f"Triton Error [CUDA]: {what}")

    kernel = Kernel()
    if failures == 1:
        assert device._compiled("a", lambda: kernel) is kernel
    else:
        expected = torch.OutOfMemoryError if what == "out of memory" else RuntimeError
        with pytest.raises(expected, match=what) as error:
            device._compiled("a", lambda: kernel)
        assert type(error.value) is expected
        assert not device._kernels
    assert freed == [1] * (what == "out of memory")


def test_load_compiles_both_table_kernels_and_those_of_its_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    device, ahead = backend._Device(CPU), list[object]()
    device.is_cuda, compiled = True, list[object]()
    monkeypatch.setattr(backend, "_shared_state", lambda _: device)
    monkeypatch.setattr(backend, "compile_ahead", lambda kernels, arch: ahead.extend(kernels))
    for name in ("compile_kernel", "compile_unrolled"):
        monkeypatch.setattr(backend, name, lambda kernel, arch: compiled.append(kernel) or {(1, 1, 1): None})
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    evaluate = Evaluator(fullyConnectedNN([3, 6, 1]))
    programs = [evaluate.plan(quantities).program for quantities in COMMON]
    for _ in range(2):
        ready = backend.ready_programs(programs, torch.float32, CPU)
        assert list(map(type, ready)) == [UnrolledProgram] * 4
        assert len(compiled) == 6, "two table kernels and four of plans, once"
    assert len(ahead) == 12
