"""The original's module names: inside ``hessquik``, and as ``hessQuik`` for those who install hessquik-compat."""

import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module

import pytest

from hessquik.original import MODULES
from tests.test_layering import ROOT

#: Names by the modules in which the original's documentation has them.
DOCUMENTED = {
    "activations.antiTanh_activation": "antiTanhActivation",
    "activations.hessQuik_activation_function": "hessQuikActivationFunction",
    "activations.identity_activation": "identityActivation",
    "activations.quadratic_activation": "quadraticActivation",
    "activations.sigmoid_activation": "sigmoidActivation",
    "activations.softplus_activation": "softplusActivation",
    "activations.tanh_activation": "tanhActivation",
    "layers.hessQuik_layer": "hessQuikLayer",
    "layers.icnn_layer": "ICNNLayer",
    "layers.quadratic_icnn_layer": "quadraticICNNLayer",
    "layers.quadratic_layer": "quadraticLayer",
    "layers.resnet_layer": "resnetLayer",
    "layers.single_layer": "singleLayer",
    "networks.fully_connected_network": "fullyConnectedNN",
    "networks.hessQuik_network": "NN NNPytorchAD NNPytorchHessian",
    "networks.icnn_network": "ICNN",
    "networks.resnet_network": "resnetNN",
    "utils.data": "peaks",
    "utils.directional_derivative_check": "directional_derivative_check directional_derivative_laplacian_check",
    "utils.input_derivative_check": "input_derivative_check input_derivative_check_finite_difference",
    "utils.input_derivative_check_laplacian": "input_derivative_check_finite_difference_laplacian",
    "utils.network_derivative_check": "network_derivative_check",
    "utils.timing": "setup_device_and_gradient setup_resnet setup_fully_connected setup_icnn setup_network "
    "timing_test_cpu timing_test_gpu timing_test",
    "utils.training": "train_one_epoch test print_headers",
    "utils.utils": "module_getattr module_setattr extract_data insert_data convert_to_base",
}


def test_the_table_has_every_module():
    own = {"utils.data", "utils.timing", "utils.training"}
    names = {f"{package}.{name}" for package, modules in MODULES.items() for name in modules}
    assert DOCUMENTED.keys() - own == names


@pytest.mark.parametrize("module", DOCUMENTED)
def test_the_names_are_where_the_original_has_them(module):
    package = import_module(f"hessquik.{module.partition('.')[0]}")
    for name in DOCUMENTED[module].split():
        assert getattr(import_module(f"hessquik.{module}"), name) is getattr(package, name)


def test_functions_that_share_a_modules_name_stay_functions():
    program = (
        "import hessquik.utils.input_derivative_check, hessquik.utils\n"
        "from hessquik.utils import input_derivative_check, network_derivative_check\n"
        "assert callable(input_derivative_check) and callable(network_derivative_check)\n"
        "from hessquik.layers.single_layer import singleLayer\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


DOCUMENTED_USE = """
import torch
import hessQuik.activations as act
import hessQuik.layers as lay
import hessQuik.networks as net
from hessQuik.layers.single_layer import singleLayer
from hessQuik.utils import input_derivative_check
from hessQuik.utils.input_derivative_check import input_derivative_check as same
import hessquik.layers

d, widths = 10, [32, 64]
f = net.NN(
    lay.singleLayer(d, widths[0], act.antiTanhActivation()),
    lay.resnetLayer(widths[0], h=1.0, act=act.softplusActivation()),
    lay.singleLayer(widths[0], widths[1], act.quadraticActivation()),
)
fx, dfx, d2fx = f(torch.randn(20, d), do_gradient=True, do_Hessian=True)
assert tuple(d2fx.shape) == (20, d, d, 64)
assert lay.singleLayer is singleLayer is hessquik.layers.singleLayer
assert input_derivative_check is same
import hessQuik
print(hessQuik.__name__)
"""


def run(program, path):
    return subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_hessquik_compat_runs_documented_code():
    ended = run(DOCUMENTED_USE, ROOT / "compat")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "hessquik\n"


def test_the_original_comes_first_where_it_is_installed_too(tmp_path):
    """With both in one folder, as in site-packages, no file collides, and the original's package is imported."""
    (tmp_path / "hessQuik.py").write_bytes((ROOT / "compat" / "hessQuik.py").read_bytes())
    (tmp_path / "hessQuik").mkdir()
    (tmp_path / "hessQuik" / "__init__.py").write_text("original = True\n")
    ended = run("import hessQuik; print(hessQuik.original)", tmp_path)
    assert ended.stdout == "True\n", ended.stderr


def built(folder, project):
    """Return the names of the files in a project's wheel, built without compiling anything."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    subprocess.run([*command, str(project)], check=True, timeout=300, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_only_hessquik_compat_has_a_module_of_the_originals_name(tmp_path):
    project = tmp_path / "compat"
    project.mkdir()
    for name in ("hessQuik.py", "pyproject.toml"):
        (project / name).write_bytes((ROOT / "compat" / name).read_bytes())
    assert [name for name in built(tmp_path, project) if "dist-info" not in name] == ["hessQuik.py"]
    text = (ROOT / "pyproject.toml").read_text()
    packages = tomllib.loads(text)["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in packages} == {"hessquik", "hessquik_client", "hessquik_service"}
    assert 'compat = ["hessquik-compat==0.1.0"]' in text
    assert not (ROOT / "hessQuik").exists() or (ROOT / "hessQuik").samefile(ROOT / "hessquik")
