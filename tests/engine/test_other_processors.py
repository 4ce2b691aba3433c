"""The C kernel on other processors: it is cross-compiled and run under QEMU on programs that this machine prepares.

A program has no addresses; those of its constants are given as offsets, which ``emulated.c`` turns into addresses.
"""

import ctypes
import math
import shutil
import struct
import subprocess
import tomllib

import pytest
import torch

from hessquik.backends import cpu
from tests.engine.step_reference import interpret, outputs_of, random_case
from tests.test_layering import ROOT
from tests.whole import choose

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
KERNEL = ROOT / "hessquik" / "backends" / "cpu"
#: Without optimisation the kernel compiles in an eighth of the time.
OPTIMISATION = choose(["-O0"], [])
SEEDS = range(choose(12, 400))
ROWS = 7

pytestmark = [
    pytest.mark.skipif(not cpu.is_available(), reason="needs the CPU kernel: install where there is a C compiler"),
    pytest.mark.skipif(
        COMPILER is None or EMULATOR is None,
        reason="needs aarch64-linux-gnu-gcc and qemu-aarch64: Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross "
        "and qemu-user",
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Return a function that runs the kernel for aarch64 on bytes and returns what it wrote."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (module,) = project["tool"]["setuptools"]["ext-modules"]
    program = tmp_path_factory.mktemp("aarch64") / "kernel"
    sources = [KERNEL / "kernel.c", ROOT / "tests" / "engine" / "emulated.c"]
    flags = [*module["extra-compile-args"], *OPTIMISATION, "-static", f"-I{KERNEL}"]
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(program), "-lm"], check=True, timeout=300)

    def run(given):
        done = subprocess.run([EMULATOR, str(program)], input=given, capture_output=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def image(program):
    """Return the bytes of a program's constants and words, the offsets of the constants, and that of the words."""
    found, offsets = bytearray(), []
    for constant in program._constants:
        offsets.append(len(found))
        found += ctypes.string_at(constant.data_ptr(), constant.nbytes)
        found += bytes(64 + -len(found) % 64)
    return bytes(found) + program._words, offsets, len(found)


def request(case, dtype, inputs, n):
    """Return the input that runs a program for all rows, the arrays in the order of the answer, and the outputs."""
    program = cpu.CpuProgram(case.program, dtype, 3, 16)
    outputs = {name: torch.full((n, size), math.nan, dtype=dtype) for name, size in outputs_of(case.program).items()}
    arrays = {name: array.to(dtype).contiguous() for name, array in inputs.items()} | outputs
    contents, offsets, start = image(program)
    ordered = [arrays[name] for name in program._arrays]
    head = [len(contents), len(offsets), start, len(ordered), 0, n, *(array.nbytes for array in ordered), *offsets]
    data = b"".join(array.numpy().tobytes() for array in ordered)
    return struct.pack(f"<{len(head)}q", *head) + contents + data, ordered, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_random_programs_give_the_numbers_of_their_definition_on_aarch64(dtype, emulated):
    given, expected = [], []
    for seed in SEEDS:
        case = random_case(seed, vector=(16, 32)[seed % 2])
        inputs = case.inputs(ROWS)
        alone = {name: array[-1:] if name in case.each else array for name, array in inputs.items()}
        for rows, arrays in ((ROWS, inputs), (1, alone)):
            data, *places = request(case, dtype, arrays, rows)
            given.append(data)
            expected.append((case, inputs, *places))
    answer = emulated(b"".join(given))
    position, last = 0, {}
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-12}[dtype]
    for case, inputs, arrays, outputs in expected:
        for array in arrays:
            array_bytes = answer[position : position + array.nbytes]
            position += array.nbytes
            if any(array is output for output in outputs.values()):
                array.copy_(torch.frombuffer(bytearray(array_bytes), dtype=dtype).view(array.shape))
        exact = interpret(case.program, inputs, ROWS, tile_rows=4)
        for name, found in outputs.items():
            if len(found) == ROWS:
                error = float((found.double() - exact[name]).abs().max())
                assert error <= tolerance * max(1.0, float(exact[name].abs().max())), name
            else:  # a row alone has the same bits
                assert torch.equal(found, last[name][-1:]), name
        last = outputs
    assert position == len(answer)
