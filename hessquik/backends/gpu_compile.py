"""Compilation of the Triton kernels into Triton's cache on disk, side by side in processes.

Triton's compiler holds Python's interpreter lock: threads would compile one kernel after the other, and nothing else
would run in the process meanwhile. Neither compiling nor the cache needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hessquik.backends import gpu_math
from hessquik.backends.gpu_kernel import run_table
from hessquik.backends.gpu_table import CALL_ARRAYS
from hessquik.backends.gpu_unrolled import WARPS, Unrolled, define_kernel

__all__ = ["BLOCKS", "Blocks", "compile_ahead", "compile_kernel", "compile_unrolled", "main"]

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of :func:`hessquik.backends.gpu_kernel.run_table`; chosen by measuring on an H200."""

    BM: int = 64
    BN: int = 64
    SMALL: int = 16
    BK: int = 32
    ME: int = 512
    RB: int = 8
    CB: int = 16
    BW: int = 16
    warps: int = 4
    stages: int = 1
    precision: str = "ieee"

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the kernel's compile-time arguments."""
        names = ("BM", "BN", "SMALL", "BK", "ME", "RB", "CB", "BW")
        return {"DTYPE": _TYPES[dtype], **{name: getattr(self, name) for name in names}, "PRECISION": self.precision}


BLOCKS = {torch.float32: Blocks(), torch.float64: Blocks(ME=256, RB=4)}


def compile_kernel(dtype: torch.dtype, arch: int, blocks: Blocks | None = None) -> Any:
    """Compile the table kernel for a processor generation, or take it from Triton's cache.

    Args:
        dtype: ``torch.float32`` or ``torch.float64``.
        arch: 80, 90 or 100.
        blocks: Sizes of blocks; those of the dtype if not given.
    """
    blocks = blocks or BLOCKS[dtype]
    constants = blocks.constants(dtype)
    small = {"once", "steps", "tile_rows"}
    signature: dict[str, Any] = {
        name: "constexpr" if name in constants else "i32" if name in small else "i64" for name in run_table.arg_names
    }
    signature["addresses"] = ("i64",) * CALL_ARRAYS
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return _compiled(ASTSource(run_table, signature, constants), arch, options)


def compile_unrolled(kernel: Unrolled, arch: int) -> Any:
    """Compile a plan kernel, or take it from Triton's cache."""
    return _compile_text(kernel.text, kernel.arguments, arch)


def _compile_text(text: str, arguments: Sequence[str], arch: int) -> Any:
    signature = {name: "i32" if name in {"once", "steps", "rows", "tile_rows"} else "i64" for name in arguments}
    return _compiled(ASTSource(define_kernel(text), signature, {}), arch, {"num_warps": WARPS, "num_stages": 1})


def _compiled(source: ASTSource, arch: int, options: dict[str, Any]) -> Any:
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**options, "enable_fp_fusion": False})


#: A kernel to compile: the table kernel of a dtype, or a plan kernel.
Kernel = torch.dtype | Unrolled


def compile_ahead(kernels: Sequence[Kernel], arch: int) -> None:
    """Compile kernels into the cache, as many side by side as there are processors, unless it has had them before.

    A kernel that fails is left to the caller, who compiles it again and gets the error.

    Args:
        kernels: The kernels.
        arch: The processor generation, such as 90.
    """
    if all(_mark(one, arch).exists() for one in kernels):
        return
    with _alone():
        missing = sorted((one for one in kernels if not _mark(one, arch).exists()), key=_size, reverse=True)
        processes = min(len(missing), len(os.sched_getaffinity(0)))
        if not missing:
            return
        with ThreadPoolExecutor(processes) as pool:  # each thread waits for one process
            for share in pool.map(lambda i: _compile_share(missing[i::processes], arch), range(processes)):
                for one in share:
                    with contextlib.suppress(OSError):  # a cache that is filled beforehand may be read-only
                        _mark(one, arch).touch()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process compiles into the cache: workers of several GPUs need the same kernels."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written, or whose file system has no locks
            folder = Path(triton.knobs.cache.dir)
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((folder / "hessquik.lock").open("w")), fcntl.LOCK_EX)
        yield


def _compile_share(kernels: Sequence[Kernel], arch: int) -> Sequence[Kernel]:
    """Compile kernels in a process, and return those that are compiled: all or none."""
    command = [sys.executable, "-P", "-m", "hessquik.backends.gpu_compile", str(arch), "--plans"]
    # Packages are found where this process finds them. Intermediate forms would take seven times the space in the cache.
    path = os.pathsep.join(map(str, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_STORE_BINARY_ONLY": "1"}
    with (
        contextlib.suppress(OSError),  # it cannot be started, or ended before it has read
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as child,
    ):
        assert child.stdin is not None
        child.stdin.write(json.dumps([_as_json(one) for one in kernels]) + "\n")
        child.stdin.flush()
        # The pipe stays open until the process ends: it ends with the one that it compiles for.
        return kernels if child.wait() == 0 else []
    return []


def _as_json(kernel: Kernel) -> dict[str, Any]:
    if isinstance(kernel, torch.dtype):
        return {"dtype": str(kernel).removeprefix("torch.")}
    return {"text": kernel.text, "arguments": kernel.arguments}


def _size(kernel: Kernel) -> float:
    """Return about how long a kernel takes to compile, in passages of a plan kernel."""
    return 20.0 if isinstance(kernel, torch.dtype) else kernel.forms


def _mark(kernel: Kernel, arch: int) -> Path:
    """Return the file that says that a kernel has been compiled into the cache."""
    if isinstance(kernel, torch.dtype):
        source = f"{kernel} {BLOCKS[kernel]} {run_table.cache_key}"
    else:
        source = kernel.text + inspect.getsource(gpu_math)
    key = f"{triton.__version__} {arch} {source}"
    return Path(triton.knobs.cache.dir) / f"hessquik-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the table kernels for some processor generations into Triton's cache."""
    parser = argparse.ArgumentParser(description="Compile the table kernels into Triton's cache, without a GPU.")
    parser.add_argument("arch", type=int, nargs="+", help="processor generations: 80, 90, 100")
    parser.add_argument("--plans", action="store_true", help="compile the kernels that a line of JSON lists, instead")
    given = parser.parse_args(arguments)
    wanted = [_as_json(dtype) for dtype in BLOCKS]
    if given.plans:
        wanted = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_input, daemon=True).start()
    for arch in given.arch:
        for one in wanted:
            if "text" in one:
                _compile_text(one["text"], one["arguments"], arch)
                continue
            dtype = getattr(torch, one["dtype"])
            kernel = compile_kernel(dtype, arch)
            with contextlib.suppress(OSError):
                _mark(dtype, arch).touch()
            shared, code = kernel.metadata.shared, len(kernel.kernel)
            print(f"sm_{arch} {one['dtype']}: {shared} bytes of shared memory, {code} bytes of code")


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
