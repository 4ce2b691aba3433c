"""Aliases for the module names of the original hessQuik.

``from hessquik.layers.single_layer import singleLayer`` works like ``from hessQuik.layers.single_layer import …``. An
alias is the whole package; there is no file of that name.
"""

from __future__ import annotations

import sys

__all__ = ["MODULES", "register"]

#: The original's modules by package, which are also the places that its pickles name.
MODULES: dict[str, tuple[str, ...]] = {
    "activations": (
        "antiTanh_activation",
        "hessQuik_activation_function",
        "identity_activation",
        "quadratic_activation",
        "sigmoid_activation",
        "softplus_activation",
        "tanh_activation",
    ),
    "layers": (
        "hessQuik_layer",
        "icnn_layer",
        "quadratic_icnn_layer",
        "quadratic_layer",
        "resnet_layer",
        "single_layer",
    ),
    "networks": ("fully_connected_network", "hessQuik_network", "icnn_network", "resnet_network"),
    "utils": (
        "directional_derivative_check",
        "input_derivative_check",
        "input_derivative_check_laplacian",
        "network_derivative_check",
        "utils",
    ),
}


def register(package: str) -> None:
    """Register the original's module names as aliases of a package.

    Args:
        package: Name of the package, such as ``hessquik.layers``.

    Examples:
        >>> from hessquik.layers.single_layer import singleLayer
        >>> singleLayer.__module__
        'hessquik.layers.single'
    """
    for module in MODULES[package.rpartition(".")[2]]:
        sys.modules[f"{package}.{module}"] = sys.modules[package]
