"""The comparison of an imported network with its source: in the dtype that is served, point by point."""

import json
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import hessquik
from hessquik.errors import UnsupportedError
from hessquik.importing.files import import_file
from hessquik.importing.graph import Affine, Product
from hessquik.importing.scaling import Scaling
from hessquik.importing.source import Source, import_source
from hessquik.importing.torch_module import import_module
from tests.importing.comparison import TOLERANCE, worst_error


def network_error(network, f, x):
    """Return the network's error at points of its own dtype, relative to the largest value."""
    points = x.to(next(network.requires_grad_(False).parameters()).dtype)
    expected = f(points.double())
    return float((network(points)[0].double() - expected).abs().max() / expected.abs().max())


def physical(dtype=torch.float32):
    """Return a module, the scaling of its inputs, and the function of physical units that it stands for."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    mean, scale = torch.tensor([1e6, 2000.0], dtype=torch.float64), torch.tensor([10.0, 1.0], dtype=torch.float64)
    exact = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in module.state_dict().items()})
    exact.requires_grad_(False)
    return module, Scaling(input_mean=mean, input_scale=scale), lambda x: exact((x - mean) / scale)


def test_weights_that_lose_digits_in_float32_are_kept_in_float64():
    module, scaling, f = physical()
    imported = import_module(module, None, scaling)
    assert next(imported.network.parameters()).dtype is torch.float64
    x = torch.tensor([[1e6, 2000.0], [1e6 + 8, 2001.0], [1e6 - 8, 1999.0]], dtype=torch.float64)
    assert network_error(imported.network, f, x) < 1e-6, "float32 values of the source"


def test_dtype_that_loses_digits_is_refused_by_name():
    for dtype in (torch.float32, torch.float64):
        module, scaling, _ = physical(dtype)
        with pytest.raises(UnsupportedError, match=r"float32 .* pass dtype=torch.float64 \(--dtype float64\)"):
            import_module(module, None, scaling, dtype=torch.float32)


def test_an_import_draws_no_random_numbers_of_the_caller():
    module, scaling, _ = physical()
    before = torch.get_rng_state()
    import_module(module, None, scaling)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def recursion_limit():
    """Set Python's own limit, since libraries that other tests import raise it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("recursion_limit")
def test_a_network_that_is_too_deep_says_so():
    def read(point):
        value = point
        for _ in range(2000):
            value = Affine("a scale", 2, ((value, torch.diag(torch.tensor([0.5, 2.0], dtype=torch.float64))),))
        return Product("a product", 2, value, point)

    source = Source(2, torch.float64, "nothing", read, lambda x: x)
    with pytest.raises(UnsupportedError, match=r"too large or too deep .* \(RecursionError\); make it smaller"):
        import_source(source, Scaling(), False)


def test_large_means_of_outputs_hide_neither_errors_nor_digits():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    imported = import_module(module, None, Scaling(output_mean=1e6))
    assert next(imported.network.parameters()).dtype is torch.float64
    with pytest.raises(UnsupportedError, match="float32 lose too many digits"):
        import_module(module, None, Scaling(output_mean=1e6), dtype=torch.float32)
    imported = import_module(module, None, Scaling(output_mean=300.0, output_scale=20.0))
    assert next(imported.network.parameters()).dtype is torch.float32
    for scaling in (Scaling(output_mean=1e9, output_scale=1e-2), Scaling(input_mean=1e9, input_scale=0.1)):
        assert import_module(module.double(), None, scaling).error < 1e-4, "as float64 rounds the units"
    with pytest.raises(UnsupportedError, match=r"scales .* so small beside their means that float64 rounds"):
        import_module(module, None, Scaling(output_mean=1e9, output_scale=1e-6))


def test_values_that_float32_rounds_away_are_refused():
    module = Function(lambda x, y: (x + 1000) ** 2 - x**2 - 2000 * x - 1e6 + x)
    with pytest.raises(UnsupportedError, match="give it weights in float64 if it cancels its digits; else"):
        hessquik.from_torch(module.float(), torch.zeros(3))
    assert hessquik.from_torch(module.double(), torch.zeros(3)).dim_output() == 3


def test_reported_error_is_that_of_the_network_in_its_dtype():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    imported = import_module(module, None, Scaling(input_mean=[300.0, 20.0], input_scale=[10.0, 1.0]))
    assert next(imported.network.parameters()).dtype is torch.float32
    assert 1e-7 < imported.error < 1e-4


class Function(nn.Module):
    """A linear layer and a function of its value."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(3, 1).double(), function

    def forward(self, x):
        return self.function(x, self.linear(x))


BY_ROWS = Function(lambda x, y: y / x.shape[0])


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x, y: y * (1 + len(x) % 2), "gives a point other values when it is evaluated with other points"),
        (lambda x, y: y.reshape(7, -1), r"cannot compute its values \(.*call it on 11 points of torch.float64 first"),
    ],
)
def test_functions_of_the_number_of_rows_are_refused(f, message):
    with pytest.raises(UnsupportedError, match=message):
        hessquik.from_torch(Function(f), torch.zeros(3, dtype=torch.float64))


def test_value_that_depends_on_the_number_of_rows_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="other values when it is evaluated with other points"):
        hessquik.from_torch(BY_ROWS, torch.zeros(3))
    dynamic = {0: torch.export.Dim("n", min=2)}
    example = (torch.zeros(5, 3, dtype=torch.float64),)
    torch.export.save(torch.export.export(BY_ROWS, example, dynamic_shapes=(dynamic,)), tmp_path / "rows.pt2")
    with pytest.raises(UnsupportedError, match="other values when it is evaluated with other points"):
        import_file(tmp_path / "rows.pt2")
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Cast", ["n"], ["r"], to=TensorProto.DOUBLE),
        helper.make_node("Div", ["x", "r"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["n", 3]) for name in "xy")
    zero = helper.make_tensor("zero", TensorProto.INT64, [], [0])
    graph = helper.make_graph(nodes, "rows", [x], [y], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(UnsupportedError, match="other values when it is evaluated with other points"):
        hessquik.from_onnx(model)
    onnx.checker.check_model(model)


@pytest.mark.parametrize(("large", "dtype"), [(3e3, torch.float64), (1e6, torch.float64), (1e2, torch.float32)])
def test_product_of_a_large_and_a_small_factor_keeps_its_digits(large, dtype):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return (large + torch.sin(self.a(x))) * (torch.tanh(self.b(x)) / large)

    module = Module().to(dtype)
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = hessquik.from_torch(module, torch.zeros(3))
    assert next(network.parameters()).dtype is dtype
    assert worst_error(network.double(), module.double(), x) <= (TOLERANCE if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("factor", [5e-324, 1e-300, 1e-160, 1e160, 1e300])
def test_products_of_factors_of_any_size(factor):
    module = Function(lambda x, y: (factor * x) * torch.sin(y))
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, found = module(x), hessquik.from_torch(module, torch.zeros(3))(x)[0]
    assert bool(((found - expected).abs() <= 1e-12 * expected.abs().max() + 5e-324).all())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.sqrt(x**2),
        lambda x, y: (y * y) ** 0.5,
        lambda x, y: torch.sqrt(torch.square(torch.tanh(y))),
    ],
    ids=["square", "product", "composed"],
)
def test_root_of_a_square_has_a_kink(function):
    module = Function(function)
    with pytest.raises(UnsupportedError, match="has a kink"):
        hessquik.from_torch(module, torch.zeros(3))
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert worst_error(hessquik.from_torch(module, torch.zeros(3), allow_kinks=True), module, x) <= TOLERANCE


@pytest.mark.parametrize(
    "function",
    [lambda x, y: y.abs() ** 2, lambda x, y: 3 * y.abs() * y.abs() + 2, lambda x, y: torch.relu(y) * 0 + y],
    ids=["square", "product", "zero"],
)
def test_square_of_an_absolute_value_has_none(function):
    module = Function(function)
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert worst_error(hessquik.from_torch(module, torch.zeros(3)), module, x) <= TOLERANCE


class OtherDerivative(torch.autograd.Function):
    """tanh with the derivative of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OwnDerivative(torch.autograd.Function):
    """tanh with its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - torch.tanh(x) ** 2)


def reversed_gradient(x, y):
    if y.requires_grad:
        y.register_hook(torch.neg)
    return torch.tanh(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: OtherDerivative.apply(y),
        reversed_gradient,
        lambda x, y: torch.sin(x) + torch.inference_mode()(torch.tanh)(y),
    ],
    ids=["autograd.Function", "hook", "inference_mode"],
)
def test_derivatives_that_are_not_those_of_the_values_are_refused(f, dtype):
    with pytest.raises(
        UnsupportedError, match=r"derivatives .* must be those that torch has, .*; take out what changes"
    ):
        hessquik.from_torch(Function(f).to(dtype), torch.zeros(3), input_scale=[1.0, 1e3, 1e-3], output_scale=7.0)


def test_backward_hooks_are_refused():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[2].register_full_backward_hook(lambda part, inputs, outputs: (2 * inputs[0],))
    with pytest.raises(UnsupportedError, match="must be those that torch has"):
        hessquik.from_torch(module)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: OwnDerivative.apply(y),
        lambda x, y: torch.sin(y) ** 2 + torch.cos(y) ** 2,
        lambda x, y: y - y,
        lambda x, y: 1e-3 * y + 1e9,
        lambda x, y: torch.utils.checkpoint.checkpoint(torch.tanh, y, use_reentrant=False),
    ],
    ids=["autograd.Function", "1", "0", "a large mean", "checkpoint"],
)
def test_derivatives_that_are_those_of_the_values_up_to_rounding(f):
    module = Function(f)
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert worst_error(hessquik.from_torch(module, torch.zeros(3)), module, x) <= TOLERANCE


def test_surroundings_are_left_as_they_are_and_do_not_matter():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.0), nn.Linear(4, 2))
    expected = hessquik.from_torch(module).state_dict()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            state = torch.get_rng_state()
            found = hessquik.from_torch(module)
            assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert module.training
    assert all(part.grad is None for part in module.parameters())
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"input_mean": "a"}, "input_mean must be one finite number or 3"),
        ({"input_mean": [0, "a", 1]}, "input_mean must be one finite number or 3"),
        ({"input_scale": {"x": 1}}, "input_scale must be one finite number or 3"),
        ({"input_lower": 0, "input_upper": 1, "onto": [0]}, "onto must be an interval such as"),
        ({"input_lower": 0, "input_upper": 1, "onto": 5}, "onto must be an interval such as"),
        ({"input_lower": 0, "input_upper": 1, "onto": ["a", 1]}, "onto must be an interval such as"),
        ({"output_mean": None, "output_scale": True}, "output_scale must be one finite number or 1"),
        ({"input_scale": 1e-320}, "input_scale must have no zeros, and no numbers that float64 cannot divide by"),
        ({"output_mean": 1e300, "output_scale": 1e-10}, "output_scale must have no zeros, and no numbers that"),
    ],
)
def test_scaling_that_is_none_is_refused_by_its_key(scale, message):
    given = json.loads(json.dumps(scale))
    with pytest.raises(hessquik.ShapeError, match=message):
        hessquik.from_torch(BY_ROWS.linear, **given)


def test_scaling_keeps_every_digit():
    for mean in ([0.1, 0.7], np.array([0.1, 0.7]), torch.tensor([0.1, 0.7], dtype=torch.float64), (0.1, 0.7)):
        assert Scaling(input_mean=mean).input(2)[0].tolist() == [0.1, 0.7]
    parameter = nn.Parameter(torch.tensor([0.5]))
    assert Scaling(output_scale=parameter).output(2)[1].tolist() == [0.5, 0.5]


def test_network_without_inputs_or_outputs_is_refused():
    for module in (Function(lambda x, y: y[:, :0]), Function(lambda x, y: x[:, 3:])):
        with pytest.raises(UnsupportedError, match="at least one output"):
            hessquik.from_torch(module, torch.zeros(3))
