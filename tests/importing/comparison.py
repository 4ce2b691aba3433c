"""References for imported networks: the source's values, and their derivatives by autograd."""

import torch

from hessquik import Evaluator

#: Of values and first and second derivatives in float64, relative to the largest of 1 and what is expected.
TOLERANCE = 1e-10


def derivatives(f, x):
    """Return value (n, m), gradient (n, d, m) and Hessian (n, d, d, m) of a function of torch tensors."""
    x = x.clone().requires_grad_()
    value = f(x).reshape(len(x), -1)
    gradients, hessians = [], []
    for j in range(value.shape[1]):
        gradient = _gradient(value[:, j].sum(), x)
        gradients.append(gradient)
        hessians.append(torch.stack([_gradient(gradient[:, a].sum(), x) for a in range(x.shape[1])], dim=1))
    return tuple(part.detach() for part in (value, torch.stack(gradients, -1), torch.stack(hessians, -1)))


def _gradient(total, x):
    if not total.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(total, x, create_graph=True, allow_unused=True, materialize_grads=True)[0]


def error(got, expected):
    """Return the largest difference, relative to 1 or to the largest expected entry."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def worst_error(network, f, x, backend=None):
    """Return the largest error of value, gradient and Hessian, by the layers or by a backend of the Evaluator."""
    expected = derivatives(f, x)
    if backend is None:
        got = network(x, do_gradient=True, do_Hessian=True)
    else:
        found = Evaluator(network, backend=backend)(x, ("value", "gradient", "hessian"))
        got = found.value, found.gradient, found.hessian
    return max(error(part.detach(), right) for part, right in zip(got, expected, strict=True))
