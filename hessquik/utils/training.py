"""Fitting a network to values, gradients and Hessians."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessquik.errors import ShapeError

__all__ = ["print_headers", "test", "train_one_epoch"]

Weights = Sequence[float]


def train_one_epoch(
    f: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    batch_size: int = 5,
    do_gradient: bool = False,
    do_Hessian: bool = False,
    loss_weights: Weights = (1.0, 1.0, 1.0),
) -> tuple[float, ...]:
    """Go through all samples once, in random order and in batches, and step the optimizer after each batch.

    The loss of N samples is
        L = (w₀‖f(x) − y₀‖² + w₁‖∇f(x) − y₁‖² + w₂‖∇²f(x) − y₂‖²) / (2N)

    Args:
        f: The network, d inputs and m outputs.
        x: Points (N, d).
        y: Targets (N, m + dm + d²m): the columns y₀, y₁, y₂ side by side, each a value, gradient or Hessian flattened
            from axis 1. Columns of derivatives that are not fitted may be left out at the end.
        optimizer: Holds the network's parameters.
        batch_size: Samples of a batch; the last one may have fewer.
        do_gradient: Whether the gradient is fitted.
        do_Hessian: Whether the Hessian is fitted.
        loss_weights: (w₀, w₁, w₂).

    Returns:
        L and its unweighted parts for the value and, if fitted, the gradient and the Hessian. These are averages over
        the epoch, in which each batch is evaluated before its optimizer step.

    Raises:
        ShapeError: ``y`` has too few columns.

    Examples:
        >>> import torch
        >>> from hessquik.networks import fullyConnectedNN
        >>> from hessquik.utils import peaks
        >>> x = torch.rand(12, 2)
        >>> y = torch.cat([part.flatten(1) for part in peaks(x, do_gradient=True, do_Hessian=True)], dim=1)
        >>> f = fullyConnectedNN([2, 8, 1])
        >>> losses = train_one_epoch(f, x, y, torch.optim.Adam(f.parameters()), do_gradient=True, do_Hessian=True)
        >>> len(losses)
        4
    """
    f.train()
    n = x.shape[0]
    sums: list[float] = []
    for rows in torch.randperm(n).to(x.device).split(batch_size):
        optimizer.zero_grad()
        losses = _losses(f, x[rows], y[rows], do_gradient, do_Hessian, loss_weights)
        losses[0].backward()
        optimizer.step()
        found = [len(rows) * loss.item() for loss in losses]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    return tuple(total / n for total in sums)


def test(
    f: nn.Module,
    x: Tensor,
    y: Tensor,
    do_gradient: bool = False,
    do_Hessian: bool = False,
    loss_weights: Weights = (1.0, 1.0, 1.0),
) -> tuple[float, ...]:
    """Compute the loss and its parts as :func:`train_one_epoch` does, without training.

    Examples:
        >>> import torch
        >>> from hessquik.networks import fullyConnectedNN
        >>> len(test(fullyConnectedNN([2, 8, 1]), torch.zeros(3, 2), torch.zeros(3, 3), do_gradient=True))
        3
    """
    f.eval()
    with torch.no_grad():
        return tuple(loss.item() for loss in _losses(f, x, y, do_gradient, do_Hessian, loss_weights))


# So that pytest leaves it alone where users import it.
test.__test__ = False  # type: ignore[attr-defined]


def print_headers(
    do_gradient: bool = True,
    do_Hessian: bool = False,
    verbose: bool = False,
    loss_weights: Weights = (1.0, 1.0, 1.0),
) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return the header of a table of losses and the format of its rows.

    Args:
        do_gradient: Whether there are columns for the gradient's loss.
        do_Hessian: Whether there are columns for the Hessian's loss.
        verbose: Whether to print the header, too.
        loss_weights: Shown above their columns.

    Returns:
        The two rows of names and the format of a row: epoch, seconds, and three times ``"|"`` with the losses of
        :func:`train_one_epoch` (running) and :func:`test` (of training and validation data).

    Examples:
        >>> _, names, row = print_headers(do_gradient=False)
        >>> names
        ('epoch', 'time', '|', 'loss', 'loss_f', '|', 'loss', 'loss_f', '|', 'loss', 'loss_f')
        >>> print(row.format(1, 0.5, "|", 2.0, 2.0, "|", 1.5, 1.5, "|", 1.0, 1.0)[:50])
        1              0.5000         | 2.0000e+00     2.0
    """
    parts = (("loss_f", True), ("loss_df", do_gradient), ("loss_d2f", do_Hessian))
    losses = ["loss", *(name for name, is_shown in parts if is_shown)]
    weights = [f"{weight:.2e}" for weight, (_, is_shown) in zip(loss_weights, parts, strict=True) if is_shown]
    empty = ("",) * len(weights)
    headers = ("", "", *(cell for title in ("running", "train", "valid") for cell in ("|", title, *empty)))
    printouts = ("epoch", "time", *3 * ("|", *losses))
    row = "{:<15d}{:<15.4f}" + 3 * ("{:<2s}" + len(losses) * "{:<15.4e}")
    if verbose:
        words = "{:<15s}{:<15s}" + 3 * ("{:<2s}" + len(losses) * "{:<15s}")
        print(words.format(*headers))
        print(words.format("", "", *(cell for title in ("weights", "", "") for cell in ("|", title, *weights))))
        print(words.format(*printouts))
    return headers, printouts, row


def _losses(
    f: nn.Module, x: Tensor, y: Tensor, do_gradient: bool, do_Hessian: bool, loss_weights: Weights
) -> list[Tensor]:
    """Return the loss and its parts."""
    found: tuple[Tensor | None, ...] = f(x, do_gradient=do_gradient, do_Hessian=do_Hessian)
    assert found[0] is not None
    (n, d), m = x.shape, found[0].shape[1]
    loss, parts, start = x.new_zeros(()), [], 0
    for got, weight, width in zip(found, loss_weights, (m, d * m, d * d * m), strict=True):
        target = y[:, start : start + width]
        start += width
        if got is None:
            continue
        if target.shape[1] != width:
            raise ShapeError(f"targets must have at least {start} columns, got {y.shape[1]}")
        parts.append((0.5 / n) * (got - target.reshape(got.shape)).square().sum())
        loss = loss + weight * parts[-1]
    return [loss, *parts]
