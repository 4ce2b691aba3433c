"""The CPU kernel on every kind of vector: right numbers, bits that depend on the row alone, and hostile values."""

import gc
import math
import os
import subprocess
import sys
import threading

import mpmath
import pytest
import torch

from hessquik.backends import cpu
from hessquik.backends.cpu import CpuProgram, build, packing, structures
from hessquik.pointwise import PRIMITIVES
from hessquik.steps import Instruction, Map, Product, Program
from hessquik.strided import Buffer, Space, View
from tests.engine.step_reference import interpret, outputs_of, random_case
from tests.test_layering import ROOT
from tests.whole import choose

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no kernel was built")
DTYPES = [torch.float32, torch.float64]
VECTOR_BYTES = [16, 32, 64]
SEEDS = range(choose(12, 40))


@pytest.fixture(params=VECTOR_BYTES, ids="{} bytes".format)
def vector_bytes(request):
    if request.param > cpu.vector_bytes():
        pytest.skip("this processor has no such vectors")
    return request.param


def run(program, inputs, n, dtype, tile_rows, vector_bytes=None, start=0, stop=None):
    arrays = {name: array.to(dtype).contiguous() for name, array in inputs.items()}
    outputs = {name: torch.full((n, size), math.nan, dtype=dtype) for name, size in outputs_of(program).items()}
    CpuProgram(program, dtype, tile_rows, vector_bytes).run({**arrays, **outputs}, start, n if stop is None else stop)
    return outputs


def assert_same_bits(left, right):
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}
    for name, array in left.items():
        assert torch.equal(array.view(integer[array.dtype]), right[name].view(integer[array.dtype])), name


# ---- Programs ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_give_the_numbers_of_their_definition(seed, dtype, vector_bytes):
    case, n = random_case(seed, vector=(16, 32)[seed % 2]), 7
    inputs = case.inputs(n)
    expected = interpret(case.program, inputs, n, tile_rows=4)
    found = run(case.program, inputs, n, dtype, 3, vector_bytes)
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-12}[dtype]
    for name, array in expected.items():
        error = float((found[name].double() - array).abs().max())
        assert error <= tolerance * max(1.0, float(array.abs().max())), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_rows_bits_depend_neither_on_the_tile_nor_on_the_other_rows(seed, dtype, vector_bytes):
    case, n = random_case(seed), 23
    inputs = case.inputs(n)
    expected = run(case.program, inputs, n, dtype, 23, vector_bytes)
    for tile_rows in (1, 2, 5, 16, 64):
        assert_same_bits(run(case.program, inputs, n, dtype, tile_rows, vector_bytes), expected)
    alone = {name: array[17:18] if name in case.each else array for name, array in inputs.items()}
    found = run(case.program, alone, 1, dtype, 8, vector_bytes)
    assert_same_bits(found, {name: array[17:18] for name, array in expected.items()})
    hostile = {name: array.clone() for name, array in inputs.items()}
    for i, value in enumerate((0.0, 1e30, 1e-40, math.inf, math.nan, -math.inf)):
        for name in case.each:
            hostile[name][4 * i] = value
    found = run(case.program, hostile, n, dtype, 5, vector_bytes)
    kept = [row for row in range(n) if row % 4]
    assert_same_bits({k: v[kept] for k, v in found.items()}, {k: v[kept] for k, v in expected.items()})


def test_rows_beside_the_wanted_ones_are_left_alone(vector_bytes):
    case, n = random_case(3), 9
    inputs = case.inputs(n)
    whole = run(case.program, inputs, n, torch.float32, 2, vector_bytes)
    part = run(case.program, inputs, n, torch.float32, 2, vector_bytes, start=4, stop=7)
    for name, array in part.items():
        assert torch.equal(array[4:7], whole[name][4:7])
        assert array[[0, 1, 2, 3, 7, 8]].isnan().all()


def test_numbers_behind_the_callers_arrays_are_neither_read_nor_written():
    """Every array ends at the end of a page, and the next page is protected."""
    script = f"""
import ctypes, mmap, torch
from tests.engine.step_reference import outputs_of, random_case
from hessquik.backends.cpu import CpuProgram
libc = ctypes.CDLL(None)
kept = []
def guarded(size, dtype):
    count = size * dtype.itemsize
    pages = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=pages - count) if size else torch.empty(0)
for seed in range({choose(4, 12)}):
    case = random_case(seed)
    for dtype in (torch.float32, torch.float64):
        arrays = {{k: guarded(v.numel(), dtype).copy_(v.flatten()) for k, v in case.inputs(5).items()}}
        arrays |= {{name: guarded(5 * size, dtype) for name, size in outputs_of(case.program).items()}}
        for vector_bytes in {[bytes_ for bytes_ in VECTOR_BYTES if bytes_ <= cpu.vector_bytes()]}:
            CpuProgram(case.program, dtype, 2, vector_bytes).run(arrays, 0, 5)
print("done", flush=True)
import os; os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240)
    assert done.stdout == "done\n", done.stderr


def test_threads_run_one_program_at_once():
    case, n = random_case(5), 400
    inputs = case.inputs(n)
    expected = run(case.program, inputs, n, torch.float64, 16)
    program = CpuProgram(case.program, torch.float64, 16)
    arrays = {name: array.contiguous() for name, array in inputs.items()}
    results = [{name: torch.empty_like(array) for name, array in expected.items()} for _ in range(8)]

    def work(outputs):
        for _ in range(5):
            program.run({**arrays, **outputs}, 0, n)

    threads = [threading.Thread(target=work, args=(outputs,)) for outputs in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs in results:
        assert_same_bits(outputs, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_programs_run_after_a_fork():
    """The test forks in a new process, since other tests load libraries with threads, which makes fork unsafe."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, check=False, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


FORK = """
import os, torch
from tests.engine.step_reference import random_case
from tests.engine.test_cpu_backend import run
case = random_case(6)
inputs = case.inputs(5)
expected = run(case.program, inputs, 5, torch.float32, 2)
child = os.fork()
found = run(case.program, inputs, 5, torch.float32, 2)
is_equal = bool(expected) and all(torch.equal(found[name], array) for name, array in expected.items())
if child == 0:
    os._exit(0 if is_equal else 1)
assert is_equal and os.waitpid(child, 0)[1] == 0
"""


# ---- Primitives ----

EXTREME = [
    0.0,
    -0.0,
    1e30,
    -1e30,
    math.inf,
    -math.inf,
    math.nan,
    1e-40,
    -1e-40,
    1.0,
    -1.0,
    88.0,
    -88.0,
    1e-20,
    -1e-20,
]
#: Where a primitive's result is a normal number and not constant.
RANGES = {
    "exp": (-87.0, 88.5), "expm1": (-20.0, 88.5), "log": (1e-6, 1e6), "log1p": (-0.9999, 1e6), "tanh": (-12.0, 12.0),
    "sigmoid": (-86.0, 30.0), "erf": (-5.0, 5.0), "ndtr": (-12.5, 8.0), "sin": (-300.0, 300.0),
    "cos": (-300.0, 300.0), "atan": (-1e4, 1e4), "sqrt": (0.0, 100.0),
}  # fmt: skip
#: Largest error, in units of the last place; far out, ndtr is a product of four rounded factors.
ULPS = {"ndtr": 5.0}
MOST_ULPS = 4.0


def apply(op, operands, dtype, vector_bytes):
    """Apply a primitive to vectors of numbers, arranged in rows of 13 columns, which fill no whole SIMD vector."""
    columns = 13
    count = operands[0].numel()
    rows = -(-count // columns)
    padded = [torch.nn.functional.pad(x, (0, rows * columns - count)).to(dtype) for x in operands]
    names = [f"x{i}" for i in range(len(operands))]
    views = [View(Buffer(Space.INPUT, columns, name), (1, 1, columns), (0, 0, 1)) for name in names]
    out = View(Buffer(Space.OUTPUT, columns, "out"), (1, 1, columns), (0, 0, 1))
    step = Map(tuple(views), (Instruction(op, tuple(range(len(views)))),), ((len(views), out),))
    inputs = dict(zip(names, (x.view(rows, columns) for x in padded), strict=True))
    program = Program((), (step,), 0, 0, 16)
    return run(program, inputs, rows, dtype, 16, vector_bytes)["out"].flatten()[:count]


def ulps(found, exact, dtype):
    exact = exact.double()
    last = (
        torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(torch.finfo(dtype).tiny)))) * torch.finfo(dtype).eps
    )
    return (found.double() - exact).abs() / last


def definition(op, x):
    # torch computes ndtr as a difference where it is small.
    return torch.special.erfc(-x / math.sqrt(2)) / 2 if op == "ndtr" else PRIMITIVES[op].on_tensors(x)


@pytest.mark.parametrize("op", sorted(RANGES))
def test_primitives_are_accurate_in_float32_on_dense_grids(op, vector_bytes):
    low, high = RANGES[op]
    near = torch.linspace(max(low, -2.0), min(high, 2.0), 40_001).double()
    tiny = torch.logspace(-37, 0, 4001)
    tiny = torch.cat([tiny, -tiny[-tiny > low]]).double()
    x = torch.cat([torch.linspace(low, high, 40_001).double(), near, tiny]).float()
    x = x[(x >= low) & (x <= high)]
    exact = definition(op, x.double())
    kept = (exact.abs() >= torch.finfo(torch.float32).tiny) | (exact == 0)
    error = ulps(apply(op, [x], torch.float32, vector_bytes), exact, torch.float32)[kept]
    assert float(error.max()) <= ULPS.get(op, MOST_ULPS), float(x[kept][error.argmax()])


EXACT = {
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "ndtr": lambda x: mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
}


@pytest.mark.parametrize("op", sorted(RANGES))
def test_primitives_are_accurate_in_float64(op, vector_bytes):
    low, high = {"exp": (-708.0, 709.0), "ndtr": (-37.0, 8.0), "sigmoid": (-700.0, 40.0)}.get(op, RANGES[op])
    generator = torch.Generator().manual_seed(0)
    x = low + (high - low) * torch.rand(150, generator=generator, dtype=torch.float64)
    near = torch.cat(
        [torch.randn(150, generator=generator, dtype=torch.float64), 10.0 ** -torch.arange(1, 30).double()]
    )
    x = torch.cat([x, near[(near >= low) & (near <= high)]])
    found = apply(op, [x], torch.float64, vector_bytes)
    exact = EXACT.get(op, getattr(mpmath, op, None))
    with mpmath.workdps(40):
        for argument, result in zip(x.tolist(), found.tolist(), strict=True):
            truth = exact(mpmath.mpf(argument))
            unit = math.ulp(float(truth))
            assert abs(float(truth - mpmath.mpf(result))) <= ULPS.get(op, MOST_ULPS) * unit, argument


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", sorted(PRIMITIVES))
def test_extreme_values_are_those_of_the_definition(op, dtype, vector_bytes):
    values = torch.tensor(EXTREME, dtype=torch.float64).to(dtype)
    operands = list(torch.cartesian_prod(*[values] * PRIMITIVES[op].arity).reshape(-1, PRIMITIVES[op].arity).T)
    found = apply(op, operands, dtype, vector_bytes)
    tiny = torch.finfo(dtype).tiny
    flushed = [torch.where(x.abs() < tiny, torch.copysign(torch.zeros_like(x), x), x) for x in operands]
    expected = PRIMITIVES[op].on_tensors(*(x.double() for x in flushed)).to(dtype)
    if op == "ndtr":
        expected = definition(op, flushed[0].double()).to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    kept = ~expected.isnan()
    found, expected = found[kept], torch.where(expected.abs() < tiny, torch.zeros_like(expected), expected)[kept]
    finite = expected.isfinite()
    assert torch.equal(found[~finite], expected[~finite])
    tolerance = 8 * torch.finfo(dtype).eps
    # Copies and changes of sign keep the smallest numbers, which arithmetic counts as zero.
    assert ((found - expected).abs()[finite] <= tolerance * expected.abs()[finite] + tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sines_of_large_angles_are_right(dtype, vector_bytes):
    x = torch.tensor([1e3, -2e3, 12345.678, 1e6, -1e8, 1e15, 3e20, -1e30, 5.5e5], dtype=torch.float64).to(dtype)
    for op in ("sin", "cos"):
        exact = torch.tensor([float(getattr(mpmath, op)(mpmath.mpf(a))) for a in x.double().tolist()])
        with mpmath.workdps(60):
            exact = torch.tensor(
                [float(getattr(mpmath, op)(mpmath.mpf(a))) for a in x.double().tolist()], dtype=torch.float64
            )
        assert float(ulps(apply(op, [x], dtype, vector_bytes), exact, dtype).max()) <= MOST_ULPS


def test_the_smallest_numbers_count_as_zero_whatever_the_thread_is_set_to(vector_bytes):
    x = torch.full((40,), 1e-40)
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            found = apply("mul", [x, torch.full((40,), 2.0)], torch.float32, vector_bytes)
        finally:
            torch.set_flush_denormal(False)
        assert (found == 0).all()
    assert float(torch.full((1,), 1e-40) * 0.5) > 0, "the thread's own setting is as it was"


# ---- Constants, the built library and misuse ----


def linear(matrix):
    p, q = matrix.shape
    x = View(Buffer(Space.INPUT, p, "x"), (1, 1, p), (0, 0, 1))
    b = View(Buffer(Space.CONSTANT, p * q, is_shared=True), (1, p, q), (0, q, 1))
    out = View(Buffer(Space.OUTPUT, q, "out"), (1, 1, q), (0, 0, 1))
    return Program((), (Product(x, b, None, out),), 0, 0, 16, (matrix,))


def kinds(words):
    """Return the names of the steps of a translated program."""
    names = {structures.CONSTANTS[name]: name for name in ("Product", "Map", "Contract", "Clear")}
    numbers = memoryview(words).cast("q")
    place, found = len(structures.pack("Program", {})) // 8, []
    while place < len(numbers):
        kind, size, _ = numbers[place : place + 3]
        found.append(names[kind])
        place += size
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [1, 3, 5])
@pytest.mark.parametrize("added", [None, "number", "constant", "array"])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 64])
def test_a_constants_only_column_is_multiplied_like_a_row(width, entries, added, dtype, vector_bytes):
    pitch = -(-width // 16) * 16
    x = View(Buffer(Space.INPUT, entries * width, "x"), (1, entries, width), (0, width, 1))
    tile = View(Buffer(Space.TILE, entries * pitch), (1, entries, width), (0, pitch, 1))
    square = Map((x,), (Instruction("mul", (0, 0)),), ((1, tile),))
    column = Buffer(Space.CONSTANT, width, is_shared=True)
    out = View(Buffer(Space.OUTPUT, entries, "out"), (1, entries, 1), (0, 1, 1))
    add = {
        None: None,
        "number": View(Buffer(Space.CONSTANT, 1, constant=1, is_shared=True), (1, entries, 1), (0, 0, 1)),
        "constant": View(Buffer(Space.CONSTANT, entries, constant=2, is_shared=True), (1, entries, 1), (0, 1, 1)),
        "array": tile.part(2, width - 1, width),
    }[added]
    product = Product(tile, View(column, (1, width, 1), (0, 1, 1)), add, out)
    shapes = ((width, 1), (1, 1), (entries, 1))
    constants = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    program = Program((), (square, product), entries * pitch, 0, 16, constants)
    inputs = {"x": torch.randn(11, entries * width)}
    expected = interpret(program, {"x": inputs["x"].double()}, 11, tile_rows=4)
    run(program, {"x": torch.full((11, entries * width), math.inf)}, 11, dtype, 4, vector_bytes)  # into the memory
    found = run(program, inputs, 11, dtype, 4, vector_bytes)
    assert torch.allclose(found["out"].double(), expected["out"], rtol=0, atol=1e-4)
    for row in range(11):
        alone = run(program, {"x": inputs["x"][row : row + 1]}, 1, dtype, 4, vector_bytes)
        assert_same_bits(alone, {"out": found["out"][row : row + 1]})
    found = kinds(CpuProgram(program, dtype, 4, vector_bytes)._words)
    assert [kind for kind in found if kind != "Clear"] == ["Map", "Contract"]


def test_programs_share_constants_which_go_with_the_last_of_them():
    gc.collect()
    before = len(packing._known)
    matrix = torch.randn(30, 20, dtype=torch.float64)
    programs = [CpuProgram(linear(matrix.clone()), torch.float32, 4) for _ in range(3)]
    assert len(packing._known) == before + 1
    assert all(program._constants == programs[0]._constants for program in programs)  # the same objects
    assert programs[0]._constants[0].nbytes >= 30 * 20 * 4
    del programs[:2]
    assert len(packing._known) == before + 1
    programs.clear()
    gc.collect()
    assert len(packing._known) == before


def test_a_kernel_of_other_sources_is_not_used(monkeypatch):
    assert structures._load() is not None
    monkeypatch.setattr(structures, "fingerprint", lambda: "another")
    with pytest.warns(RuntimeWarning, match="built from other sources and is not used"):
        assert structures._load() is None


def test_a_missing_kernel_is_told_in_one_line():
    script = (
        "import sys; sys.modules['hessquik.backends.cpu._kernel'] = None\n"
        "from hessquik.backends import cpu; print(cpu.is_available())\n"
        "import hessquik; print(hessquik.Evaluator.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "False\nEvaluator\n", done.stderr
    assert done.stderr.count("the CPU kernel was not built") == 1


def test_the_fingerprint_is_that_of_every_source(monkeypatch, tmp_path):
    for path in build.FOLDER.glob("*.[ch]"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.fingerprint() == structures.KERNEL.sources
    for path in tmp_path.glob("*.[ch]"):
        contents = path.read_bytes()
        path.write_bytes(contents + b" ")
        assert build.fingerprint() != structures.KERNEL.sources, path
        path.write_bytes(contents)


def test_the_coefficients_are_those_of_the_script():
    script = build.FOLDER.parents[2] / "tools" / "fit_coefficients.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=240).stdout
    assert made == (build.FOLDER / "coefficients.h").read_text()


def test_vectors_that_the_processor_lacks_are_refused():
    program = linear(torch.ones(2, 2, dtype=torch.float64))
    for wrong in (8, 48, 128):
        with pytest.raises(ValueError, match=f"at most {cpu.vector_bytes()} here, got {wrong}"):
            CpuProgram(program, torch.float32, 4, wrong)


def test_misuse_of_the_module_is_an_error_and_no_crash():
    kernel = structures.KERNEL
    program = CpuProgram(linear(torch.ones(2, 2, dtype=torch.float64)), torch.float32, 4)
    with pytest.raises(TypeError):
        kernel.run(1)
    arrays = {"x": torch.zeros(1, 2), "out": torch.zeros(1, 2)}
    words, constants, addresses = program._words, program._addresses, bytes(16)
    kernel.run(words, constants, addresses, 0, 0)
    for wrong in (b"", words[:-8], words + bytes(8)):
        with pytest.raises(ValueError, match="the words of a program"):
            kernel.run(wrong, constants, addresses, 0, 1)
        with pytest.raises(ValueError, match="the words of a program"):
            kernel.bind(program, wrong, constants, torch.Tensor, 1, b"", (), b"")
    for wrong in (bytes(8), bytes(24)):
        with pytest.raises(ValueError, match="expected 2 addresses"):
            kernel.run(words, constants, wrong, 0, 1)
    with pytest.raises(ValueError, match="expected 1 addresses"):
        kernel.run(words, b"", addresses, 0, 1)
    with pytest.raises(ValueError, match="expected 1 addresses"):
        kernel.bind(program, words, bytes(16), torch.Tensor, 1, b"", (), b"")
    for arguments in ((0, constants, addresses), (words, 0, addresses), (words, constants, 0)):
        with pytest.raises(TypeError, match="bytes"):
            kernel.run(*arguments, 0, 1)
    with pytest.raises(TypeError):
        kernel.run(words, constants, addresses, "0", 1)
    slot = structures.CONSTANTS["MOST_AXES"] + 2
    for head in ((2, 2), (-2, 2), (0, -1), (0, slot - 1)):  # an array that the program lacks; no such number of axes
        wrong = cpu._words((*head, *[1] * (slot - 2)))
        for inputs, results in ((wrong, b""), (b"", wrong)):
            with pytest.raises(ValueError, match="arrays of the program"):
                kernel.bind(program, words, constants, torch.Tensor, 1, inputs, ("out",), results)
    with pytest.raises(ValueError, match="at most 3 arrays"):
        kernel.bind(program, words, constants, torch.Tensor, 1, bytes(4 * 8 * slot), (), b"")
    with pytest.raises(ValueError, match="a name for each result"):
        kernel.bind(program, words, constants, torch.Tensor, 1, b"", ("out",), b"")
    with pytest.raises(KeyError, match="out"):
        program.run({"x": arrays["x"]}, 0, 1)
    with pytest.raises(AttributeError, match="data_ptr"):
        program.run({"x": arrays["x"], "out": 1}, 0, 1)
    with pytest.raises(AttributeError, match="spce"):
        structures.pack("Array", {"spce": 1})
