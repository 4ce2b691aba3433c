"""Triton's C module for CUDA, built beforehand and loaded without a compiler; its library is a stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hessquik.backends import gpu_driver

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("nm") is None, reason="needs a C compiler and binutils"
)

LOAD = """
import sys
from pathlib import Path
from triton.backends.nvidia.driver import CudaUtils
from hessquik.backends import gpu_driver
if sys.argv[1:]:
    gpu_driver.use(Path(sys.argv[1]))
utils = CudaUtils()
print(sorted(name for name in vars(utils) if "launch" in name or "load" in name))
"""


@pytest.fixture(name="built", scope="module")
def build_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    module = gpu_driver.build(folder)
    assert list(folder.iterdir()) == [module]
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert "[libcuda.so.1]" in needed, "the driver's own library is loaded on the machine with the GPU"
    return module


@pytest.fixture(name="driver", scope="module")
def fake_driver(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a library of the driver's name, whose functions do nothing."""
    folder = tmp_path_factory.mktemp("libcuda")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", built], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-1].startswith("cu")]
    (folder / "cuda.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    subprocess.run(
        ["cc", "-shared", "-fPIC", folder / "cuda.c", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"],
        check=True,
    )
    return folder


def run(driver: Path, cache: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Load the module with an empty cache, and no compiler on the path."""
    environment = {name: value for name, value in os.environ.items() if name not in {"CC", "TRITON_INTERPRET"}} | {
        "PATH": "",
        "LD_LIBRARY_PATH": str(driver),
        "TRITON_LIBCUDA_PATH": str(driver),
        "TRITON_CACHE_DIR": str(cache),
    }
    return subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_module_is_loaded_without_a_compiler_and_without_the_cache(built: Path, driver: Path, tmp_path: Path) -> None:
    done = run(driver, tmp_path / "cache", built.parent)
    assert done.returncode == 0, done.stderr
    assert "load_binary" in done.stdout
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("folder", [[], ["."]], ids=["not used", "of another source"])
def test_without_a_module_of_this_source_triton_looks_for_a_compiler(
    folder: list[str], driver: Path, tmp_path: Path
) -> None:
    done = run(driver, tmp_path / "cache", *(tmp_path / one for one in folder))
    assert done.returncode != 0
    assert "C compiler" in done.stderr
