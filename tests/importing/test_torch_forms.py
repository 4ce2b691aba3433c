"""Forms in which modules are written: in place, on weights, by masks, of products, norms and other axes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import hessquik
from hessquik.errors import UnsupportedError
from hessquik.importing.files import import_file
from hessquik.importing.graph import Input
from hessquik.importing.torch_reader import Call, Program, Ref, read
from tests.importing.comparison import TOLERANCE, derivatives, worst_error
from tests.importing.torch_networks import Function

D = 4
X = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([True, False, True, True])
POSITIVE = [0.5] * D, [2.0] * D


def residual(x):
    out = torch.sin(x) @ W
    out += x
    return out


def column(x):
    y = x.clone()
    y[:, 0] = torch.sin(x[:, 1])
    y[:, 2:] *= 2.0
    return y * x


def view_of_view(x):
    y = x @ W
    rows = y.view(-1, 2, 2)
    rows.transpose(1, 2)[:, 0].add_(torch.cos(x[:, :2]))
    return y + rows.sum(1).repeat(1, 2)


def filled(x):
    y = torch.zeros_like(x)
    y[:, :2] = torch.tanh(x[:, 2:])
    z = x.new_empty(len(x), 2)
    z.fill_(0.5)
    z[:, 1].zero_()
    return torch.cat([y, z], 1) * 3


def parts(x):
    y = 2 * x
    left, right = y.narrow(1, 0, 2), y.narrow(1, 2, 2)
    left.mul_(right)
    return y


def masked(x):
    y = x @ W
    y[:, MASK] = y[:, MASK] ** 2
    y.masked_fill_(~MASK, 1.5)
    return y * x


IN_PLACE = {
    "residual": residual,
    "column": column,
    "view of a view": view_of_view,
    "filled": filled,
    "parts": parts,
    "masks": masked,
    "activations": lambda x: (
        functional.silu((x @ W).mul_(2.0), inplace=True).clone().tanh_() + functional.mish(x @ W, True)
    ),
}
#: The same without changes in place, where torch itself has no second derivatives of a form.
PURE = {
    "parts": lambda x: torch.cat([4 * x[:, :2] * x[:, 2:], 2 * x[:, 2:]], 1),
    "activations": lambda x: torch.tanh(functional.silu(2 * (x @ W))) + functional.mish(x @ W),
}

ON_WEIGHTS = {
    "softmax": lambda x: torch.tanh(x @ torch.softmax(W, 0)),
    "inverse": lambda x: torch.tanh(x @ torch.linalg.inv(W)),
    "matrix_exp": lambda x: torch.tanh(x @ torch.matrix_exp(W / 4)),
    "normalize": lambda x: torch.tanh(x @ functional.normalize(W, dim=0)),
    "embedding": lambda x: torch.tanh(x + functional.embedding(torch.arange(2), W).sum(0)),
    "logsumexp": lambda x: torch.tanh(x + W.logsumexp(1)),
    "svd": lambda x: torch.tanh(x / torch.linalg.svdvals(W)[0]),
    "in place": lambda x: torch.tanh(x @ torch.zeros(D, D, dtype=x.dtype).fill_(2.0).mul_(W)),
    "without gradient": lambda x: torch.tanh(x @ torch.no_grad()(torch.exp)(W)) + x * W.detach()[0],
    "whole numbers": lambda x: torch.tanh(x) * (torch.arange(4) // 2 + 1) * (torch.arange(4) % 3),
    "spectral_norm": nn.utils.parametrizations.spectral_norm(nn.Linear(D, 3)).double().eval(),
    "old spectral_norm": nn.utils.spectral_norm(nn.Linear(D, 3)).double().eval(),
    "orthogonal": nn.utils.parametrizations.orthogonal(nn.Linear(D, D)).double().eval(),
}

SELECTIONS = {
    "where": lambda x: torch.where(MASK, torch.sin(x), x),
    "masked_fill": lambda x: torch.sin(x).masked_fill(~MASK, 2.0),
    "index": lambda x: torch.sin(x)[..., [2, 0]],
    "mask": lambda x: torch.sin(x)[:, MASK],
    "gather": lambda x: torch.sin(x).take_along_dim(torch.tensor([[2, 0, 0]]), 1),
    "like": lambda x: torch.ones_like(x) * x + torch.full_like(x, 2.0) + x.new_zeros(x.shape).add(1.0),
    "aliases": lambda x: (
        torch.true_divide(torch.multiply(x, x), 2.0).subtract(torch.negative(x)) + torch.special.expit(x)
    ),
    "shapes": lambda x: (x[:, None].swapaxes(1, 2) + x[:, :1, None].expand_as(x[:, :, None])).repeat_interleave(2, 1),
    "a list of one": lambda x: x.chunk(1, 1)[0] * torch.cat(x[:, None].unbind(1), 0),
    "view_as": lambda x: torch.sin(x).view_as(x).reshape_as(x),
    "scatter": lambda x: (
        x.new_zeros(len(x), 6).scatter(1, torch.tensor([[0, 2, 4, 5]]).expand(x.shape), torch.sin(x))
        + x.new_ones(len(x), 6).scatter_add(1, torch.tensor([[1, 1, 0, 0]]).expand(x.shape), x)
    ),
    "changes by index": lambda x: (
        x.new_ones(len(x), 2).index_add_(1, torch.tensor([0, 1, 0, 1]), torch.sin(x), alpha=2)
        + x.index_copy(1, torch.tensor([2, 0]), x[:, :2]).index_fill(1, torch.tensor([1]), 0.5)[:, 1:3]
    ),
    "parts and angles": lambda x: torch.cat(
        [
            *torch.tensor_split(torch.sin(x), 3, 1),
            *torch.hsplit(torch.deg2rad(x), 2),
            torch.rot90(x.reshape(-1, 2, 2), 1, (1, 2)).flatten(1),
            torch.diag_embed(torch.fliplr(x)).sum(1),
        ],
        1,
    ),
    "trapezoid": lambda x: (
        torch.trapezoid(torch.sin(x), torch.tensor([0.0, 1.0, 3.0, 4.0]).to(x)) + torch.trapezoid(x, dx=0.1)
    ),
    "joins": lambda x: (
        torch.hstack([torch.sin(x), torch.concat([x, x], 1)]) + torch.column_stack([x[:, 0], x, x, x])[:, :12]
    ),
}

PRODUCTS = {
    "einsum of rows": lambda x: torch.einsum("bi,bi->b", torch.sin(x), x @ W)[:, None],
    "quadratic form": lambda x: torch.einsum("bi,ij,bj->b", x, W, x),
    "outer product": lambda x: torch.einsum("bi,bj->bij", torch.sin(x), x),
    "bilinear": lambda x: functional.bilinear(torch.sin(x), x, torch.stack([W, W.T]), W[0, :2]),
    "bmm": lambda x: torch.bmm(x.reshape(-1, 2, 2), torch.sin(x).reshape(-1, 2, 2)),
    "matmul": lambda x: x.reshape(-1, 2, 2) @ torch.sin(x).reshape(-1, 2, 2),
    "baddbmm": lambda x: (
        torch.baddbmm(x.reshape(-1, 2, 2), x.reshape(-1, 2, 2), x.sin().reshape(-1, 2, 2)) + W[:2, :2]
    ),
    "cross": lambda x: torch.cross(x[:, :3], torch.tanh(x[:, 1:]), dim=1),
    "addcmul": lambda x: torch.addcmul(x, torch.sin(x), x @ W, value=0.5) + torch.addcdiv(x, x, 2 + torch.cos(x)),
    "lerp": lambda x: torch.lerp(x, torch.tanh(x), 0.3) + torch.lerp(x, torch.tanh(x), torch.sigmoid(x)),
    "tensordot": lambda x: torch.tensordot(torch.tanh(x), W, dims=([1], [0])),
}

NORMS = {
    "var": lambda x: x.var(1, keepdim=True) + torch.sin(x).var(1, unbiased=False, keepdim=True),
    "std": lambda x: x.std(1),
    "norm": lambda x: x.norm(dim=1),
    "norm of matrices": lambda x: (
        torch.linalg.matrix_norm(x.reshape(-1, 2, 2))
        + torch.linalg.norm(x.reshape(-1, 2, 2), "fro", dim=(1, 2))
        + torch.linalg.norm(x, 2, dim=1)
    ),
    "square of a norm": lambda x: torch.exp(-((x[:, None] - W).norm(dim=-1) ** 2)),
    "distance": lambda x: functional.pairwise_distance(x, x @ W),
    "LayerNorm": nn.LayerNorm(D).double(),
    "LayerNorm of two axes": lambda x: functional.layer_norm(x.reshape(-1, 2, 2), [2, 2], W[:2, :2], W[2:, 2:]),
    "RMSNorm": nn.RMSNorm(D).double(),
    "GroupNorm": nn.GroupNorm(2, D, eps=1e-3).double(),
    "InstanceNorm": nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True)).double(),
    "native": lambda x: torch.native_layer_norm(x, [D], W[0], W[1], 1e-5)[0],
    "erfc": lambda x: torch.erfc(x) + torch.logaddexp(x, x @ W),
}

AXES = {
    "rows last": lambda x: torch.tanh(W @ x.T).T,
    "ensemble": lambda x: torch.stack([torch.tanh(x @ W), torch.sin(x @ W), x @ W.T]).mean(0),
    "ensemble by einsum": lambda x: torch.einsum("bi,kih->kbh", x, torch.stack([W, W.T])).tanh().mean(0),
    "ensemble by bmm": lambda x: torch.bmm(x.expand(2, *x.shape), torch.stack([W, W.T])).tanh().sum(0),
    "constants of more axes": lambda x: (x * W[:, None, :]).sin().sum(0),
    "product": lambda x: (x.T * torch.sin(x.T)).T + (x.T.sum(0) * x.T).T,
    "as many features as rows": lambda x: torch.tanh(torch.cat([x, x[:, :3]], 1).T).T[:, :3],
    "norm": lambda x: x.T.norm(dim=0)[:, None] * torch.tanh(x.T).T,
}

FORMS = {
    f"{kind}: {name}": form
    for kind, forms in {
        "in place": IN_PLACE,
        "weights": ON_WEIGHTS,
        "selection": SELECTIONS,
        "product": PRODUCTS,
        "norm": NORMS,
        "axis": AXES,
    }.items()
    for name, form in forms.items()
}


def module_of(form):
    return form if isinstance(form, nn.Module) else Function(form)


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    module = module_of(FORMS[name])
    network = hessquik.from_torch(module, X)
    reference = PURE.get(name.partition(": ")[2], module)
    assert worst_error(network, reference, X) <= TOLERANCE


def test_ensemble_by_vmap():
    members = [nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2)).double() for _ in range(3)]
    weights, _ = torch.func.stack_module_state(members)
    member = copy.deepcopy(members[0]).to("meta")

    def mean(x):
        return torch.func.vmap(lambda each: torch.func.functional_call(member, each, (x,)))(weights).mean(0)

    network = hessquik.from_torch(Function(mean), X)
    assert worst_error(network, lambda x: sum(each(x) for each in members) / 3, X) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_products_by_vmap_and_their_files(tmp_path):
    module = Function(torch.func.vmap(lambda u: torch.dot(torch.tanh(u @ W), u)))
    exported = torch.export.export(module, (X,))
    torch.export.save(exported, tmp_path / "as_it_is.pt2")
    with pytest.raises(UnsupportedError, match=r"for vmap, save exported.run_decompositions\({}\)"):
        import_file(tmp_path / "as_it_is.pt2")
    torch.export.save(exported.run_decompositions({}), tmp_path / "form.pt2")
    for network in (hessquik.from_torch(module, X), import_file(tmp_path / "form.pt2").network):
        assert worst_error(network, module, X) <= TOLERANCE


#: Forms whose files of core operators differ most from the forms.
IN_CORE = (
    "in place: residual",
    "in place: view of a view",
    "weights: softmax",
    "weights: spectral_norm",
    "selection: shapes",
    "product: bilinear",
    "product: baddbmm",
    "norm: LayerNorm",
    "norm: RMSNorm",
    "norm: GroupNorm",
    "norm: var",
    "axis: ensemble by einsum",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IN_CORE)
def test_forms_in_files_of_core_operators(name, tmp_path):
    module = module_of(FORMS[name])
    torch.export.save(torch.export.export(module, (X,)).run_decompositions(), tmp_path / "form.pt2")
    assert worst_error(import_file(tmp_path / "form.pt2").network, module, X) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")  # those of torch's exporter
@pytest.mark.parametrize("is_decomposed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_forms_in_files(name, is_decomposed, tmp_path):
    """Exported programs hold the same calls, or the pure ones of core operators."""
    module = module_of(FORMS[name])
    exported = torch.export.export(module, (X,))
    torch.export.save(exported.run_decompositions({}) if is_decomposed else exported, tmp_path / "form.pt2")
    if name == "weights: without gradient" and not is_decomposed:
        with pytest.raises(UnsupportedError, match=r"a program within it, as torch.no_grad"):
            import_file(tmp_path / "form.pt2")
        return
    network = import_file(tmp_path / "form.pt2").network
    assert worst_error(network, PURE.get(name.partition(": ")[2], module), X) <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["hardsigmoid", "hardswish", "softshrink", "clip", "bounds by entry", "bounds", "amax", "max", "normalize"],
)
def test_kinks(name):
    forms = {
        "hardsigmoid": lambda x: (x / 6 + 0.5).clamp(0.0, 1.0),
        "hardswish": lambda x: x * (x / 6 + 0.5).clamp(0.0, 1.0),
        "softshrink": functional.softshrink,
        "clip": lambda x: torch.clip(x, -0.5, 0.5),
        "bounds by entry": lambda x: (
            torch.clamp(
                x @ W, torch.tensor([-1.0, -torch.inf, 0.5, 2.0]).to(x), torch.tensor([-0.5, 0.5, 0.5, 0.5]).to(x)
            )
            + torch.clamp((3 * x).T, min=torch.tensor([[-1.0], [-2.0], [0.1], [0.2]]).to(x)).T
        ),
        "bounds": lambda x: torch.clamp(x @ W, x - 0.5, torch.sin(x) + 0.5),
        "amax": lambda x: torch.cat([x, x @ W, x[:, :1]], 1).amax(1),
        "max": lambda x: (x @ W).max(1).values - (x @ W).min(1).values,
        "normalize": lambda x: functional.normalize(x, dim=1),
    }
    module = {"hardsigmoid": nn.Hardsigmoid(), "hardswish": nn.Hardswish()}.get(name, Function(forms[name]))
    network = hessquik.from_torch(module, X, allow_kinks=True)
    assert worst_error(network, forms[name], X) <= TOLERANCE


def test_product_with_a_function_of_many_functions():
    """The names of what is inside one another stay short."""

    def f(x):
        y = x
        for _ in range(50):
            y = torch.sin(y)
        return x * y

    assert worst_error(hessquik.from_torch(Function(f), X), f, X) <= TOLERANCE


@pytest.mark.parametrize("exponent", [2.5, -1.3, 0.1, 20, 33, -17, 3.0, 0])
def test_powers(exponent):
    network = hessquik.from_torch(Function(lambda x: x**exponent + x), X.abs() + 0.5, bounds=POSITIVE)
    assert worst_error(network, lambda x: x**exponent + x, X.abs() + 0.5) <= TOLERANCE


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x[:, :, None] ** torch.arange(4)).flatten(1),
        lambda x: (1 + x * x) ** torch.tensor([0.5, 2.3, -3.0, 0.0], dtype=x.dtype),
        lambda x: (x.T ** torch.tensor([[1], [2], [3], [2]])).T,
    ],
    ids=["monomials", "real exponents", "rows last"],
)
def test_powers_that_differ_by_entry(f):
    assert worst_error(hessquik.from_torch(Function(f), X), f, X) <= TOLERANCE


@pytest.mark.parametrize("alpha", [0.25, 0.5, 49.0])
def test_elu_of_scaled_arguments(alpha):
    """CELU is such a function, in torch's own words; torch rounds the α of its derivatives to float32."""
    elu = Function(lambda x: torch.ops.aten.elu(x, alpha, 3.0, 1 / alpha))
    for module, factor in ((elu, 3.0), (nn.CELU(alpha), 1.0)):
        network = hessquik.from_torch(module, X)
        expected = Function(lambda x, c=factor: c * torch.where(x > 0, x, alpha * torch.expm1(x / alpha)))
        assert worst_error(network, expected, X) <= TOLERANCE


def test_weights_that_are_cast_to_the_dtype_of_the_input():
    linear = nn.Linear(D, D)
    module = Function(lambda x: torch.tanh(x @ linear.weight.to(x.dtype)) + x.to(linear.bias.dtype))
    module.linear = linear
    network = hessquik.from_torch(module, X.float())
    assert next(network.parameters()).dtype is torch.float32
    assert worst_error(network.double(), module.double(), X) <= TOLERANCE


def test_a_power_that_is_a_buffer():
    exponent = nn.Buffer(torch.tensor(3.0))
    module = Function(lambda x: x**exponent)
    module.exponent = exponent
    assert worst_error(hessquik.from_torch(module.double(), X), module, X) <= TOLERANCE


def test_distances():
    """torch has no second derivatives of cdist."""
    network = hessquik.from_torch(Function(lambda x: torch.exp(-(torch.cdist(x, W) ** 2))), X)
    assert worst_error(network, lambda x: torch.exp(-((x[:, None] - W) ** 2).sum(-1)), X) <= TOLERANCE


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_weights_of_any_size(scale):
    module = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    for parameter in module[2].parameters():
        parameter.data *= scale
    network = hessquik.from_torch(module)
    assert worst_error(network, module, X) <= TOLERANCE


@pytest.mark.parametrize("width", [1, 2])
def test_parts_without_features(width):
    def f(x):
        rest = torch.tanh(x[:, 1:])
        return torch.cat([2 * rest, torch.sin(x[:, :1]), rest * rest, rest**2.0, x[:, :0] @ W[:0, :1]], 1) * x[:, :1]

    assert worst_error(hessquik.from_torch(Function(f), X[:, :width]), f, X[:, :width]) <= TOLERANCE


def test_physical_scales():
    module = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1)).double()
    mean, scale = torch.tensor([1e5, 300.0]).double(), torch.tensor([100.0, 5.0]).double()
    network = hessquik.from_torch(module, input_mean=mean.tolist(), input_scale=scale.tolist())
    x = mean + scale * X[:, :2]
    assert worst_error(network, lambda x: module((x - mean) / scale), x) <= TOLERANCE


def test_rows_of_another_example_do_not_matter():
    for rows in (1, 2, 5):
        network = hessquik.from_torch(Function(lambda x: torch.tanh(W @ x.T).T), torch.zeros(rows, D).double())
        assert worst_error(network, lambda x: torch.tanh(x @ W.T), X) <= TOLERANCE


def test_a_copy_that_may_share_memory_is_not_used_after_a_change():
    def change(x):
        y = torch.sin(x)
        y.reshape(-1, 2, 2).mul_(2.0)
        return y

    with pytest.raises(UnsupportedError, match=r"takes 'sin', which may have been changed in place; clone before"):
        hessquik.from_torch(Function(lambda x: change(x) + 1), X)

    def use_of_the_copy(x):
        y = torch.sin(x).reshape(-1, 2, 2)
        y += 1.0
        return y.flatten(1) * x

    assert worst_error(hessquik.from_torch(Function(use_of_the_copy), X), use_of_the_copy, X) <= TOLERANCE


def test_a_copy_of_what_does_not_lie_in_order_is_not_taken_for_a_view():
    def change(x):
        y = torch.sin(x).t()
        z = y.contiguous()
        y.clamp_(-5.0, 5.0)
        return (y * z).t()

    with pytest.raises(UnsupportedError, match="takes 'contiguous', which may have been changed in place"):
        hessquik.from_torch(Function(change), X, allow_kinks=True)


@pytest.mark.parametrize(
    ("low", "high"),
    [(5.0, 2.0), (-5.0, -9.0), (-1e12, 1.0), (-1e20, None), (torch.finfo(torch.float32).min, 1.0), (0.5, 3.5e38)],
)
def test_clamps_with_any_bounds(low, high):
    def f(x):
        return torch.clamp(x @ W, low, high)

    x = torch.cat([X - 30, X, X + 30, 1e4 * X])
    bounds = [20.0] * D, [40.0] * D
    assert worst_error(hessquik.from_torch(Function(f), X, allow_kinks=True, bounds=bounds), f, x) <= TOLERANCE


def test_far_bounds_have_no_kinks():
    limits = torch.finfo(torch.float32)
    network = hessquik.from_torch(Function(lambda x: torch.clamp(torch.sin(x), limits.min, limits.max)), X)
    assert worst_error(network, torch.sin, X) <= TOLERANCE


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.exp(x) / torch.exp(x).sum(1, keepdim=True),
        lambda x: torch.exp(x) / (1 + torch.exp(x).sum(1, keepdim=True)),
        lambda x: torch.exp(x[:, :1]) * torch.exp(-2 * x[:, 1:]),
        lambda x: torch.exp(x) / (0.5 + (x * x).sum(1, keepdim=True) + torch.square(x[:, :1])),
        lambda x: torch.exp(-(x**2)) * torch.rsqrt(torch.exp(x).sum(1, keepdim=True)),
        lambda x: torch.exp(x) / torch.sqrt(torch.exp(x).sum(1, keepdim=True)),
    ],
)
def test_products_of_exponentials_far_from_the_comparison(f):
    network = hessquik.from_torch(Function(f), X)
    for scale in (1.0, 15.0):
        for got, expected in zip(
            network(scale * X, do_gradient=True, do_Hessian=True), derivatives(f, scale * X), strict=True
        ):
            assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_product_of_an_exponential_and_a_power_that_is_zero():
    def f(x):
        return torch.exp(x[:, :1]) * (x * x).sum(1, keepdim=True) ** 3

    x = torch.cat([X, torch.zeros(1, D, dtype=torch.float64)])
    assert worst_error(hessquik.from_torch(Function(f), X), f, x) <= TOLERANCE


def test_quotient_of_an_exponential_and_numbers_of_both_signs():
    def f(x):
        return torch.exp(x) / (torch.exp(x[:, :1]) - 2 * torch.exp(x[:, 1:2]) - 10)

    assert worst_error(hessquik.from_torch(Function(f), X), f, X) <= TOLERANCE


def test_square_of_a_root_is_defined_where_the_root_is():
    network = hessquik.from_torch(Function(lambda x: torch.sqrt(x + 3) ** 2), X)
    assert bool(network(torch.full((1, D), -4.0, dtype=torch.float64))[0].isnan().all())


def test_hyperbolic_sine_near_zero():
    x = 1e-12 * X
    got = hessquik.from_torch(Function(torch.sinh), X)(x)[0]
    assert bool(((got - torch.sinh(x)).abs() <= 1e-15 * x.abs()).all())


def program(*calls):
    """Return a program that multiplies its input by the result of calls without arguments that depend on it."""
    last = Call("aten.mul.Tensor", (Ref("x"), Ref(calls[-1].outputs[0])), {}, ("y",), "")
    return Program("x", (7, D), torch.float64, {"w": W}, [*calls, last], "y")


def call(target, *args, **kwargs):
    return Call(target, args, kwargs, ("made",), "")


@pytest.mark.parametrize(
    "made",
    [
        call("aten.from_file.default", "/etc/passwd", False, 8),
        call("aten.rand.default", [4]),
        call("aten.randperm.default", 4),
        call("aten.bernoulli.default", Ref("w")),
        call("aten.dropout.default", Ref("w"), 0.5, True),
        call("aten.rrelu.default", Ref("w"), 0.1, 0.2, True),
        call("aten.set_.source_Tensor", Ref("w"), Ref("w")),
        call("aten.add.out", Ref("w"), Ref("w"), out=Ref("w")),
        call("aten._print.default", "x"),
        call("aten.full.default", [10**12], 0.0),
        call("aten.zeros.default", [10**6, 10**6]),
        call("aten.eye.default", 10**6),
        call("aten.arange.default", 10**12),
        call("aten.repeat.default", Ref("w"), [10**6, 10**6]),
        call("aten.expand.default", Ref("w"), [10**9, 4, 4]),
        call("aten.kron.default", Ref("w"), Ref("w"), "x"),
        call("aten.nonzero.default", Ref("w")),
        call("aten.bincount.default", Ref("w")),
        call("aten.add_.Tensor", Ref("w"), 1.0),
        call("aten.no_such_operator.default", Ref("w")),
        call("aten.__class__.default", Ref("w")),
        call("prim.print.default", Ref("w")),
        call("torch.load", "/etc/passwd"),
        call("_operator.mul", [0.0], 10**12),
        call("builtins.eval", "1"),
    ],
    ids=lambda made: f"{made.target} {made.args}"[:40],
)
def test_constants_of_files_that_are_not_computed(made):
    with pytest.raises(UnsupportedError, match="node "):
        read(program(made), Input("x", D))


@pytest.mark.parametrize(
    "made",
    [
        call("aten.repeat.default", Ref("x"), [1, 10**12]),
        call("aten.expand.default", Ref("x"), [10**10, 7, 4]),
        call("aten.constant_pad_nd.default", Ref("x"), [0, 10**12]),
    ],
    ids=lambda made: made.target,
)
def test_values_of_files_that_are_too_large(made):
    with pytest.raises(UnsupportedError, match=r"makes an array of .* numbers; keep every array below"):
        read(Program("x", (7, D), torch.float64, {}, [made], "made"), Input("x", D))
