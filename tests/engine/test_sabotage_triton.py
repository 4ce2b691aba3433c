"""The proof of the interpreted Triton kernel can fail: errors planted in the kernel's table are found."""

import pytest
import torch

from tests.engine import triton_interpreter  # noqa: F401

if torch.cuda.is_available():
    pytest.skip(
        "needs a machine without a GPU, where the interpreter stands for one; tests/gpu runs there",
        allow_module_level=True,
    )

from hessquik import layers as lay
from hessquik import networks as net
from hessquik import proof
from hessquik.activations import tanhActivation
from hessquik.backends import choice, gpu_table
from hessquik.backends import triton as backend
from hessquik.steps import Congruence, Contract, Map, Product, SumProducts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Make the interpreted kernel the CPU's only backend."""
    monkeypatch.setattr(choice, "names", lambda device="cpu": ("triton",))


def refused(monkeypatch, *quantities):
    """Return whether the quick proof of some quantities refuses the network."""
    torch.manual_seed(0)
    tanh = tanhActivation()
    network = net.NN(lay.singleLayer(2, 3, tanh), lay.singleLayer(3, 2, tanh), lay.singleLayer(2, 1)).double()
    monkeypatch.setattr(proof, "CALLS", (quantities,))
    try:
        proof.prove_quickly(network)
    except proof.DerivativeError:
        return True
    return False


def test_the_interpreted_kernel_is_proven(monkeypatch):
    assert not refused(monkeypatch, "value", "gradient", "hessian", "laplacian")


#: The size that is set to 0, by kind of step: the depth, the inner entries or the columns.
CHANGES = {
    Product: (("value",), 5),
    SumProducts: (("laplacian",), 3),
    Contract: (("gradient", "jvp"), 5),
    Congruence: (("hessian",), 5),
}


def test_every_kind_of_step_is_sabotaged():
    assert {*CHANGES, Map} == {Product, SumProducts, Contract, Congruence, Map}


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
def test_a_wrong_step(kind, monkeypatch):
    quantities, place = CHANGES[kind]
    right = gpu_table.Table._step

    def wrong(self, step):
        numbers = right(self, step)
        if isinstance(step, kind):
            numbers[place] = 0
        return numbers

    monkeypatch.setattr(gpu_table.Table, "_step", wrong)
    assert refused(monkeypatch, *quantities)


@pytest.mark.parametrize(("op", "other"), [("mul", "add"), ("sub", "add"), ("tanh", "sin")])
def test_a_wrong_instruction_of_a_map(op, other, monkeypatch):
    monkeypatch.setitem(gpu_table.OPCODES, op, gpu_table.OPCODES[other])
    assert refused(monkeypatch, "gradient")


def test_wrong_constants(monkeypatch):
    right = backend._Device.constant
    monkeypatch.setattr(backend._Device, "constant", lambda self, view, dtype: 1.01 * right(self, view, dtype))
    assert refused(monkeypatch, "value")
