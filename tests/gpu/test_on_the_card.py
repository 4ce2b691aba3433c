"""The compiled kernel on a GPU: against the CPU, bits, staging, streams; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from hessquik import Evaluator
from hessquik.backends.gpu_unrolled import Unrolling
from hessquik.backends.triton import TritonProgram, UnrolledProgram
from hessquik.networks import NN, fullyConnectedNN, resnetNN
from tests.engine.step_reference import interpret, outputs_of, random_case

ALL = ("value", "gradient", "hessian", "laplacian", "jvp", "hvp", "curvature")
CUDA = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float64]
#: Rounding that networks amplify: 32 steps of size 3 make that of torch itself on a CPU 2,540 in float32.
EPSILONS = {"residual, deep": 3000}


def networks() -> dict[str, NN]:
    torch.manual_seed(0)
    return {
        "full": fullyConnectedNN([10, 64, 64, 64, 1]),
        "narrow": fullyConnectedNN([3, 7, 18, 2]),
        "residual": resnetNN(5, 3, 0.5),
        "residual, deep": resnetNN(5, 32, 3),
        "wide": fullyConnectedNN([4, 300, 300, 1]),
    }


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
    sizes, found = outputs_of(case.program), []
    for program in (
        TritonProgram(case.program, dtype, CUDA),
        UnrolledProgram(case.program, dtype, CUDA, [Unrolling(rows=16, warps=8)]),
    ):
        out = {name: torch.full((n, size), float("nan"), dtype=dtype, device=CUDA) for name, size in sizes.items()}
        program.run({**arrays, **out}, 0, n)
        found.append(out)
    for name, wanted in expected.items():
        error = ((found[1][name].cpu().double() - wanted).abs() / (1 + wanted.abs())).max()
        assert error <= 3000 * torch.finfo(dtype).eps, name
        assert torch.equal(found[0][name], found[1][name]), f"{name}: both kernels give the same bits"


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
    found = on_card(x.to(where, dtype), ALL, directions=v.to(where, dtype))
    for quantity in ALL:
        wanted, result = getattr(expected, quantity), getattr(found, quantity)
        assert result.device.type == where
        scale = 1 + (wanted.abs().max().item() if n else 0.0)
        bound = EPSILONS.get(name, 300) * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(result.cpu().double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["full", "narrow", "residual"])
def test_bits_alone_and_among_65536(name: str, dtype: torch.dtype) -> None:
    evaluate = Evaluator(networks()[name].double(), "cuda", dtype)
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


def test_the_callers_stream_is_respected() -> None:
    evaluate = Evaluator(networks()["full"].double(), "cuda", torch.float32)
    x = torch.randn(4096, 10, device=CUDA)
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
