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


class Reshaped(nn.Module):
    """A linear map of the halves of x, as another shape."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width // 2, width // 2)

    def forward(self, x):
        halves = x.reshape(x.shape[0], 2, -1)
        return torch.tanh(self.linear(halves).flip(1).transpose(1, 2).flatten(1))


def activation(draw, kinds=SMOOTH):
    return Function(draw.choice(FUNCTIONS)) if kinds is SMOOTH and draw.random() < 0.4 else draw.choice(kinds)()


def block(draw, p, kinds=SMOOTH, nesting=1):
    """Return a module with p inputs, and its number of outputs."""
    q = draw.choice((1, 2, 3, 5))
    plain = nn.Sequential(nn.Linear(p, q, bias=draw.random() < 0.8), activation(draw, kinds))
    choices = [lambda: (plain, q)] * 3 + [
        lambda: (nn.Sequential(nn.BatchNorm1d(p), plain, nn.Dropout(0.3)), q),
        lambda: (Scale(p, draw.random() < 0.5), p),
        lambda: (Sum(plain, nn.Linear(p, q), draw.choice((torch.add, torch.sub, torch.mul))), q),
    ]
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
