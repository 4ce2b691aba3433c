"""Pointwise nonlinearities σ with σ' and σ'' in closed form.

An activation holds parameters (softplus' β) and never a batch: :meth:`jet` is a pure function, so one
object may serve many layers and many threads. Only the documented two-step use, ``forward(x,
forward_mode=None)`` followed by ``backward()``, stores state on the object, and nothing else in the
engine relies on it.

To add one: a small final class with :meth:`evaluate` and :meth:`compute_derivatives`, and a row in
:data:`ACTIVATIONS`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import hessquik.original
from hessquik.errors import OrderError
from hessquik.expressions import Formula, differentiate, fault

__all__ = [
    "ACTIVATIONS",
    "antiTanhActivation",
    "arctanActivation",
    "eluActivation",
    "expActivation",
    "expressionActivation",
    "gaussianActivation",
    "geluActivation",
    "geluTanhActivation",
    "hessQuikActivationFunction",
    "identityActivation",
    "kinks",
    "mishActivation",
    "quadraticActivation",
    "reluActivation",
    "sigmoidActivation",
    "siluActivation",
    "sinActivation",
    "softplusActivation",
    "softsignActivation",
    "tanhActivation",
]

Jet = tuple[Tensor, Tensor | None, Tensor | None]

#: |x| beyond which exp(−x²/2) is 0 in both dtypes; x is clamped to it so that x² exp(−x²/2) is 0 too, never ∞ · 0.
_TAIL = 40.0


class hessQuikActivationFunction(nn.Module):
    """Base class of all activations: σ, σ' and σ'' of a tensor of any shape, entry by entry.

    A subclass defines :meth:`evaluate` and :meth:`compute_derivatives`; the other methods are defined here. One
    written for the original, which defines :meth:`forward` and :meth:`compute_derivatives`, works too.

    Examples:
        >>> import torch
        >>> class cubicActivation(hessQuikActivationFunction):
        ...     def evaluate(self, x):
        ...         return x**3, (x,)
        ...
        ...     def compute_derivatives(self, x, do_Hessian=False):
        ...         return 3 * x**2, 6 * x if do_Hessian else None
        >>> cubicActivation()(torch.tensor(2.0), do_gradient=True, do_Hessian=True)
        (tensor(8.), tensor(12.), tensor(12.))
    """

    #: Constructor arguments, by name: what a saved file needs to build the object again.
    parameter_names: tuple[str, ...] = ()

    @property
    def continuous_derivatives(self) -> float:
        """Number of continuous derivatives that σ has; 2 are enough for a Hessian without jumps."""
        return math.inf

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) and the tensors that :meth:`compute_derivatives` needs, all shaped like ``x``."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluate(x) and compute_derivatives(*args)")

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and, with ``do_Hessian``, σ'' (else ``None``).

        Args:
            args: The tensors that :meth:`evaluate` returned with the value.
            do_Hessian: Whether σ'' is wanted.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_derivatives(*args, do_Hessian)")

    def jet(self, x: Tensor, order: int) -> Jet:
        """Return (σ, σ', σ'') at ``x`` up to ``order`` (0, 1 or 2); those above are ``None``.

        Examples:
            >>> import torch
            >>> tanhActivation().jet(torch.zeros(1), 2)
            (tensor([0.]), tensor([1.]), tensor([-0.]))
        """
        if type(self).evaluate is hessQuikActivationFunction.evaluate:  # a subclass with a forward of its own
            jet: Jet = self.forward(x, do_gradient=order > 0, do_Hessian=order > 1, forward_mode=True)
            return jet
        sigma, args = self.evaluate(x)
        if order == 0:
            return sigma, None, None
        return sigma, *self.compute_derivatives(*args, do_Hessian=order > 1)

    def forward(
        self,
        x: Tensor,
        do_gradient: bool = False,
        do_Hessian: bool = False,
        forward_mode: bool | None = True,
    ) -> Jet:
        """Apply σ to every entry of ``x``.

        Args:
            x: Any shape.
            do_gradient: Whether σ' is wanted.
            do_Hessian: Whether σ'' is wanted.
            forward_mode: ``None`` keeps what :meth:`backward` needs and computes no derivatives yet.

        Returns:
            (σ(x), σ'(x) or ``None``, σ''(x) or ``None``), each shaped like ``x``.

        Examples:
            >>> import torch
            >>> sigma, dsigma, d2sigma = tanhActivation()(torch.randn(10, 4), do_Hessian=True)
            >>> sigma.shape, dsigma, d2sigma.shape
            (torch.Size([10, 4]), None, torch.Size([10, 4]))
        """
        sigma, args = self.evaluate(x)
        if forward_mode is None:
            self.ctx = args
            return sigma, None, None
        if not (do_gradient or do_Hessian):
            return sigma, None, None
        dsigma, d2sigma = self.compute_derivatives(*args, do_Hessian=do_Hessian)
        return sigma, dsigma if do_gradient else None, d2sigma

    def backward(self, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and, with ``do_Hessian``, σ'' at the ``x`` of the last ``forward(x, forward_mode=None)``.

        It may be called repeatedly; copies and pickles of the object do not contain that ``x``.

        Raises:
            OrderError: there was no such forward call.
        """
        args: tuple[Tensor, ...] | None = self.__dict__.get("ctx")
        if args is None:
            raise OrderError(f"{type(self).__name__}.backward() needs a forward(x, forward_mode=None) before it")
        return self.compute_derivatives(*args, do_Hessian=do_Hessian)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what :meth:`backward` needs."""
        return {name: value for name, value in vars(self).items() if name != "ctx"}

    def extra_repr(self) -> str:
        """Show the constructor arguments."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.parameter_names)


class antiTanhActivation(hessQuikActivationFunction):
    """Antiderivative of tanh: σ(x) = ln(2 cosh x) = |x| + log(1 + exp(−2|x|)), σ' = tanh x, σ'' = 1 − tanh² x.

    The constant makes σ(0) = ln 2, as the weights of networks trained with the original expect.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in antiTanhActivation().jet(torch.tensor(1.0), 2)]
        [1.1269, 0.7616, 0.42]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), computed from |x| so that it does not overflow, and x."""
        magnitude = x.abs()
        return magnitude + torch.log1p(torch.exp(-2 * magnitude)), (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from x."""
        t = torch.tanh(args[0])
        return t, 1 - t * t if do_Hessian else None


class arctanActivation(hessQuikActivationFunction):
    """σ(x) = arctan x, σ' = 1 / (1 + x²), σ'' = −2xσ'².

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in arctanActivation().jet(torch.tensor(1.0), 2)]
        [0.7854, 0.5, -0.5]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), and x."""
        return torch.atan(x), (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ''; in σ'' the product xσ' is computed first, since it does not underflow."""
        (x,) = args
        dsigma = 1 / (1 + x * x)
        return dsigma, -2 * (x * dsigma) * dsigma if do_Hessian else None


class eluActivation(hessQuikActivationFunction):
    """Exponential linear unit: σ(x) = x for x > 0, α(exp x − 1) else.

    σ' = 1 and σ'' = 0 for x > 0, both α exp x else: σ'' jumps at 0, and so does σ' unless α = 1. Source: Clevert,
    Unterthiner & Hochreiter 2015 (arXiv:1511.07289).

    Args:
        alpha: α.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in eluActivation().jet(torch.tensor(-1.0), 2)]
        [-0.6321, 0.3679, 0.3679]
    """

    parameter_names = ("alpha",)

    def __init__(self, alpha: float = 1.0) -> None:
        """Keep α."""
        super().__init__()
        self.alpha = alpha

    @property
    def continuous_derivatives(self) -> float:
        """1 if α = 1, else 0."""
        return 1 if self.alpha == 1 else 0

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), computed so that the exponential does not overflow, and x."""
        return torch.where(x > 0, x, self.alpha * torch.expm1(x.clamp(max=0.0))), (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from x."""
        (x,) = args
        slope = self.alpha * torch.exp(x.clamp(max=0.0))
        dsigma = torch.where(x > 0, 1.0, slope)
        return dsigma, torch.where(x > 0, 0.0, slope) if do_Hessian else None


class expActivation(hessQuikActivationFunction):
    """σ(x) = σ' = σ'' = exp x, which is ∞ beyond 88 in float32 and beyond 709 in float64.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in expActivation().jet(torch.tensor(1.0), 2)]
        [2.7183, 2.7183, 2.7183]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), which is also its own derivative."""
        sigma = torch.exp(x)
        return sigma, (sigma,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ for both derivatives."""
        return args[0], args[0] if do_Hessian else None


class expressionActivation(hessQuikActivationFunction):
    """σ given by a formula of :mod:`hessquik.expressions`, with σ' and σ'' by the chain rule.

    Args:
        formula: ``"z"``, a number, or a list that begins with an operation; that of SiLU if not given.

    Raises:
        ValueError: it is no formula.

    Examples:
        >>> import torch
        >>> act = expressionActivation(["mul", "z", ["sin", "z"]])
        >>> [round(part.item(), 4) for part in act.jet(torch.tensor(1.0), 2)]
        [0.8415, 1.3818, 0.2391]
    """

    parameter_names = ("formula",)

    def __init__(self, formula: Formula = ("mul", "z", ("sigmoid", "z"))) -> None:
        """Check the formula and keep it."""
        super().__init__()
        if wrong := fault(formula):
            raise ValueError(wrong)
        self.formula = formula

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), and x."""
        return _as_tensor(differentiate(self.formula, x)[0], x), (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from x."""
        (x,) = args
        _, dsigma, d2sigma = differentiate(self.formula, x)
        return _as_tensor(dsigma, x), _as_tensor(d2sigma, x) if do_Hessian else None


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a number as a tensor shaped like another, and a tensor unchanged."""
    return value * torch.ones_like(like) if isinstance(value, float) else value


class gaussianActivation(hessQuikActivationFunction):
    """σ(x) = exp(−x²), σ' = −2xσ, σ'' = (4x² − 2)σ.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in gaussianActivation().jet(torch.tensor(1.0), 2)]
        [0.3679, -0.7358, 0.7358]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), and x clamped to where σ may be nonzero, and σ."""
        held = x.clamp(-_TAIL, _TAIL)
        sigma = torch.exp(-held * held)
        return sigma, (held, sigma)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from the clamped x and σ."""
        x, sigma = args
        return -2 * x * sigma, (4 * x * x - 2) * sigma if do_Hessian else None


class geluActivation(hessQuikActivationFunction):
    """Gaussian error linear unit: σ(x) = xΦ(x), σ' = Φ + xφ, σ'' = (2 − x²)φ.

    Φ is the distribution function of the standard normal distribution and φ(x) = exp(−x²/2) / √(2π) its density.
    Source: Hendrycks & Gimpel 2016 (arXiv:1606.08415), the exact form.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in geluActivation().jet(torch.tensor(1.0), 2)]
        [0.8413, 1.0833, 0.242]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) by torch's Φ, which is accurate in both tails, and x and Φ."""
        probability = torch.special.ndtr(x)
        return x * probability, (x, probability)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from Φ and x, which is clamped to where φ may be nonzero."""
        x, probability = args[0].clamp(-_TAIL, _TAIL), args[1]
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return probability + x * density, (2 - x * x) * density if do_Hessian else None


class geluTanhActivation(hessQuikActivationFunction):
    """GELU by a hyperbolic tangent: σ(x) = xs with s = (1 + tanh(v/2)) / 2 = 1 / (1 + exp(−v)).

    With v = 2√(2/π) (x + 0.044715 x³), c = 1 − s and s' = scv': σ' = s + xs', σ'' = 2s' + x sc((c − s)v'² + v'').
    Source: Hendrycks & Gimpel 2016 (arXiv:1606.08415), the approximation; torch's ``GELU(approximate="tanh")``.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in geluTanhActivation().jet(torch.tensor(1.0), 2)]
        [0.8412, 1.083, 0.2421]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) = xs, x clamped to where s may differ from 0 and 1, and v."""
        held = x.clamp(-_TAIL, _TAIL)
        v = math.sqrt(8 / math.pi) * (held + 0.044715 * (held * held * held))
        return x * torch.sigmoid(v), (held, v)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ''; c is computed from −v, since 1 − s would cancel."""
        x, v = args
        s, c = torch.sigmoid(v), torch.sigmoid(-v)
        dv = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * (x * x))
        ds = s * c * dv
        if not do_Hessian:
            return s + x * ds, None
        d2v = math.sqrt(8 / math.pi) * 6 * 0.044715 * x
        return s + x * ds, 2 * ds + x * (s * c * ((c - s) * (dv * dv) + d2v))


class identityActivation(hessQuikActivationFunction):
    """σ(x) = x, σ' = 1, σ'' = 0.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in identityActivation().jet(torch.tensor(1.0), 2)]
        [1.0, 1.0, 0.0]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) = x, and x."""
        return x, (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return ones and zeros."""
        return torch.ones_like(args[0]), torch.zeros_like(args[0]) if do_Hessian else None


class mishActivation(hessQuikActivationFunction):
    """σ(x) = xt with t = tanh(log(1 + exp x)).

    With s = 1 / (1 + exp(−x)) and c = 1 − s: t = s(1 + c) / (1 + c²), t' = 4c²s / (1 + c²)², σ' = t + xt',
    σ'' = 2t' + xt'(c − 2ts). Source: Misra 2019 (arXiv:1908.08681).

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in mishActivation().jet(torch.tensor(1.0), 2)]
        [0.8651, 1.049, 0.1847]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) = xt, and x, s, c, t; c is computed from −x, since 1 − s would cancel."""
        s, c = torch.sigmoid(x), torch.sigmoid(-x)
        t = s * (1 + c) / (1 + c * c)
        return x * t, (x, s, c, t)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from x, s, c and t."""
        x, s, c, t = args
        root = 2 * c / (1 + c * c)
        dt = root * root * s
        return t + x * dt, 2 * dt + x * (dt * (c - 2 * t * s)) if do_Hessian else None


class quadraticActivation(hessQuikActivationFunction):
    """σ(x) = x²/2, σ' = x, σ'' = 1.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in quadraticActivation().jet(torch.tensor(1.0), 2)]
        [0.5, 1.0, 1.0]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), and x."""
        return 0.5 * x * x, (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' = x and σ'' = 1."""
        return args[0], torch.ones_like(args[0]) if do_Hessian else None


class reluActivation(hessQuikActivationFunction):
    """Rectified linear unit: σ(x) = x for x > 0, λx else, with σ'' = 0 and a kink at 0, where σ' is λ here.

    λ = 0 is ReLU, another λ LeakyReLU. A network of these is linear in pieces: its second derivatives are 0 almost
    everywhere.

    Args:
        negative_slope: λ.

    Examples:
        >>> import torch
        >>> [part.item() for part in reluActivation(0.25).jet(torch.tensor(-1.0), 2)]
        [-0.25, 0.25, 0.0]
    """

    parameter_names = ("negative_slope",)

    def __init__(self, negative_slope: float = 0.0) -> None:
        """Keep λ."""
        super().__init__()
        self.negative_slope = negative_slope

    @property
    def continuous_derivatives(self) -> float:
        """0: σ' jumps at 0."""
        return 0

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), without computing 0 · ∞, and x."""
        sigma = torch.where(x > 0, x, self.negative_slope * x) if self.negative_slope else x.clamp(min=0.0)
        return sigma, (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ', which depends on the sign of x, and zeros."""
        x = args[0]
        slope = torch.where(x <= 0, self.negative_slope, x)  # NaN stays NaN
        return torch.where(x > 0, 1.0, slope), torch.zeros_like(x) if do_Hessian else None


class sigmoidActivation(hessQuikActivationFunction):
    """σ(x) = 1 / (1 + exp(−x)), σ' = σ(1 − σ), σ'' = σ'(1 − 2σ).

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in sigmoidActivation().jet(torch.tensor(1.0), 2)]
        [0.7311, 0.1966, -0.0909]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), which is also all that the derivatives are computed from."""
        sigma = torch.sigmoid(x)
        return sigma, (sigma,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from σ."""
        (sigma,) = args
        dsigma = sigma * (1 - sigma)
        return dsigma, dsigma * (1 - 2 * sigma) if do_Hessian else None


class siluActivation(hessQuikActivationFunction):
    """Sigmoid linear unit, also called swish: σ(x) = xs with s = 1 / (1 + exp(−x)).

    With c = 1 − s: σ' = s(1 + xc), σ'' = sc(2 + x(c − s)). Source: Elfwing, Uchibe & Doya 2017 (arXiv:1702.03118).

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in siluActivation().jet(torch.tensor(1.0), 2)]
        [0.7311, 0.9277, 0.3024]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) = xs, and x and s."""
        s = torch.sigmoid(x)
        return x * s, (x, s)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ''; c is computed as s(−x), since 1 − s would cancel."""
        x, s = args
        c = torch.sigmoid(-x)
        return s * (1 + x * c), s * c * (2 + x * (c - s)) if do_Hessian else None


class sinActivation(hessQuikActivationFunction):
    """σ(x) = sin x, σ' = cos x, σ'' = −sin x.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in sinActivation().jet(torch.tensor(1.0), 2)]
        [0.8415, 0.5403, -0.8415]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), which is also −σ'', and x and σ."""
        sigma = torch.sin(x)
        return sigma, (x, sigma)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ', computed from x, and σ'', computed from σ."""
        x, sigma = args
        return torch.cos(x), -sigma if do_Hessian else None


class softplusActivation(hessQuikActivationFunction):
    """σ(x) = log(1 + exp(βx)) / β, and x itself where βx > threshold.

    With s = 1 / (1 + exp(−βx)): σ' = s, σ'' = β s(1 − s); beyond the threshold 1 and 0.
    NaN stays NaN in all three.

    Args:
        beta: Steepness β > 0.
        threshold: βx above which σ is the identity.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in softplusActivation().jet(torch.tensor(1.0), 2)]
        [1.3133, 0.7311, 0.1966]
    """

    parameter_names = ("beta", "threshold")

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        """Keep β and the threshold."""
        super().__init__()
        self.beta = beta
        self.threshold = threshold

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) by torch's function, with its threshold, and x."""
        return nn.functional.softplus(x, self.beta, self.threshold), (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from x."""
        scaled = self.beta * args[0]
        is_identity = scaled > self.threshold
        s = torch.sigmoid(scaled)
        dsigma = s.masked_fill(is_identity, 1.0)
        return dsigma, self.beta * dsigma * (1 - dsigma) if do_Hessian else None


class softsignActivation(hessQuikActivationFunction):
    """σ(x) = x / (1 + |x|), σ' = 1 / (1 + |x|)², σ'' = ∓2 / (1 + |x|)³, which jumps at 0 and is 0 there.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in softsignActivation().jet(torch.tensor(1.0), 2)]
        [0.5, 0.25, -0.25]
    """

    @property
    def continuous_derivatives(self) -> float:
        """1: σ' is continuous, σ'' is not."""
        return 1

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) = xr with r = 1 / (1 + |x|), and x and r."""
        r = 1 / (1 + x.abs())
        return x * r, (x, r)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from r and the sign of x."""
        x, r = args
        sign = torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, 0.0 * x))
        return r * r, -2 * sign * (r * r * r) if do_Hessian else None


class tanhActivation(hessQuikActivationFunction):
    """σ(x) = tanh x, σ' = 1 − σ², σ'' = −2σσ'.

    Examples:
        >>> import torch
        >>> [round(part.item(), 4) for part in tanhActivation().jet(torch.tensor(1.0), 2)]
        [0.7616, 0.42, -0.6397]
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x), which is also all that the derivatives are computed from."""
        sigma = torch.tanh(x)
        return sigma, (sigma,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and σ'', computed from σ."""
        (sigma,) = args
        dsigma = 1 - sigma * sigma
        return dsigma, -2 * sigma * dsigma if do_Hessian else None


#: Every activation under the name that files and descriptions use.
ACTIVATIONS: dict[str, type[hessQuikActivationFunction]] = {
    kind.__name__: kind
    for kind in (
        antiTanhActivation,
        arctanActivation,
        eluActivation,
        expActivation,
        expressionActivation,
        gaussianActivation,
        geluActivation,
        geluTanhActivation,
        identityActivation,
        mishActivation,
        quadraticActivation,
        reluActivation,
        sigmoidActivation,
        siluActivation,
        sinActivation,
        softplusActivation,
        softsignActivation,
        tanhActivation,
    )
}

#: Descriptions of an activation without two continuous derivatives, by the number of continuous ones.
KINKS = {
    0: "the first derivative jumps where z = 0, and the second one is undefined there",
    1: "the second derivative jumps where z = 0",
}


def kinks(module: nn.Module) -> dict[str, str]:
    """Return the activations of a network without two continuous derivatives, each with the derivative that jumps.

    Examples:
        >>> from hessquik.networks import fullyConnectedNN
        >>> kinks(fullyConnectedNN([2, 4, 1], softsignActivation()))
        {'softsignActivation': 'the second derivative jumps where z = 0'}
        >>> kinks(fullyConnectedNN([2, 4, 1], tanhActivation()))
        {}
    """
    found = (part for part in module.modules() if isinstance(part, hessQuikActivationFunction))
    return {
        type(act).__name__: KINKS[int(act.continuous_derivatives)] for act in found if act.continuous_derivatives < 2
    }


hessquik.original.register(__name__)
