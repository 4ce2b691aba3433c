"""Pointwise nonlinearities σ with σ' and σ'' in closed form.

An activation holds parameters (softplus' β) and never a batch: :meth:`jet` is a pure function, so one
object may serve many layers and many threads. The documented two-step use, ``forward(x,
forward_mode=None)`` followed by ``backward()``, is the only thing that remembers anything, and nothing
else in the engine relies on it.

To add one: a small final class with :meth:`evaluate` and :meth:`compute_derivatives`, and a row in
:data:`ACTIVATIONS`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hessquik.errors import OrderError

__all__ = [
    "ACTIVATIONS",
    "antiTanhActivation",
    "hessQuikActivationFunction",
    "identityActivation",
    "quadraticActivation",
    "sigmoidActivation",
    "softplusActivation",
    "tanhActivation",
]

Jet = tuple[Tensor, Tensor | None, Tensor | None]


class hessQuikActivationFunction(nn.Module):
    """Base class of all activations: σ, σ' and σ'' of a tensor of any shape, entry by entry.

    A subclass gives :meth:`evaluate` and :meth:`compute_derivatives`; the rest is here, once.
    """

    #: σ'' = 0 everywhere, so that sums over hidden units may leave this layer out.
    is_linear = False
    #: Constructor arguments, by name: what a saved file needs to build the object again.
    parameter_names: tuple[str, ...] = ()

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return σ(x) and the tensors that :meth:`compute_derivatives` needs, all shaped like ``x``."""
        raise NotImplementedError

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and, with ``do_Hessian``, σ'' (else ``None``).

        Args:
            args: What :meth:`evaluate` returned beside the value.
            do_Hessian: Whether σ'' is wanted.
        """
        raise NotImplementedError

    def jet(self, x: Tensor, order: int) -> Jet:
        """Return (σ, σ', σ'') at ``x`` up to ``order`` (0, 1 or 2); what lies above it is ``None``.

        Example:
            >>> import torch
            >>> tanhActivation().jet(torch.zeros(1), 2)
            (tensor([0.]), tensor([1.]), tensor([-0.]))
        """
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

        Example:
            >>> import torch
            >>> sigma, dsigma, d2sigma = tanhActivation()(torch.randn(10, 4), do_Hessian=True)
            >>> sigma.shape, dsigma, d2sigma.shape
            (torch.Size([10, 4]), None, torch.Size([10, 4]))
        """
        sigma, args = self.evaluate(x)
        if forward_mode is None:
            self._args = args
            return sigma, None, None
        if not (do_gradient or do_Hessian):
            return sigma, None, None
        dsigma, d2sigma = self.compute_derivatives(*args, do_Hessian=do_Hessian)
        return sigma, dsigma if do_gradient else None, d2sigma

    def backward(self, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return σ' and, with ``do_Hessian``, σ'' at the ``x`` of the last ``forward(x, forward_mode=None)``.

        Raises:
            OrderError: there was no such forward call.
        """
        args = self.__dict__.pop("_args", None)
        if args is None:
            raise OrderError(
                f"{type(self).__name__}.backward() expects a forward(x, forward_mode=None) before it; there was none"
            )
        return self.compute_derivatives(*args, do_Hessian=do_Hessian)

    def extra_repr(self) -> str:
        """Show the constructor arguments."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.parameter_names)


class antiTanhActivation(hessQuikActivationFunction):
    """Antiderivative of tanh: σ(x) = ln(2 cosh x) = |x| + log(1 + exp(−2|x|)), σ' = tanh x, σ'' = 1 − tanh² x.

    The constant makes σ(0) = ln 2, as the weights of networks trained with the original expect.
    """

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """σ from |x|, which never overflows."""
        magnitude = x.abs()
        return magnitude + torch.log1p(torch.exp(-2 * magnitude)), (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """σ' and σ'' from x."""
        t = torch.tanh(args[0])
        return t, 1 - t * t if do_Hessian else None


class identityActivation(hessQuikActivationFunction):
    """σ(x) = x, σ' = 1, σ'' = 0."""

    is_linear = True

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """σ is x itself."""
        return x, (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """Ones and zeros."""
        return torch.ones_like(args[0]), torch.zeros_like(args[0]) if do_Hessian else None


class quadraticActivation(hessQuikActivationFunction):
    """σ(x) = x²/2, σ' = x, σ'' = 1."""

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """σ from x."""
        return 0.5 * x * x, (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """X and ones."""
        return args[0], torch.ones_like(args[0]) if do_Hessian else None


class sigmoidActivation(hessQuikActivationFunction):
    """σ(x) = 1 / (1 + exp(−x)), σ' = σ(1 − σ), σ'' = σ'(1 − 2σ)."""

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """σ, from which both derivatives follow."""
        sigma = torch.sigmoid(x)
        return sigma, (sigma,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """σ' and σ'' from σ."""
        (sigma,) = args
        dsigma = sigma * (1 - sigma)
        return dsigma, dsigma * (1 - 2 * sigma) if do_Hessian else None


class softplusActivation(hessQuikActivationFunction):
    """σ(x) = log(1 + exp(βx)) / β, and x itself where βx > threshold.

    With s = 1 / (1 + exp(−βx)): σ' = s, σ'' = β s(1 − s); beyond the threshold 1 and 0.
    NaN stays NaN in all three.

    Args:
        beta: Steepness β > 0.
        threshold: βx above which σ is the identity.
    """

    parameter_names = ("beta", "threshold")

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        """Keep β and the threshold."""
        super().__init__()
        self.beta = beta
        self.threshold = threshold

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """σ by torch, with its threshold."""
        return nn.functional.softplus(x, self.beta, self.threshold), (x,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """σ' and σ'' from x."""
        scaled = self.beta * args[0]
        is_identity = scaled > self.threshold
        s = torch.sigmoid(scaled)
        dsigma = s.masked_fill(is_identity, 1.0)
        return dsigma, self.beta * dsigma * (1 - dsigma) if do_Hessian else None


class tanhActivation(hessQuikActivationFunction):
    """σ(x) = tanh x, σ' = 1 − σ², σ'' = −2σσ'."""

    def evaluate(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """σ, from which both derivatives follow."""
        sigma = torch.tanh(x)
        return sigma, (sigma,)

    def compute_derivatives(self, *args: Tensor, do_Hessian: bool = False) -> tuple[Tensor, Tensor | None]:
        """σ' and σ'' from σ."""
        (sigma,) = args
        dsigma = 1 - sigma * sigma
        return dsigma, -2 * sigma * dsigma if do_Hessian else None


#: Every activation under the name that files and descriptions use.
ACTIVATIONS: dict[str, type[hessQuikActivationFunction]] = {
    kind.__name__: kind
    for kind in (
        antiTanhActivation,
        identityActivation,
        quadraticActivation,
        sigmoidActivation,
        softplusActivation,
        tanhActivation,
    )
}
