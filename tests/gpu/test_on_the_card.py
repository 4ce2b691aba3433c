"""The compiled kernel on a GPU: against the CPU, bits, staging, streams; skipped where there is no GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from hessquik import Evaluator
from hessquik.backends.choice import Kernel
from hessquik.backends.gpu_captured import captures_of
from hessquik.backends.gpu_unrolled import Unrolling
from hessquik.backends.triton import TritonProgram, UnrolledProgram, unrolling
from hessquik.evaluator import COMMON
from hessquik.networks import NN, fullyConnectedNN, resnetNN
from tests.engine.step_reference import interpret, outputs_of, random_case

ALL = ("value", "gradient", "hessian", "laplacian", "jvp", "hvp", "curvature")
CUDA = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float64]
#: Errors may be so many units of rounding of the largest entry, or so many times what weights off by two change.
EPSILONS, TIMES_CHANGE = 300, 8


def networks() -> dict[str, NN]:
    torch.manual_seed(0)
    return {
        "full": fullyConnectedNN([10, 64, 64, 64, 1]),
        "narrow": fullyConnectedNN([3, 7, 18, 2]),
        "residual": resnetNN(5, 3, 0.5),
        "residual, deep": resnetNN(5, 32, 3),
        "wide": fullyConnectedNN([4, 300, 300, 1]),
    }


def _with_changed_weights(network: NN, relative: float) -> NN:
    """Return a copy whose weights have relative errors of up to ``relative``."""
    changed, generator = deepcopy(network), torch.Generator().manual_seed(3)
    for parameter in changed.parameters():
        shift = 2 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) - 1
        parameter.data *= 1 + relative * shift
    return changed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(16))
def test_random_programs(seed: int, dtype: torch.dtype) -> None:
    case, n = random_case(seed, vector=4), 13
    inputs = case.inputs(n)
    expected = interpret(case.program, inputs, n, 7)
    arrays = {name: array.to(CUDA, dtype).contiguous() for name, array in inputs.items()}
    sizes = outputs_of(case.program)
    out = {name: torch.full((n, size), float("nan"), dtype=dtype, device=CUDA) for name, size in sizes.items()}
    if len(out) + len(arrays) > 24:
        pytest.skip("more arrays than a call has")
    TritonProgram(case.program, dtype, CUDA).run({**arrays, **out}, 0, n)
    for name, wanted in expected.items():
        error = ((out[name].cpu().double() - wanted).abs() / (1 + wanted.abs())).max()
        assert error <= 3000 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("seed", range(4))
def test_kernels_made_for_random_programs(seed: int) -> None:
    dtype = DTYPES[seed % 2]
    case, n = random_case(seed, vector=4, count=8), 70
    inputs = case.inputs(n)
    expected = interpret(case.program, inputs, n, 7)
    arrays = {name: array.to(CUDA, dtype).contiguous() for name, array in inputs.items()}
    sizes, eps = outputs_of(case.program), torch.finfo(dtype).eps
    steps = (*case.program.once, *case.program.steps)
    shared = {view.buffer.name for step in steps for view in step.reads() if view.buffer.is_shared}

    def evaluated(program: TritonProgram, start: int, stop: int) -> dict[str, torch.Tensor]:
        rows = stop - start
        given = {name: array if name in shared else array[start:stop] for name, array in arrays.items()}
        out = {name: torch.full((rows, size), float("nan"), dtype=dtype, device=CUDA) for name, size in sizes.items()}
        program.run({**given, **out}, 0, rows)
        return out

    major, minor = torch.cuda.get_device_capability(CUDA)
    plan_kernel = UnrolledProgram(case.program, dtype, CUDA, unrolling(dtype, 10 * major + minor))
    smaller = UnrolledProgram(case.program, dtype, CUDA, Unrolling(rows=4, instances=4))
    table, found, in_small_tiles = (
        evaluated(each, 0, n) for each in (TritonProgram(case.program, dtype, CUDA), plan_kernel, smaller)
    )
    alone = evaluated(plan_kernel, n - 1, n)
    for name, wanted in expected.items():
        error = ((found[name].cpu().double() - wanted).abs() / (1 + wanted.abs())).max()
        assert error <= 3000 * eps, name
        assert torch.equal(in_small_tiles[name], found[name]), f"{name}: bits do not depend on the size of a tile"
        # The two kernels agree up to rounding, which a program's sums and quotients amplify.
        between = ((found[name] - table[name]).abs() / (1 + table[name].abs())).max()
        assert between <= 3000 * eps, f"{name}: the kernels agree"
        assert torch.equal(alone[name][0], found[name][n - 1]), f"{name}: a row's bits do not depend on company"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["full", "narrow", "residual", "residual, deep", "wide"])
@pytest.mark.parametrize("n", [0, 1, 5, 300, 5000])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_all_quantities(name: str, n: int, dtype: torch.dtype, where: str) -> None:
    network = networks()[name].double()
    on_card, on_cpu = Evaluator(network, "cuda", dtype), Evaluator(network, "cpu", torch.float64)
    x = torch.randn(n, on_card.d, generator=torch.Generator().manual_seed(1)).double()
    v = torch.randn(2, on_card.d, generator=torch.Generator().manual_seed(2)).double()
    expected = on_cpu(x, ALL, directions=v)
    moved = Evaluator(_with_changed_weights(network, 2 * torch.finfo(dtype).eps), "cpu", torch.float64)
    changed = moved(x, ALL, directions=v)
    found = on_card(x.to(where, dtype), ALL, directions=v.to(where, dtype))
    for quantity in ALL:
        wanted, result = getattr(expected, quantity), getattr(found, quantity)
        assert result.device.type == where
        scale = 1 + (wanted.abs().max().item() if n else 0.0)
        change = (getattr(changed, quantity) - wanted).abs().max().item() if n else 0.0
        bound = max(EPSILONS * torch.finfo(dtype).eps * scale, TIMES_CHANGE * change)
        torch.testing.assert_close(result.cpu().double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["full", "narrow", "residual", "wide"])
@pytest.mark.parametrize("compiled", [(), COMMON], ids=["table", "own"])
def test_bits_alone_and_among_65536(name: str, dtype: torch.dtype, compiled: tuple[tuple[str, ...], ...]) -> None:
    evaluate = Evaluator(networks()[name].double(), "cuda", dtype, compiled=compiled)
    quantities = ("value", "gradient", "hessian")
    x = torch.randn(65536, evaluate.d, dtype=dtype, device=CUDA)
    whole = evaluate(x, quantities)
    for rows in ([17], [65535], range(100), range(3000, 4500)):
        some = evaluate(x[list(rows)], quantities)
        on_host = evaluate(x[list(rows)].cpu(), quantities)
        for quantity in quantities:
            wanted = getattr(whole, quantity)[list(rows)]
            assert torch.equal(getattr(some, quantity), wanted)
            assert torch.equal(getattr(on_host, quantity), wanted.cpu())


def test_large_calls_from_the_host_go_in_chunks() -> None:
    evaluate = Evaluator(networks()["full"].double(), "cuda", torch.float32)
    x = torch.randn(200_000, 10)
    found = evaluate(x, ("gradient", "hessian"))
    wanted = evaluate(x.cuda(), ("gradient", "hessian"))
    assert torch.equal(found.hessian, wanted.hessian.cpu())
    assert torch.equal(found.gradient, wanted.gradient.cpu())


@pytest.mark.parametrize("name", ["full", "wide"])
def test_the_callers_stream_is_respected(name: str) -> None:
    evaluate = Evaluator(networks()[name].double(), "cuda", torch.float32)
    x = torch.randn(4096, evaluate.d, device=CUDA)
    wanted = evaluate(x, ("hessian",)).hessian
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = evaluate(late, ("hessian",)).hessian
    stream.synchronize()
    assert torch.equal(found, wanted)


def test_wide_networks_are_captured(caplog: pytest.LogCaptureFixture) -> None:
    evaluate = Evaluator(networks()["wide"].double(), "cuda", torch.float64)
    assert evaluate.plan(ALL[:4]).kernel == Kernel.CAPTURED
    evaluate(torch.randn(5, evaluate.d), ALL[:4])
    assert captures_of(CUDA)._tiles
    assert all(tile.captured is not None for tile in captures_of(CUDA)._tiles)
    assert not caplog.records, "nothing is launched operation by operation"


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_threads_share_the_captured_tiles(where: str) -> None:
    """Each has a stream of its own, and its own points."""
    evaluate = Evaluator(networks()["wide"].double(), "cuda", torch.float64)
    points = [torch.randn(n, evaluate.d, dtype=torch.float64, device=where) for n in (1, 40, 300, 3)]
    wanted = [evaluate(x, ("value", "hessian")) for x in points]
    torch.cuda.synchronize()

    def ask(i: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [evaluate(points[i], ("value", "hessian")) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(one.hessian, wanted[i].hessian) for one in found)

    with ThreadPoolExecutor(len(points)) as threads:
        assert all(threads.map(ask, range(len(points))))


@pytest.mark.parametrize("compiled", [(), COMMON], ids=["table", "own"])
@pytest.mark.parametrize("name", ["full", "wide"])
def test_an_evaluator_may_be_dropped_before_its_call_has_run(
    name: str, compiled: tuple[tuple[str, ...], ...]
) -> None:
    evaluate = Evaluator(networks()[name].double(), "cuda", torch.float32, compiled=compiled)
    x = torch.randn(4096, evaluate.d, device=CUDA)
    wanted = evaluate(x, COMMON[2])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        found = evaluate(x, COMMON[2])
    del evaluate
    # These arrays get memory that is free, on the stream on which the evaluator was made.
    others = [torch.full((1 << exponent,), float("nan"), device=CUDA) for exponent in range(4, 17) for _ in range(50)]
    stream.synchronize()
    assert torch.equal(found.hessian, wanted.hessian)
    assert len(others) == 650


@pytest.mark.parametrize("dtype", DTYPES)
def test_common_questions_on_kernels_of_their_own(dtype: torch.dtype) -> None:
    network = networks()["full"].double()
    evaluate, exact = Evaluator(network, "cuda", dtype, compiled=COMMON), Evaluator(network)
    assert set(map(frozenset, evaluate.compiled)) == set(map(frozenset, COMMON))
    for n in (1, 9, 3000):
        x = torch.randn(n, 10, generator=torch.Generator().manual_seed(3)).to(dtype)
        for quantities in COMMON:
            found, wanted = evaluate(x, quantities), exact(x.double(), quantities)
            for name in quantities:
                scale = 1 + getattr(wanted, name).abs().max().item()
                bound = EPSILONS * torch.finfo(dtype).eps * scale
                torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), rtol=0, atol=bound)
