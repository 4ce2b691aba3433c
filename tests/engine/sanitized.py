"""Runs the C kernel with sanitizers: random programs and networks of all shapes, dtypes, vectors and row counts.

python tests/engine/sanitized.py KERNEL CASES THREADS

KERNEL is a module that was built with sanitizers and whose runtime is preloaded (``tools/sanitize.py`` does both). It
replaces the installed kernel. Results are not checked here, since other tests do that; a fault ends the process with
the sanitizer's report.
"""

from __future__ import annotations

import sys
import threading
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2]))


def load_kernel(path: str) -> None:
    """Import a file as the kernel's module."""
    name = "hessquik.backends.cpu._kernel"
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, path))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def main(path: str, cases: int, threads: int) -> None:
    """Run programs and networks with a kernel, several threads at once."""
    load_kernel(path)
    import torch

    from hessquik import Evaluator
    from hessquik.backends.cpu import KERNEL, CpuProgram, vector_bytes
    from hessquik.quantities import QUANTITIES, needs_directions
    from tests.engine import random_networks
    from tests.engine.step_reference import outputs_of, random_case

    assert KERNEL is not None, "the kernel was built from other sources"
    torch.set_num_threads(1)
    vectors = [size for size in (16, 32, 64) if size <= vector_bytes()]
    hostile = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-320, -0.0], dtype=torch.float64
    )

    def mixed(array: torch.Tensor, draw: Random) -> torch.Tensor:
        """Return an array, sometimes with some numbers replaced by NaN, infinite or extreme ones."""
        if draw.random() < 0.5 or not array.numel():
            return array.clone()
        places = torch.rand(array.shape) < 0.1
        return torch.where(places, hostile[torch.randint(len(hostile), array.shape)].to(array.dtype), array)

    def together(work) -> None:  # type: ignore[no-untyped-def]
        """Call a function on all threads at once."""
        others = [threading.Thread(target=work) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()

    for seed in range(cases):
        draw = Random(seed)
        torch.manual_seed(seed)
        dtype, n = draw.choice((torch.float32, torch.float64)), draw.choice((0, 1, 2, 3, 7, 31, 70))
        case = random_case(seed, vector=draw.choice((16, 32)))
        inputs = {name: mixed(array, draw).to(dtype).contiguous() for name, array in case.inputs(max(n, 1)).items()}
        for size in vectors:
            program = CpuProgram(case.program, dtype, draw.choice((1, 3, 8)), size)

            def run(program=program, case=case, inputs=inputs, n=n, dtype=dtype) -> None:  # type: ignore[no-untyped-def]
                sizes = outputs_of(case.program).items()
                program.run({**inputs, **{name: torch.empty(n, size, dtype=dtype) for name, size in sizes}}, 0, n)

            together(run)
        d, m, k = draw.choice((1, 3, 17)), draw.choice((1, 2, 9)), draw.choice((1, 4))
        evaluate = Evaluator(random_networks.network(draw, d, m), dtype=dtype)
        names = tuple(name for name in QUANTITIES if draw.random() < 0.5) or ("value",)
        x, v = mixed(torch.randn(n, d, dtype=dtype), draw), mixed(torch.randn(k, d, dtype=dtype), draw)
        weights = draw.choice((None, torch.randn(m, dtype=dtype), torch.randn(n, m, dtype=dtype)))
        together(lambda: evaluate(x, names, weights, v))  # noqa: B023
        if not needs_directions(names):  # else one that does not need them gets none of its tensors bound
            together(lambda: evaluate(x, names, weights))  # noqa: B023
    print(f"{cases} programs and networks, vectors of {vectors} bytes, {threads} threads: no fault")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
