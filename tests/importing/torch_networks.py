"""Random torch modules of everything that can be imported, drawn from a seed."""

import random

import torch
from torch import nn

SMOOTH = (
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    lambda: nn.Softplus(2.0, 30.0),
    nn.SiLU,
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.Mish,
    nn.LogSigmoid,
    nn.Tanhshrink,
    nn.Softsign,
    nn.ELU,
    nn.CELU,
    lambda: nn.CELU(0.5),
)
KINKED = (
    nn.ReLU,
    nn.LeakyReLU,
    lambda: nn.LeakyReLU(0.2),
    nn.ReLU6,
    nn.Hardtanh,
    nn.SELU,
    lambda: nn.ELU(0.5),
    lambda: nn.PReLU(init=0.3),
)


class Function(nn.Module):
    """A function of one variable as a module."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


FUNCTIONS = (
    torch.sin,
    torch.cos,
    torch.atan,
    torch.erf,
    lambda x: torch.exp(-x * x),
    lambda x: torch.exp(0.3 * x),
    lambda x: torch.sinh(0.3 * x),
    lambda x: torch.log(1 + x * x),
    lambda x: torch.sqrt(1 + x**2) - 1,
    lambda x: x / torch.sqrt(1 + x.square()),
    lambda x: x * torch.sigmoid(1.7 * x),
    lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    lambda x: 1 / (1 + torch.exp(-x)),
    lambda x: 2 * torch.rsqrt(1 + x * x) + torch.reciprocal(2 + torch.tanh(x)),
    lambda x: 0.1 * x**3 - 0.2 * x**2 + x,
    lambda x: torch.log1p(torch.exp(-x.abs())) + torch.relu(x),
)


class Residual(nn.Module):
    """x + h · body(x)."""

    def __init__(self, body, h):
        super().__init__()
        self.body, self.h = body, h

    def forward(self, x):
        return x + self.h * self.body(x)


class Dense(nn.Module):
    """Concatenation of x and body(x)."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return torch.cat([self.body(x), x], dim=-1)


class Sum(nn.Module):
    """Sum, difference or product of two branches."""

    def __init__(self, left, right, join):
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x):
        return self.join(self.left(x), self.right(x))


class Scale(nn.Module):
    """Elementwise affine scaling by buffers."""

    def __init__(self, width, divide):
        super().__init__()
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("scale", torch.rand(width) + 0.5)
        self.divide = divide

    def forward(self, x):
        return (x - self.mean) / self.scale if self.divide else x * self.scale + self.mean


class InPlace(nn.Module):
    """x + body(x) with the sum, a column and an activation changed in place."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        out = self.body(x).clone()
        out += x
        out[:, 0] *= 0.5
        return torch.nn.functional.silu(out.mul_(0.7), inplace=True)


class Ensemble(nn.Module):
    """The mean of several modules, stacked before the rows."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


class RowsLast(nn.Module):
    """(W xᵀ)ᵀ, or a batch of such products."""

    def __init__(self, p, q, members):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(members, p, q) / p**0.5)

    def forward(self, x):
        if len(self.weight) == 1:
            return torch.tanh(self.weight[0].T @ x.T).T
        return torch.tanh(torch.einsum("bi,kih->kbh", x, self.weight)).sum(0)


class Bilinear(nn.Module):
    """A product of features of two branches."""

    def __init__(self, p, q):
        super().__init__()
        self.left, self.product = nn.Linear(p, 2), nn.Bilinear(2, p, q)

    def forward(self, x):
        return self.product(torch.tanh(self.left(x)), x)


class Masked(nn.Module):
    """A choice of two functions by a constant mask, and features by their numbers."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mask", torch.rand(width) < 0.5)
        self.order = torch.randperm(width).tolist()

    def forward(self, x):
        return torch.where(self.mask, torch.sin(x), x)[..., self.order].masked_fill(self.mask, 0.25)


class OtherNames(nn.Module):
    """Operations by their other names."""

    def forward(self, x):
        y = torch.subtract(torch.multiply(x, 0.5), torch.negative(torch.true_divide(x, 3.0)))
        return torch.lerp(y, torch.special.expit(x), 0.3).view_as(x) + torch.addcmul(x, x, y) * torch.ones_like(x)


class Reshaped(nn.Module):
    """A linear map of the halves of x, as another shape."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width // 2, width // 2)

    def forward(self, x):
        halves = x.reshape(x.shape[0], 2, -1)
        return torch.tanh(self.linear(halves).flip(1).transpose(1, 2).flatten(1))


#: Linear layers whose weights are computed from others.
WEIGHTS = (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm)


def activation(draw, kinds=SMOOTH):
    return Function(draw.choice(FUNCTIONS)) if kinds is SMOOTH and draw.random() < 0.4 else draw.choice(kinds)()


def forms(draw, p, q, kinds):
    """Return modules that not every exporter writes in operators that can be read, with their numbers of outputs."""
    return [
        lambda: (nn.Sequential(nn.Linear(p, 3), nn.LayerNorm(3, eps=0.1)), 3),
        lambda: (Bilinear(p, q), q),
        lambda: (Masked(p), p),
        lambda: (OtherNames(), p),
        lambda: (RowsLast(p, q, draw.choice((1, 2))), q),
        lambda: (InPlace(nn.Sequential(nn.Linear(p, 3), nn.Tanh(), nn.Linear(3, p))), p),
        lambda: (Ensemble([nn.Sequential(nn.Linear(p, q), activation(draw, kinds)) for _ in range(3)]), q),
        lambda: (nn.Sequential(draw.choice(WEIGHTS)(nn.Linear(p, q)), nn.Tanh()), q),
    ]


def block(draw, p, kinds=SMOOTH, nesting=1):
    """Return a module with p inputs, and its number of outputs."""
    q = draw.choice((1, 2, 3, 5))
    plain = nn.Sequential(nn.Linear(p, q, bias=draw.random() < 0.8), activation(draw, kinds))
    choices = [lambda: (plain, q)] * 3 + [
        lambda: (nn.Sequential(nn.BatchNorm1d(p), plain, nn.Dropout(0.3)), q),
        lambda: (Scale(p, draw.random() < 0.5), p),
        lambda: (Sum(plain, nn.Linear(p, q), draw.choice((torch.add, torch.sub, torch.mul))), q),
    ]
    if kinds is SMOOTH or kinds is KINKED:
        choices += forms(draw, p, q, kinds)
    if p % 2 == 0:
        choices.append(lambda: (Reshaped(p), p))
    if nesting:
        inner, width = block(draw, p, kinds, nesting - 1)
        choices += [
            lambda: (Dense(inner), width + p),
            lambda: (Residual(nn.Sequential(inner, nn.Linear(width, p)), draw.choice((1.0, 0.5, -0.25))), p),
        ]
    return draw.choice(choices)()


def module(seed, kinds=SMOOTH):
    """Return a module in float64 and evaluation mode, and its number of inputs."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    d = draw.choice((1, 2, 3, 4))
    parts, width = [], d
    for _ in range(draw.choice((1, 2, 3))):
        part, width = block(draw, width, kinds)
        parts.append(part)
    if draw.random() < 0.8:
        parts.append(nn.Linear(width, draw.choice((1, 2))))
    made = nn.Sequential(*parts).double().eval()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return made, d
