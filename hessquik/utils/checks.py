"""Checks that derivatives are right, for any function that returns (value, gradient, Hessian) as networks do.

Each returns a flag per derivative; ``False`` is a failure. Use float64: in float32 rounding hides errors up to 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hessquik.activations import hessQuikActivationFunction
from hessquik.utils import taylor
from hessquik.utils.parameters import extract_data, insert_data
from hessquik.utils.taylor import convert_to_base

__all__ = [
    "directional_derivative_check",
    "directional_derivative_laplacian_check",
    "input_derivative_check",
    "input_derivative_check_finite_difference",
    "input_derivative_check_finite_difference_laplacian",
    "network_derivative_check",
]

Function = Callable[..., tuple[Any, ...]]

#: Fewest steps that a Taylor test judges by.
JUDGED_STEPS = 15


@torch.no_grad()
def input_derivative_check(
    f: Function,
    x: Tensor,
    do_Hessian: bool = False,
    forward_mode: bool | None = True,
    num_test: int = 15,
    base: float = 2.0,
    tol: float = 0.1,
    verbose: bool = False,
) -> tuple[bool, bool | None]:
    """Taylor test of the gradient and the Hessian with respect to the input, in one random direction.

        f(x + hp) ≈ f(x) + h p·∇f(x) + ½h² pᵀ∇²f(x) p

    Args:
        f: A network, a layer, an activation, or a function called like one.
        x: Points (n, d).
        do_Hessian: Whether to check the Hessian.
        forward_mode: Passed to ``f``.
        num_test: Number of steps h = base⁻ᵏ that are printed. The verdict uses at least 15: fewer do not
            reveal a derivative that is wrong by a percent.
        base: Ratio of two steps.
        tol: How far the observed orders of the errors may be below 2 and 3.
        verbose: Whether to print a table.

    Returns:
        Whether the gradient passes, and whether the Hessian does (``None`` if it was not checked).

    Examples:
        >>> import torch
        >>> from hessquik.activations import softplusActivation
        >>> from hessquik.layers import singleLayer
        >>> f = singleLayer(4, 7, act=softplusActivation(), dtype=torch.float64)
        >>> x = torch.randn(10, 4, dtype=torch.float64)
        >>> input_derivative_check(f, x, do_Hessian=True)
        (True, True)
    """
    f0, df0, d2f0 = f(x, do_gradient=True, do_Hessian=do_Hessian, forward_mode=forward_mode)
    p = torch.randn_like(x)
    p = p / torch.linalg.vector_norm(p)
    if isinstance(f, hessQuikActivationFunction):
        terms = [f0, df0 * p, *([d2f0 * p * p] if do_Hessian else [])]
    else:
        slope = torch.einsum("ndm,nd->nm", df0, p)
        terms = [f0, slope, *([torch.einsum("nd,ndem,ne->nm", p, d2f0, p)] if do_Hessian else [])]
    passed = _taylor_test(
        lambda h: f(x + h * p, do_gradient=False, do_Hessian=False)[0], terms, num_test, base, tol, verbose
    )
    if verbose:
        _print_verdict("Gradient", passed[0])
        if do_Hessian:
            _print_verdict("Hessian", passed[1])
    return passed[0], passed[1] if do_Hessian else None


@torch.no_grad()
def input_derivative_check_finite_difference(
    f: Function,
    x: Tensor,
    do_Hessian: bool = False,
    forward_mode: bool | None = True,
    eps: float = 1e-4,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    verbose: bool = False,
) -> tuple[bool, bool | None]:
    """Compare the gradient and the Hessian with central differences.

        ∂f/∂xᵢ ≈ (f(x + εeᵢ) − f(x − εeᵢ)) / 2ε
        ∂²f/∂xᵢ∂xⱼ ≈ (f(x + εeᵢ + εeⱼ) − f(x + εeᵢ − εeⱼ) − f(x − εeᵢ + εeⱼ) + f(x − εeᵢ − εeⱼ)) / 4ε²

    Args:
        f: A network, a layer, or a function called like one.
        x: Points (n, d).
        do_Hessian: Whether to check the Hessian.
        forward_mode: Passed to ``f``.
        eps: Step ε.
        atol: Bound of the norm of the difference.
        rtol: Bound of that norm relative to the derivative's.
        verbose: Whether to print the errors.

    Returns:
        Whether the gradient passes, and whether the Hessian does (``None`` if it was not checked).

    Examples:
        >>> import torch
        >>> from hessquik.layers import quadraticLayer
        >>> f = quadraticLayer(4, 2, dtype=torch.float64)
        >>> input_derivative_check_finite_difference(f, torch.randn(10, 4, dtype=torch.float64), do_Hessian=True)
        (True, True)
    """
    _, df0, d2f0 = f(x, do_gradient=True, do_Hessian=do_Hessian, forward_mode=forward_mode)
    steps = eps * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gradient = torch.stack([(f(x + e)[0] - f(x - e)[0]) / (2 * eps) for e in steps], dim=1)
    gradient_passed = _are_close("Gradient", df0, gradient, eps, atol, rtol, verbose)
    if not do_Hessian:
        return gradient_passed, None
    rows = [
        torch.stack(
            [
                (f(x + e + g)[0] - f(x + e - g)[0] - f(x - e + g)[0] + f(x - e - g)[0]) / (4 * eps * eps)
                for g in steps
            ],
            dim=1,
        )
        for e in steps
    ]
    return gradient_passed, _are_close("Hessian", d2f0, torch.stack(rows, dim=1), eps, atol, rtol, verbose)


@torch.no_grad()
def input_derivative_check_finite_difference_laplacian(
    f: Function,
    x: Tensor,
    do_Laplacian: bool = False,
    eps: float = 1e-4,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    verbose: bool = False,
) -> tuple[bool, bool | None]:
    """Compare the gradient and the Laplacian with central differences.

        Δf ≈ Σᵢ (f(x + 2εeᵢ) − 2f(x) + f(x − 2εeᵢ)) / 4ε²

    Args:
        f: A network, a layer, or a function called like one.
        x: Points (n, d).
        do_Laplacian: Whether to check the Laplacian.
        eps: Step ε.
        atol: Bound of the norm of the difference.
        rtol: Bound of that norm relative to the derivative's.
        verbose: Whether to print the errors.

    Returns:
        Whether the gradient passes, and whether the Laplacian does (``None`` if it was not checked).

    Examples:
        >>> import torch
        >>> from hessquik.networks import ICNN
        >>> f = ICNN(4, [None, 8, 3], dtype=torch.float64)
        >>> x = torch.randn(10, 4, dtype=torch.float64)
        >>> input_derivative_check_finite_difference_laplacian(f, x, do_Laplacian=True)
        (True, True)
    """
    f0, df0, laplacian = f(x, do_gradient=True, do_Laplacian=do_Laplacian)
    steps = eps * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gradient = torch.stack([(f(x + e)[0] - f(x - e)[0]) / (2 * eps) for e in steps], dim=1)
    gradient_passed = _are_close("Gradient", df0, gradient, eps, atol, rtol, verbose)
    if not do_Laplacian:
        return gradient_passed, None
    differences = [(f(x + 2 * e)[0] - 2 * f0 + f(x - 2 * e)[0]) / (4 * eps * eps) for e in steps]
    total = torch.stack(differences, dim=1).sum(1, keepdim=True)
    return gradient_passed, _are_close("Laplacian", laplacian, total, eps, atol, rtol, verbose)


@torch.no_grad()
def directional_derivative_check(
    f: Function, x: Tensor, k: int = 3, tol: float = 1e-8, verbose: bool = False
) -> tuple[bool, bool, bool, bool]:
    """Compare derivatives in k random directions with the full ones applied to them.

    Forward the directions are V (k, d): V∇f and V∇²f Vᵀ. Backward they are weights W (m, k): ∇f W and ∇²f W.

    Args:
        f: A network, or a function called like one.
        x: Points (n, d).
        k: Number of directions.
        tol: Bound of the norm of the difference.
        verbose: Whether to print the errors.

    Returns:
        Whether these pass: the forward gradient and Hessian, the backward gradient and Hessian.

    Examples:
        >>> import torch
        >>> from hessquik.networks import ICNN
        >>> directional_derivative_check(ICNN(4, [None, 8, 3], dtype=torch.float64), torch.randn(5, 4).double())
        (True, True, True, True)
    """
    f0, df0, d2f0 = f(x, do_gradient=True, do_Hessian=True)
    v, w = x.new_empty(k, x.shape[1]).normal_(), x.new_empty(f0.shape[1], k).normal_()
    _, dfv, d2fv = f(x, do_gradient=True, do_Hessian=True, v=v, forward_mode=True)
    curved = torch.einsum("kd,ndem,le->nklm", v, d2f0, v)
    forward = _compare("FORWARD MODE", (("Gradient", v @ df0, dfv), ("Hessian", curved, d2fv)), tol, verbose)
    _, dfw, d2fw = f(x, do_gradient=True, do_Hessian=True, v=w, forward_mode=False)
    backward = _compare("BACKWARD MODE", (("Gradient", df0 @ w, dfw), ("Hessian", d2f0 @ w, d2fw)), tol, verbose)
    return *forward, *backward


@torch.no_grad()
def directional_derivative_laplacian_check(
    f: Function, x: Tensor, k: int = 3, tol: float = 1e-8, verbose: bool = False
) -> tuple[bool, bool]:
    """Compare the gradient in k random directions, and Σᵢ vᵢᵀ∇²f vᵢ, with the full derivatives applied to them.

    Args:
        f: A network, or a function called like one.
        x: Points (n, d).
        k: Number of directions.
        tol: Bound of the norm of the difference.
        verbose: Whether to print the errors.

    Returns:
        Whether the gradient passes and whether the Laplacian does.

    Examples:
        >>> import torch
        >>> from hessquik.networks import ICNN
        >>> f, x = ICNN(4, [None, 8, 3], dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
        >>> directional_derivative_laplacian_check(f, x)
        (True, True)
    """
    _, df0, d2f0 = f(x, do_gradient=True, do_Hessian=True)
    v = x.new_empty(k, x.shape[1]).normal_()
    _, dfv, laplacian = f(x, do_gradient=True, do_Laplacian=True, v=v, forward_mode=True)
    total = torch.einsum("kd,ndem,ke->nm", v, d2f0, v).unsqueeze(1)
    return _compare("FORWARD MODE", (("Gradient", v @ df0, dfv), ("Laplacian", total, laplacian)), tol, verbose)


def network_derivative_check(
    f: nn.Module,
    x: Tensor,
    do_Hessian: bool = False,
    forward_mode: bool | None = True,
    num_test: int = 15,
    base: float = 2.0,
    tol: float = 0.1,
    verbose: bool = False,
) -> bool:
    """Taylor test of the gradient with respect to the weights θ, through the derivatives with respect to the input.

        Φ(θ) = ½‖f(x)‖² + ½‖∇f(x)‖² + ½‖∇²f(x)‖²        Φ(θ + hp) ≈ Φ(θ) + h p·∇Φ(θ)

    The weights and their ``grad`` are unchanged afterwards.

    Args:
        f: A network or layer.
        x: Points (n, d).
        do_Hessian: Whether Φ has the Hessian's term.
        forward_mode: Passed to ``f``.
        num_test: Number of steps h = base⁻ᵏ that are printed. The verdict uses at least 15: fewer do not
            reveal a derivative that is wrong by a percent.
        base: Ratio of two steps.
        tol: How far the observed order of the error may be below 2.
        verbose: Whether to print a table.

    Returns:
        Whether the gradient passes.

    Examples:
        >>> import torch
        >>> from hessquik.activations import tanhActivation
        >>> from hessquik.networks import resnetNN
        >>> f = resnetNN(4, depth=3, act=tanhActivation(), dtype=torch.float64)
        >>> network_derivative_check(f, torch.randn(10, 4, dtype=torch.float64), do_Hessian=True)
        True
    """

    def objective() -> Tensor:
        parts = f(x, do_gradient=True, do_Hessian=do_Hessian, forward_mode=forward_mode)
        return torch.stack([0.5 * part.square().sum() for part in parts if part is not None]).sum()

    theta = extract_data(f)
    parameters = list(f.parameters())
    with torch.enable_grad():
        value = objective()
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    gradient = torch.cat([part.flatten() for part in gradients])
    p = torch.randn_like(theta)
    p = p / torch.linalg.vector_norm(p)

    def moved(h: float) -> Tensor:
        insert_data(f, theta + h * p)
        return objective()

    with torch.no_grad():
        try:
            terms = [value.detach(), gradient @ p]
            (passed,) = _taylor_test(moved, terms, num_test, base, tol, verbose)
        finally:
            insert_data(f, theta)
    if verbose:
        _print_verdict("Gradient", passed)
    return passed


def _taylor_test(
    f: Callable[[float], Tensor], terms: list[Tensor], num_test: int, base: float, tol: float, verbose: bool
) -> list[bool]:
    """Return whether the errors of the Taylor polynomials of degree 1, 2, … decrease at the expected orders."""
    steps = [base**-k for k in range(max(num_test, JUDGED_STEPS))]
    found = taylor.errors(f, terms, steps)
    if verbose:
        print("".join(f"{name:<20s}" for name in ("h", "E0", "E1", "E2")[: 1 + len(terms)]))
        cell = "%0.2f x " + f"{base:g}" + "^(%0.2d)\t\t"
        for k, row in enumerate(found[: max(num_test, 0)]):
            print((1 + len(row)) * cell % (1, -k, *convert_to_base(row, base)))
    by_order = list(zip(*found, strict=True))
    return [
        taylor.observed_order(by_order[k], k + 1, base, taylor.rounding(terms[: k + 1])) >= k + 1 - tol
        for k in range(1, len(terms))
    ]


def _are_close(
    name: str, derivative: Tensor, difference: Tensor, eps: float, atol: float, rtol: float, verbose: bool
) -> bool:
    """Return whether a derivative is within both bounds of its central difference."""
    error = float(torch.linalg.vector_norm(derivative - difference))
    relative = error / max(float(torch.linalg.vector_norm(derivative)), eps)
    passed = error < atol and relative < rtol
    if verbose:
        print(f"{name} Finite Difference: Error = {error:0.4e}, Relative Error = {relative:0.4e}")
        _print_verdict(name, passed)
    return passed


def _compare(
    mode: str, pairs: tuple[tuple[str, Tensor, Tensor], tuple[str, Tensor, Tensor]], tol: float, verbose: bool
) -> tuple[bool, bool]:
    """Return whether the first and the second derivative are within ``tol`` of their expected values."""
    (_, *first), (second_name, *second) = pairs
    first_error, second_error = (float(torch.linalg.vector_norm(a - b)) for a, b in (first, second))
    passed = first_error < tol, second_error < tol
    if verbose:
        print(f"{mode}: grad = {first_error:0.4e}\t {second_name[:4].lower().rstrip('l')} = {second_error:0.4e}")
        for (name, *_), has_passed in zip(pairs, passed, strict=True):
            _print_verdict(f"\t {name}", has_passed)
    return passed


def _print_verdict(name: str, passed: bool) -> None:
    print(f"{name} {'PASSED!' if passed else 'FAILED.'}")
