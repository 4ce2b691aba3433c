"""Networks that cannot be exact, more than 200: each is refused by its node, its effect and a remedy."""

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional

import hessquik
from hessquik.errors import FormatError, ShapeError, UnsupportedError
from hessquik.importing import onnx_handlers, onnx_operations, support, torch_operations, torch_reader

WIDTH = 4


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Branches(nn.Module):
    """Control flow that depends on the data."""

    def forward(self, x):
        return torch.tanh(x) if x.sum() > 0 else torch.sin(x)


class Repeats(nn.Module):
    """A loop whose length depends on the data."""

    def forward(self, x):
        while x.norm() > 1:
            x = x / 2
        return x


class Counts(nn.Module):
    """A module that counts its calls, in evaluation as well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.tanh(x)


class Force(nn.Module):
    """The derivative of an energy."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Attention(nn.Module):
    """Attention between the halves of a row."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x):
        u = x.reshape(x.shape[0], 2, 2)
        return self.attention(u, u, u)[0].flatten(1)


@torch.library.custom_op("hessquik_tests::cubed", mutates_args=())
def cubed(x: torch.Tensor) -> torch.Tensor:
    """Return x³; this is a user-defined operator."""
    return x**3


@cubed.register_fake
def _(x):
    return torch.empty_like(x)


def on(shape, module):
    """Return a module that takes rows of another shape."""
    return nn.Sequential(nn.Unflatten(1, shape), module)


def first(module):
    """Return the first result of a recurrent module, on two steps of two features."""
    return on((2, 2), nn.Sequential(module, Function(lambda result: result[0])))


def square(f):
    """Return a function of 2 × 2 matrices."""
    return Function(lambda x: f(x.reshape(-1, 2, 2)))


#: What a module does and what to do instead, and modules by the operator that does it.
TORCH = {
    "is a convolution, .*; use nn.Linear on the flattened input": {
        "conv1d": on((1, 4), nn.Conv1d(1, 2, 3)),
        "conv2d": on((1, 2, 2), nn.Conv2d(1, 2, 2)),
        "conv3d": on((1, 2, 2, 1), nn.Conv3d(1, 2, 1)),
        "conv_transpose1d": on((1, 4), nn.ConvTranspose1d(1, 2, 3)),
        "conv_transpose2d": on((1, 2, 2), nn.ConvTranspose2d(1, 2, 2)),
        "conv_transpose3d": on((1, 2, 2, 1), nn.ConvTranspose3d(1, 2, 1)),
    },
    r"changes buffer num_batches_tracked at every call, .*; call module.eval\(\) before; if it": {
        "add_": nn.BatchNorm1d(WIDTH)
    },
    r"changes buffer calls at every call, .* in training; call module.eval\(\) before; if it": {
        "add_": Counts().eval()
    },
    r"writes into another array \(out=\), as spectral_norm does in training; call module.eval\(\) before": {
        "div": nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 3))
    },
    r"normalises with the statistics of the batch, .*; call module.eval\(\) before, and let it track": {
        "batch_norm": nn.BatchNorm1d(WIDTH, track_running_stats=False).eval()
    },
    "stops the gradient .*, so that the module's own derivatives are not those of its values; remove it": {
        "detach": Function(lambda x: torch.tanh(x) * x.detach()),
        "detach ": Function(lambda x: x + torch.no_grad()(torch.sin)(x)),
        "detach_": Function(lambda x: torch.tanh(x) * torch.sin(x).detach_()),
    },
    "jumps where its argument is its bound; use a smooth function": {"hardshrink": nn.Hardshrink()},
    "jumps from 0.0 to 0.1 where its argument is 0.1; use a smooth": {"threshold": nn.Threshold(0.1, 0.0)},
    "jumps where its argument is 0.5, which is its value from there on; use a threshold of 20.0 or more": {
        "softplus": nn.Softplus(2.0, 1.0)
    },
    "is softplus of the steepness beta = 0.0; use one above 0": {"softplus ": nn.Softplus(0.0)},
    r"multiplies its argument by -1\.0 in an exponential; use an alpha above 0": {"celu": nn.CELU(-1.0)},
    "computes with NaN, or multiplies by infinity; use finite numbers": {
        "mul": Function(lambda x: x * float("inf")),
        "div": Function(lambda x: x / 0.0),
        "add": Function(lambda x: x + float("nan")),
    },
    "has other constants for every row; compute all rows with the same constants": {
        "pow": Function(lambda x: x ** torch.arange(7.0)[:, None])
    },
    r"drops features or draws slopes at random; call module.eval\(\) before": {
        "dropout": nn.Dropout(),
        "alpha_dropout": nn.AlphaDropout(),
        "feature_alpha_dropout": nn.FeatureAlphaDropout(),
        "feature_dropout": on((2, 2), nn.Dropout1d()),
        "rrelu": nn.RReLU(),
    },
    "sums exponentials, which overflow .*, and the largest has kinks; return the values before it": {
        "softmax": nn.Softmax(1),
        "softmax ": nn.Softmin(1),
        "softmax  ": Attention(),
        "log_softmax": nn.LogSoftmax(1),
        "logsumexp": Function(lambda x: x.logsumexp(1, keepdim=True)),
    },
    "is attention, whose softmax .* the largest has kinks; use fully-connected layers": {
        "scaled_dot_product_attention": square(lambda u: functional.scaled_dot_product_attention(u, u, u)),
        "scaled_dot_product_attention ": on((2, 2), nn.TransformerEncoderLayer(2, 1, 4, 0.0, batch_first=True)),
    },
    "takes a maximum, which has kinks where its arguments are equal; use a smooth function": {
        "max_pool1d": on((1, 4), nn.MaxPool1d(2)),
        "max_pool2d": on((1, 2, 2), nn.MaxPool2d(2)),
        "max_pool3d": on((1, 2, 2, 1), nn.MaxPool3d((2, 2, 1))),
        "adaptive_max_pool1d": on((1, 4), nn.AdaptiveMaxPool1d(2)),
        "adaptive_max_pool2d": on((1, 2, 2), nn.AdaptiveMaxPool2d(1)),
        "sort": Function(lambda x: x.sort(1).values),
        "topk": Function(lambda x: x.topk(2, 1).values),
        "median": Function(lambda x: x.median(1, keepdim=True).values),
        "kthvalue": Function(lambda x: x.kthvalue(2, 1, keepdim=True).values),
        "cummax": Function(lambda x: x.cummax(1).values),
    },
    "is a pooling over places, .*; use nn.Linear on the flattened input": {
        "avg_pool1d": on((1, 4), nn.AvgPool1d(2)),
        "avg_pool2d": on((1, 2, 2), nn.AvgPool2d(2)),
        "avg_pool3d": on((1, 2, 2, 1), nn.AvgPool3d((2, 2, 1))),
        "adaptive_avg_pool1d": on((1, 4), nn.AdaptiveAvgPool1d(2)),
        "adaptive_avg_pool2d": on((1, 2, 2), nn.AdaptiveAvgPool2d(1)),
    },
    "looks up a table by integers; import the part of the network behind the table": {
        "bucketize": Function(lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0]))),
        "searchsorted": Function(lambda x: torch.searchsorted(torch.tensor([0.0, 1.0]), x)),
        "embedding": Function(lambda x: functional.embedding(x.long(), torch.ones(5, 2)).flatten(1)),
        "one_hot": Function(lambda x: functional.one_hot(x.long(), 5).flatten(1)),
    },
    "is constant in pieces, so that its derivatives are 0 or undefined; use a smooth function": {
        "argmax": Function(lambda x: x.argmax(1, keepdim=True)),
        "argmin": Function(lambda x: x.argmin(1, keepdim=True)),
        "round": Function(torch.round),
        "floor": Function(torch.floor),
        "ceil": Function(torch.ceil),
        "trunc": Function(torch.trunc),
        "sign": Function(torch.sign),
        "sgn": Function(torch.sgn),
        "frac": Function(torch.frac),
        "remainder": Function(lambda x: x % 1.0),
        "fmod": Function(lambda x: torch.fmod(x, 1.0)),
        "floor_divide": Function(lambda x: x // 2.0),
        "heaviside": Function(lambda x: torch.heaviside(x, torch.tensor(0.5))),
    },
    "chooses by a comparison; use a smooth function in place of the choice": {
        "gt": Function(lambda x: torch.where(x > 0, x, 2 * x)),
        "ge": Function(lambda x: (x >= 0) * x),
        "lt": Function(lambda x: x.masked_fill(x < 0, 0.0)),
        "le": Function(lambda x: (x <= 0) * x),
        "eq": Function(lambda x: (x == 0) * x),
        "ne": Function(lambda x: (x != 0) * x),
        "isnan": Function(lambda x: torch.isnan(x) * x),
        "logical_and": Function(lambda x: torch.logical_and(x, x) * x),
        "logical_or": Function(lambda x: torch.logical_or(x, x) * x),
        "logical_not": Function(lambda x: torch.logical_not(x) * x),
        "nonzero": Function(lambda x: x.nonzero()),
        "item": Function(lambda x: x * x.sum().item()),
    },
    "is a recurrent network; use fully-connected layers": {
        "lstm": first(nn.LSTM(2, 2, batch_first=True)),
        "gru": first(nn.GRU(2, 2, batch_first=True)),
        "rnn_tanh": first(nn.RNN(2, 2, batch_first=True)),
        "rnn_relu": first(nn.RNN(2, 2, nonlinearity="relu", batch_first=True)),
        "lstm_cell": nn.Sequential(nn.LSTMCell(WIDTH, 2), Function(lambda result: result[0])),
        "gru_cell": nn.GRUCell(WIDTH, 2),
        "rnn_tanh_cell": nn.RNNCell(WIDTH, 2),
        "rnn_relu_cell": nn.RNNCell(WIDTH, 2, nonlinearity="relu"),
    },
    "draws random numbers; make the module deterministic": {
        "rand_like": Function(lambda x: x + torch.rand_like(x)),
        "randn_like": Function(lambda x: x + torch.randn_like(x)),
        "bernoulli": Function(lambda x: x * torch.bernoulli(torch.sigmoid(x))),
        "normal": Function(lambda x: torch.normal(x, 1.0)),
        "multinomial": Function(lambda x: torch.multinomial(torch.sigmoid(x), 1)),
    },
    "is linear in pieces or has a kink .*; train with a smooth activation .*allow_kinks=True": {
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(),
        "hardtanh": nn.Hardtanh(),
        "hardtanh ": nn.ReLU6(),
        "prelu": nn.PReLU(),
        "selu": nn.SELU(),
        "elu": nn.ELU(0.5),
        "rrelu": nn.RReLU().eval(),
        "abs": Function(torch.abs),
        "clamp": Function(lambda x: x.clamp(-1, 1)),
        "maximum": Function(lambda x: torch.maximum(x, -x)),
        "minimum": Function(lambda x: torch.minimum(x, -x)),
        "fmax": Function(lambda x: torch.fmax(x, -x)),
        "fmin": Function(lambda x: torch.fmin(x, -x)),
        "max": Function(lambda x: x.max(1, keepdim=True).values),
        "min": Function(lambda x: x.min(1, keepdim=True).values),
        "amax": Function(lambda x: x.reshape(-1, 2, 2).amax((1, 2)).unsqueeze(1)),
        "amin": Function(lambda x: x[:, :3].amin(1, keepdim=True)),
        "hardsigmoid": nn.Hardsigmoid(),
        "hardswish": nn.Hardswish(),
        "softshrink": nn.Softshrink(),
        "threshold": nn.Threshold(0.1, 0.1),
        "clamp_min": Function(lambda x: functional.normalize(x, dim=1)),
        "relu_": nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(inplace=True)),
    },
    "takes a norm that has kinks, or divides by one; use the Euclidean norm along an axis of features": {
        "linalg_vector_norm": Function(lambda x: torch.linalg.vector_norm(x, 1, dim=1)),
        "linalg_norm": square(lambda u: torch.linalg.norm(u, 2, dim=(1, 2))),
        "linalg_matrix_norm": square(lambda u: torch.linalg.matrix_norm(u, 2)),
        "cdist": Function(lambda x: torch.cdist(x, torch.ones(3, WIDTH), p=1.0)),
        "linalg_vector_norm ": Function(lambda x: torch.norm(x, p=3, dim=1)),
        "cosine_similarity": Function(lambda x: functional.cosine_similarity(x, torch.ones(WIDTH))),
    },
    "solves with or factors a matrix that depends on the inputs; return the matrix": {
        "linalg_det": square(torch.linalg.det),
        "linalg_inv": square(torch.linalg.inv),
        "linalg_solve": square(lambda u: torch.linalg.solve(u, torch.ones(2))),
        "linalg_eigvalsh": square(torch.linalg.eigvalsh),
        "linalg_cholesky": square(torch.linalg.cholesky),
    },
    "computes with complex numbers; write it with real and imaginary parts": {
        "real": Function(lambda x: (x * torch.ones(4, dtype=torch.complex64)).real),
        "to": Function(lambda x: x.to(torch.complex64)),
        "fft_fft": Function(lambda x: torch.fft.fft(x).real),
        "complex": Function(lambda x: torch.view_as_real(torch.complex(x, x)).flatten(1)),
    },
    "multiplies all features; write it as products of two": {
        "prod": Function(lambda x: x.prod(1, keepdim=True)),
        "cumprod": Function(lambda x: x.cumprod(1)),
    },
    "raises to a power that is not one number; write": {"pow": Function(lambda x: x**x)},
    "rounds a quotient; divide without rounding_mode": {
        "div": Function(lambda x: torch.div(x, 2.0, rounding_mode="trunc"))
    },
    "makes integers of the values; keep the values as real numbers": {
        "to": Function(lambda x: x.long() * 2),
        "to ": Function(lambda x: x.bool() * 2.0),
    },
    "rounds the values to few digits; keep the values as float32 or float64": {
        "to": Function(lambda x: x.half().float()),
        "to ": Function(lambda x: x.bfloat16()),
    },
    "multiplies more than two values .*, or lets rows depend on each other; compute each row alone, of two": {
        "einsum": Function(lambda x: torch.einsum("ni,nj,nk->nijk", x, x, x).flatten(1)),
    },
    "lets rows depend on each other; compute each row alone": {
        "matmul": Function(lambda x: x @ x.transpose(0, 1)),
        "matmul ": Function(lambda x: x @ x.T),
        "outer": Function(lambda x: torch.outer(x[:, 0], x[:, 1])),
    },
    "multiplies 1200 by 1200 values that both depend on the inputs; multiply values of at most 16384 pairs": {
        "bmm": square(lambda u: torch.bmm(u.repeat(1, 10, 30), u.repeat(1, 30, 10)).flatten(1))
    },
    "multiplies each row by all others; each row must be computed alone": {
        "mul": Function(lambda x: x[None, :, :] * x[:, None, :])
    },
    "multiplies values that both depend on the inputs, or lets rows depend on each other; only products": {
        "flip": Function(lambda x: x.flip(0)),
        "roll": Function(lambda x: x.roll(1, 0)),
        "cumsum": Function(lambda x: x.cumsum(0)),
    },
    "adds another constant to every row; add the same": {"add": Function(lambda x: x + torch.arange(7.0)[:, None])},
    "multiplies every row by another constant; multiply all rows by the same": {
        "mul": Function(lambda x: x * torch.arange(7.0)[:, None])
    },
    r"makes an array \(.*\) of 7 rows; keep one row per point": {
        "mean": Function(lambda x: x - x.mean(0)),
        "sum": Function(lambda x: x.sum()),
    },
    "is not among the operations that can be exact here; write it with those that the table": {
        "tan": Function(torch.tan),
        "asin": Function(torch.asin),
        "acosh": Function(torch.acosh),
        "asinh": Function(torch.asinh),
        "atan2": Function(lambda x: torch.atan2(x, x + 1)),
        "hypot": Function(lambda x: torch.hypot(x, x)),
        "xlogy": Function(lambda x: torch.xlogy(x, x)),
        "erfinv": Function(torch.erfinv),
        "lgamma": Function(torch.lgamma),
        "digamma": Function(torch.digamma),
        "special_bessel_j0": Function(torch.special.bessel_j0),
        "i0": Function(torch.i0),
        "sinc": Function(torch.sinc),
        "logit": Function(torch.logit),
        "nan_to_num": Function(torch.nan_to_num),
        "upsample_nearest1d": on((1, 4), nn.Upsample(scale_factor=2)),
        "im2col": on((1, 2, 2), nn.Unfold(2)),
    },
}
CASES = [(operator, module, reason) for reason, modules in TORCH.items() for operator, module in modules.items()]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("operator", "module", "reason"), CASES, ids=[operator for operator, *_ in CASES])
def test_torch_modules(operator, module, reason):
    with pytest.raises(UnsupportedError) as caught:
        hessquik.from_torch(module, torch.zeros(WIDTH))
    assert re.fullmatch(rf"node \S+ \(aten\.{operator.strip()}\.\w+\) {reason}.*", str(caught.value)), caught.value


#: Modules whose refusal names something else than an operator of torch.
OTHERS = {
    "a branch": (Branches(), r"Branches cannot .* at forward, line \d+: return .*decides by values.*; write forward"),
    "a loop": (Repeats(), r"Repeats cannot .* at forward, line \d+: while .*decides by values.*; write forward"),
    "numpy": (
        Function(lambda x: torch.as_tensor(np.sin(x.detach().numpy()))),
        r"Function cannot be captured by torch.export at .*; write forward with tensor operations alone",
    ),
    "torch.func.jvp": (
        Function(lambda x: torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1]),
        r"node _make_dual .* transforms a function while it runs \(torch.func\); return the function itself in place",
    ),
    "a derivative": (
        Force(),
        r"cannot be captured .* \(it differentiates, .*: return the function that it derives\)",
    ),
    "torch.cond": (
        Function(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))),
        r"node .* (chooses by a comparison|decides or repeats|makes an array \(\)).*; ",
    ),
    "an operator of the user's": (
        nn.Sequential(nn.Tanh(), Function(cubed)),
        r"node '1' \(hessquik_tests\.cubed\.default\) is an operator of your own; write it with torch's operators",
    ),
    "two outputs": (Function(lambda x: (x, 2 * x)), r"the module returns 2 values \(.*\); wrap it in a module that"),
    "a dict": (
        Function(lambda x: {"y": x}),
        "the module returns a dict; wrap it in a module that returns one tensor",
    ),
    "a constant": (Function(lambda x: torch.ones(3, 1)), "node ones does not depend on the input; return what"),
    "rows along another axis": (
        Function(lambda x: x.T),
        r"node numpy_t has the rows along axis 1; return one row per",
    ),
    "a function": (
        torch.tanh,
        "the module must be a torch.nn.Module, got builtin_function_or_method; call it in",
    ),
    "a half": (nn.Linear(4, 1).half(), r"computes in torch.float16, .*; call module.float\(\) or module.double\(\)"),
    "an eighth": (nn.Linear(4, 1).to(torch.float8_e5m2), r"computes in torch.float8_e5m2, .*; call module.float\(\)"),
    "a bfloat": (nn.Linear(4, 1).bfloat16(), r"computes in torch.bfloat16, .*; call module.float\(\) or"),
    "two dtypes": (
        nn.Sequential(nn.Linear(4, 2).double(), nn.Linear(2, 1)),
        r"Sequential cannot compute its values \(.*same dtype.*\); call it on .*give all weights one dtype",
    ),
    "a power of no number": (Function(lambda x: x ** float("nan")), "raises to the power nan; raise to a smaller"),
    "random weights": (
        Function(lambda x: x * torch.rand(4)),
        r"node rand \(aten.rand.default\) is computed from constants by aten.rand.default, .*; compute it once, and",
    ),
    "a large constant": (
        Function(lambda x: x * torch.zeros(10**11).sum()),
        r"node zeros .* makes an array of 100000000000 numbers; keep every array below 268435456 numbers",
    ),
    "no number of inputs": (nn.Tanh(), "Tanh has no layer that tells the number of inputs; pass example_input"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules(name, capfd):
    module, message = OTHERS[name]
    with pytest.raises(UnsupportedError, match=message):
        hessquik.from_torch(module, None if name == "no number of inputs" else torch.zeros(WIDTH))
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")
def test_layers_of_width_0_and_torchscript():
    narrow = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 1))
    with pytest.raises(UnsupportedError, match=r"parameter 0.weight has no numbers, but the shape \(0, 4\); take"):
        hessquik.from_torch(narrow)
    with pytest.raises(UnsupportedError, match="is TorchScript; import the module that it was made from"):
        hessquik.from_torch(torch.jit.script(nn.Linear(4, 1)))


class HeadFirst(nn.Module):
    """A module whose last layer comes first among its parts."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, 1), nn.Linear(3, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_a_wrong_guess_of_the_number_of_inputs_says_so_and_logs_nothing(capfd):
    message = (
        r"HeadFirst cannot be captured .* tried with 8 inputs, as a layer has; pass example_input, one point \(d,\)"
    )
    with pytest.raises(UnsupportedError, match=message):
        hessquik.from_torch(HeadFirst())
    assert capfd.readouterr().err == ""
    assert hessquik.from_torch(HeadFirst(), torch.zeros(3)).dim_input() == 3


@pytest.mark.parametrize(("number", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_no_numbers_are_named(number, kind):
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    module[2].weight.data[0, 1] = number
    message = rf"node '2' \(aten.linear.default\) computes with parameter 2.weight, which has {kind}; train or load"
    with pytest.raises(UnsupportedError, match=message):
        hessquik.from_torch(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight has no shape yet; call the module on points first"),
        (
            lambda: nn.Linear(4, 1, device="meta"),
            "weight is on the device meta; call module.cpu.* and load_state_dict",
        ),
        (
            lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 1)), dtype=torch.qint8),
            r"0 \(Linear\) is quantized, so that it rounds values; import the module that it was made from",
        ),
        (
            lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 1))),
            r"0 \(RecursiveScriptModule\) is TorchScript; import the module that it was made from",
        ),
    ],
    ids=["lazy", "meta", "quantized", "TorchScript"],
)
def test_modules_without_numbers_that_can_be_read(make, message):
    with pytest.raises(UnsupportedError, match=message):
        hessquik.from_torch(make(), torch.zeros(4))


@pytest.mark.parametrize(
    "example",
    ["abc", [[1.0, 2.0], [3.0]], torch.zeros(0, 4), 1.0, {"x": 1.0}, [], torch.zeros(3, 4).to_sparse()],
    ids=["text", "ragged", "none", "a number", "a dict", "a list of none", "sparse"],
)
def test_examples_that_are_no_points(example):
    for module in (nn.Linear(4, 1), Function(torch.sin)):
        with pytest.raises(
            UnsupportedError, match=r"example_input must be one point \(d,\) or several \(n, d\), got"
        ):
            hessquik.from_torch(module, example)


def test_examples_of_other_libraries_and_in_tuples():
    for example in (np.zeros(4), (torch.zeros(2, 4).double(),)):
        assert next(hessquik.from_torch(Function(torch.sin), example).parameters()).dtype is torch.float64


@pytest.mark.parametrize("bounds", [[(0, 1)] * 4, ("a", "b"), 3, (None, None), (["a"] * 4, ["b"] * 4)])
def test_bounds_that_are_no_pair_of_numbers(bounds):
    with pytest.raises(hessquik.ShapeError, match="bounds must be a pair of 4 lower and 4 upper numbers, got"):
        hessquik.from_torch(nn.Linear(4, 1), bounds=bounds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.complex64, "float32", np.float64])
def test_dtypes_of_no_network(dtype):
    with pytest.raises(hessquik.ShapeError, match=r"dtype must be torch.float32 or torch.float64, got"):
        hessquik.from_torch(nn.Linear(4, 1), dtype=dtype)


def test_inputs_that_are_not_one_tensor_of_real_numbers():
    with pytest.raises(UnsupportedError, match="example_input must hold real numbers"):
        hessquik.from_torch(nn.Embedding(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="takes 2 inputs; wrap it in a module that takes one tensor"):
        hessquik.from_torch(nn.Bilinear(2, 2, 1), (torch.zeros(2), torch.zeros(2)))


def test_modules_with_kinks_have_their_derivatives_if_these_are_allowed():
    x = torch.linspace(-2, 2, 3 * WIDTH, dtype=torch.float64).reshape(3, WIDTH)
    (modules,) = (modules for reason, modules in TORCH.items() if reason.startswith("is linear in pieces"))
    for module in modules.values():
        network = hessquik.from_torch(module.double(), x, allow_kinks=True)
        torch.testing.assert_close(network(x)[0], module(x), rtol=1e-12, atol=1e-12)


def onnx_model(node, kind=onnx.TensorProto.DOUBLE, opsets=(("", 20), ("ai.onnx.ml", 3), ("mine", 1)), constants=()):
    """Return a model of one node after a tanh."""
    inputs = [helper.make_tensor_value_info("x", kind, ["n", WIDTH])]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    nodes = [helper.make_node("Tanh", ["x"], ["t"], "first"), node]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*each) for each in opsets], ir_version=9)


def node_of(operator):
    """Return a node with as many inputs as the standard requires."""
    for domain in ("", "ai.onnx.ml"):
        if onnx.defs.has(operator, domain):
            count = max(1, onnx.defs.get_schema(operator, domain).min_input)
            return helper.make_node(operator, ["t"] * count, ["y"], "second", domain=domain)
    return helper.make_node(operator, ["t"], ["y"], "second")  # of other standards


@pytest.mark.parametrize("operator", sorted(onnx_operations.REFUSED))
def test_onnx_operators_with_a_reason(operator):
    does, instead = onnx_operations.REFUSED[operator]
    node = node_of(operator)
    with pytest.raises(UnsupportedError) as caught:
        hessquik.from_onnx(onnx_model(node))
    name = f"{node.domain}.{operator}" if node.domain else operator
    assert str(caught.value) == f"node second ({name}) {does}; {instead}"


UNKNOWN = "Det Asinh Tan Asin Acosh Resize STFT DFT Atanh CumProd Bernoulli NonMaxSuppression Unique RoiAlign"


@pytest.mark.parametrize("operator", [name for name in UNKNOWN.split() if name not in onnx_operations.REFUSED])
def test_onnx_operators_that_nobody_knows(operator):
    with pytest.raises(
        UnsupportedError, match=rf"second \({operator}\) is not among the operators .*; write it with"
    ):
        hessquik.from_onnx(onnx_model(node_of(operator)))


def test_onnx_models_of_other_kinds():
    with pytest.raises(UnsupportedError, match=r"second \(mine\.Tanh\) is an operator of your own"):
        hessquik.from_onnx(onnx_model(helper.make_node("Tanh", ["t"], ["y"], "second", domain="mine")))
    with pytest.raises(UnsupportedError, match=r"x must hold real numbers.*INT64"):
        hessquik.from_onnx(onnx_model(helper.make_node("Tanh", ["t"], ["y"]), onnx.TensorProto.INT64))
    with pytest.raises(UnsupportedError, match=r"second \(MatMul\) lets rows depend on each other"):
        hessquik.from_onnx(_gram())
    half = helper.make_node("Cast", ["t"], ["y"], "second", to=onnx.TensorProto.FLOAT16)
    with pytest.raises(UnsupportedError, match=r"second \(Cast\) rounds the values to few digits; keep"):
        hessquik.from_onnx(onnx_model(half))
    many = numpy_helper.from_array(np.ones((3, 5)), "many")
    with pytest.raises(UnsupportedError, match=r"second \(MatMul\) has arguments that cannot be read .*; export"):
        hessquik.from_onnx(onnx_model(helper.make_node("MatMul", ["t", "many"], ["y"], "second"), constants=[many]))


def test_damaged_onnx_models():
    add = helper.make_node("Add", ["t", "bias"], ["y"], "second")
    with pytest.raises(FormatError, match=r"node second \(Add\): the model must have a value named 'bias' before"):
        hessquik.from_onnx(onnx_model(add))
    for damage in ({"data_type": 113}, {"dims": [3, 119]}):
        bias = numpy_helper.from_array(np.ones(WIDTH), "bias")
        for name, value in damage.items():
            if name == "dims":
                del bias.dims[:]
                bias.dims.extend(value)
            else:
                setattr(bias, name, value)
        with pytest.raises(FormatError, match=r"tensor 'bias' must have numbers of its type and shape"):
            hessquik.from_onnx(onnx_model(add, constants=[bias]))


@pytest.mark.parametrize("given", [5, "ab", [[0.0], [1.0, 2.0]], {"a": 1}, np.zeros((2, 4, 4))])
def test_arguments_of_other_kinds(given):
    model = onnx_model(helper.make_node("Neg", ["t"], ["y"]))
    for bounds in (given, ([0.0] * 4, given), ([0.0] * 4,)):
        with pytest.raises(ShapeError, match=r"bounds must be (a pair of )?4 lower and 4 upper numbers"):
            hessquik.from_onnx(model, bounds=bounds)
    with pytest.raises(ShapeError, match=r"example_input must be a point \(d,\) or points \(n, d\) of numbers"):
        hessquik.from_onnx(model, given)
    with pytest.raises(ShapeError, match=r"dtype must be torch.float32 or torch.float64, got torch.float16"):
        hessquik.from_onnx(model, dtype=torch.float16)
    assert hessquik.from_onnx(model, bounds=np.array([[0.0] * 4, [1.0] * 4])).dim_input() == 4


def test_onnx_models_with_damaged_types():
    def damaged(change):
        model = onnx_model(helper.make_node("Gelu", ["t"], ["y"], "second", approximate="tanh"))
        change(model)
        return model

    below = damaged(lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -1))
    with pytest.raises(FormatError, match=r"input x must have a shape of positive sizes, got \[-1, 4\]"):
        hessquik.from_onnx(below)
    unknown = damaged(lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 43))
    with pytest.raises(UnsupportedError, match=r"x must hold real numbers.* got 43"):
        hessquik.from_onnx(unknown)
    no_text = damaged(lambda model: setattr(model.graph.node[1].attribute[0], "s", b"\xff"))
    with pytest.raises(UnsupportedError, match="cannot be computed by onnx's reference"):
        hessquik.from_onnx(no_text)
    mine = onnx_model(helper.make_node("Gelu", ["t"], ["y"], "second", domain="mine")).SerializeToString()
    for name, message in ((b"mine", "second .* is an operator of your own"), (b"Gelu", "second .* is an operator")):
        other = onnx.load_from_string(mine.replace(name, b"\xff" + name[1:]))
        with pytest.raises(UnsupportedError, match=message):
            hessquik.from_onnx(other)


def _functions(calls):
    """Return a model of functions with the names of those that each of them calls."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    functions = [
        helper.make_function(
            "mine",
            name,
            ["a"],
            ["b"],
            [
                helper.make_node(called, [f"v{i}" if i else "a"], [f"v{i + 1}"], domain="mine")
                for i, called in enumerate(inner)
            ]
            + [helper.make_node("Neg", [f"v{len(inner)}" if inner else "a"], ["b"])],
            opsets,
        )
        for name, inner in calls.items()
    ]
    model = onnx_model(helper.make_node("F0", ["t"], ["y"], "second", domain="mine"))
    model.functions.extend(functions)
    return model


def test_onnx_functions_that_cannot_be_written_out():
    with pytest.raises(FormatError, match=r"functions must be those of an ONNX model .*Cycle"):
        hessquik.from_onnx(_functions({"F0": ["F1"], "F1": ["F0"]}))
    doubling = {f"F{i}": [f"F{i + 1}"] * 2 for i in range(40)} | {"F40": []}
    with pytest.raises(FormatError, match="must have at most 65536 nodes with its functions written out"):
        hessquik.from_onnx(_functions(doubling))
    assert hessquik.from_onnx(_functions({"F0": ["F1", "F1"], "F1": ["F2"], "F2": []})).dim_input() == WIDTH


def _gram():
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, [3, 3])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, [3, 3])]
    node = helper.make_node("MatMul", ["x", "x"], ["y"], "second")
    graph = helper.make_graph([node], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_there_are_200_of_them_and_every_reason_says_what_to_do_instead():
    assert len(CASES) + len(OTHERS) + len(onnx_operations.REFUSED) + len(UNKNOWN.split()) >= 200
    assert len({id(module) for _, module, _ in CASES}) == len(CASES)
    for table in (torch_operations.REFUSED, onnx_operations.REFUSED):
        assert all(does and instead for does, instead in table.values())


def test_no_operation_is_both_supported_and_refused():
    assert not {*torch_operations.POINTWISE, *torch_operations.ADDITIVE} & torch_operations.REFUSED.keys()
    assert not {*onnx_operations.POINTWISE, *onnx_operations.ADDITIVE} & onnx_operations.REFUSED.keys()


def test_the_table_of_the_documentation_has_all_that_the_readers_know():
    named = {*re.findall(r"`([\w.]+)`", support.table())}
    for operations, reader in ((torch_operations, torch_reader), (onnx_operations, onnx_handlers)):
        assert named >= {*operations.POINTWISE, *operations.ADDITIVE, *operations.REFUSED, *reader.HANDLERS}
    assert named >= {"MLPRegressor", "Pipeline", "StandardScaler", "BatchNorm1d"}
