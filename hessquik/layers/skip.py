"""A layer with a skip connection; residual, dense and input-convex blocks of other libraries are imported as it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hessquik.activations import hessQuikActivationFunction, identityActivation
from hessquik.errors import ShapeError
from hessquik.layers.base import hessQuikLayer, uniform_
from hessquik.layers.form import Form

__all__ = ["skipLayer"]


class skipLayer(hessQuikLayer):
    """The layer y = uS + σ(uK + b)M + μ, after which the last c features of u may be passed on unchanged.

    Its gradient is ∇y = ∇u (S + K diag(σ'(uK + b)) M). The output features are [y v] with u = [· v].

    Args:
        in_features: Width p of u.
        hidden_features: Number w of hidden units.
        out_features: Width q of y.
        act: σ; the identity if not given.
        bias: Whether there is a b.
        skip: S: ``"matrix"`` has one; ``"identity"`` is 1 on the p − c features that are not carried; ``None`` is 0.
        mix: Whether there is an M; without it M = 1 and q = w.
        offset: Whether there is a μ.
        carried: Number c of features that are passed on after y.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Attributes:
        K: Weights (p, w).
        b: Bias (w,).
        S: Weights of the skip (p, q).
        M: Weights out (w, q).
        mu: μ (q,).

    Raises:
        ShapeError: the widths do not fit each other.

    Examples:
        >>> import torch
        >>> f = skipLayer(4, 7, 5, carried=2)
        >>> fx, dfdx, d2fd2x = f(torch.randn(10, 4), do_gradient=True, do_Hessian=True)
        >>> print(fx.shape, dfdx.shape, d2fd2x.shape)
        torch.Size([10, 7]) torch.Size([10, 4, 7]) torch.Size([10, 4, 4, 7])
    """

    parameter_names = (
        "in_features",
        "hidden_features",
        "out_features",
        "act",
        "bias",
        "skip",
        "mix",
        "offset",
        "carried",
    )

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        act: hessQuikActivationFunction | None = None,
        bias: bool = True,
        skip: str | None = "matrix",
        mix: bool = True,
        offset: bool = True,
        carried: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the weights, uniformly distributed within ±1/√(number of their inputs)."""
        super().__init__()
        if carried > in_features:
            raise ShapeError(f"carried must be at most the {in_features} features that come in, got {carried}")
        if skip == "identity" and out_features != in_features - carried:
            raise ShapeError(
                f"out_features must be the {in_features - carried} features that are not carried where the skip is "
                f"the identity, got {out_features}"
            )
        if not mix and out_features != hidden_features:
            raise ShapeError(f"out_features must be hidden_features without mix, got {out_features}")
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.act = identityActivation() if act is None else act
        self.bias, self.skip, self.mix, self.offset, self.carried = bias, skip, mix, offset, carried

        def weights(is_there: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)) if is_there else None

        self.K = nn.Parameter(torch.empty(in_features, hidden_features, device=device, dtype=dtype))
        self.b = weights(bias, hidden_features)
        self.S = weights(skip == "matrix", in_features, out_features)
        self.M = weights(mix, hidden_features, out_features)
        self.mu = weights(offset, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights with new random numbers."""
        for weights, fan_in in (
            (self.K, self.in_features),
            (self.b, self.in_features),
            (self.S, self.in_features),
            (self.M, self.hidden_features),
            (self.mu, self.hidden_features),
        ):
            uniform_(weights, fan_in)

    def input_widths(self) -> tuple[int, ...]:
        """Return (p − c, c), without a part of no width."""
        return tuple(width for width in (self.in_features - self.carried, self.carried) if width)

    def output_widths(self) -> tuple[int, ...]:
        """Return (q, c), or (q,) if nothing is carried."""
        return (self.out_features, self.carried) if self.carried else (self.out_features,)

    def form(self) -> Form:
        """Return the form with P = K, S, Q = M, with the carried features as a part of their own."""
        widths = self.input_widths()

        def parts(matrix: Tensor) -> tuple[Tensor, ...]:
            return (matrix,) if len(widths) == 1 else torch.split(matrix, list(widths))

        identity = (1.0, *(None for _ in widths[1:])) if self.carried < self.in_features else (None,)
        return Form(
            self.act,
            widths,
            into=parts(self.K),
            bias=self.b,
            skip=() if self.skip is None else identity if self.S is None else parts(self.S),
            out=1.0 if self.M is None else self.M,
            offset=self.mu,
            carries=self.carried > 0,
        )
