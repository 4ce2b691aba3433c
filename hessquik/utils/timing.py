"""Timing of value, gradient and Hessian over many widths of input and output."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hessquik.activations import antiTanhActivation, identityActivation, softplusActivation, tanhActivation
from hessquik.layers import quadraticICNNLayer, singleLayer
from hessquik.networks import ICNN, NN, NNPytorchAD, NNPytorchHessian, fullyConnectedNN, resnetNN

__all__ = [
    "setup_device_and_gradient",
    "setup_fully_connected",
    "setup_icnn",
    "setup_network",
    "setup_resnet",
    "timing_test",
    "timing_test_cpu",
    "timing_test_gpu",
]

_Choice = TypeVar("_Choice")

_WRAPPERS: dict[str, Callable[[NN], nn.Module]] = {
    "hessQuik": lambda f: f,
    "PytorchAD": NNPytorchAD,
    "PytorchHessian": NNPytorchHessian,
}


def setup_device_and_gradient(
    f: NN, network_wrapper: str = "hessQuik", device: torch.device | str = "cpu"
) -> nn.Module:
    """Move a network to a device, and wrap it in the class that computes its derivatives.

    Args:
        f: The network.
        network_wrapper: ``"hessQuik"`` (the network itself), ``"PytorchAD"`` or ``"PytorchHessian"``.
        device: The device.

    Raises:
        ValueError: there is no such wrapper.

    Examples:
        >>> type(setup_device_and_gradient(setup_resnet(2, 1), "PytorchAD")).__name__
        'NNPytorchAD'
    """
    return _chosen("network_wrapper", network_wrapper, _WRAPPERS)(f.to(device))


def setup_resnet(in_features: int, out_features: int, width: int = 16, depth: int = 4) -> NN:
    """Make a single layer, ``depth`` residual layers and a linear one, for timing.

    Examples:
        >>> len(setup_resnet(3, 2).layers())
        6
    """
    return NN(
        singleLayer(in_features, width, act=antiTanhActivation()),
        resnetNN(width, depth, h=0.5, act=tanhActivation()),
        singleLayer(width, out_features, act=identityActivation()),
    )


def setup_fully_connected(in_features: int, out_features: int, width: int = 16, depth: int = 4) -> NN:
    """Make a fully-connected network with ``depth`` hidden layers, for timing.

    Examples:
        >>> setup_fully_connected(3, 2).widths
        [3, 16, 16, 16, 16, 2]
    """
    return fullyConnectedNN([in_features, *depth * [width], out_features], act=tanhActivation())


def setup_icnn(in_features: int, out_features: int, width: int = 16, depth: int = 4) -> NN:
    """Make a convex network with ``depth`` layers and a quadratic head, for timing.

    Raises:
        ValueError: there is more than one output.

    Examples:
        >>> setup_icnn(3, 1).dim_output()
        1
    """
    if out_features != 1:
        raise ValueError(f"out_features of an ICNN must be 1, got {out_features}")
    return NN(
        ICNN(in_features, [None, *depth * [width]], act=softplusActivation()),
        quadraticICNNLayer(in_features, width, rank=2),
    )


_NETWORKS = {"resnet": setup_resnet, "fully_connected": setup_fully_connected, "icnn": setup_icnn}


def setup_network(
    in_features: int,
    out_features: int,
    width: int,
    depth: int,
    network_type: str = "resnet",
    network_wrapper: str = "hessQuik",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Make a network for timing.

    Args:
        in_features: d.
        out_features: m.
        width: Width of the hidden layers.
        depth: Number of hidden layers.
        network_type: ``"resnet"``, ``"fully_connected"`` or ``"icnn"``.
        network_wrapper: See :func:`setup_device_and_gradient`.
        device: The device.

    Raises:
        ValueError: there is no such type or wrapper.

    Examples:
        >>> setup_network(3, 2, width=8, depth=2).dim_input()
        3
    """
    f = _chosen("network_type", network_type, _NETWORKS)(in_features, out_features, width, depth)
    return setup_device_and_gradient(f, network_wrapper=network_wrapper, device=device)


def timing_test_cpu(f: nn.Module, x: Tensor, num_trials: int = 10, clear_memory: bool = True) -> Tensor:
    """Time value, gradient and Hessian together, after one run that is not counted.

    Args:
        f: The network.
        x: Points (n, d).
        num_trials: Number of trials.
        clear_memory: Whether garbage is collected at the end, and unused GPU memory freed.

    Returns:
        The seconds of each trial (num_trials,).

    Examples:
        >>> import torch
        >>> timing_test_cpu(setup_resnet(2, 1), torch.randn(10, 2), num_trials=3).shape
        torch.Size([3])
    """
    return _timed(f, x, num_trials, clear_memory, lambda: None)


def timing_test_gpu(f: nn.Module, x: Tensor, num_trials: int = 10, clear_memory: bool = True) -> Tensor:
    """Time as :func:`timing_test_cpu` does, on a GPU; each trial waits for the GPU to finish."""
    return _timed(f, x, num_trials, clear_memory, torch.cuda.synchronize)


def timing_test(
    in_feature_range: Iterable[int] | Tensor,
    out_feature_range: Iterable[int] | Tensor,
    nex: int = 10,
    num_trials: int = 10,
    width: int = 16,
    depth: int = 4,
    network_wrapper: str = "hessQuik",
    network_type: str = "resnet",
    device: torch.device | str = "cpu",
    clear_memory: bool = True,
) -> dict[str, Any]:
    """Time value, gradient and Hessian for all pairs of numbers of inputs and outputs.

    Args:
        in_feature_range: Numbers of inputs d.
        out_feature_range: Numbers of outputs m.
        nex: Number of points n.
        num_trials: Number of trials for each pair.
        width: Width of the hidden layers.
        depth: Number of hidden layers.
        network_wrapper: See :func:`setup_device_and_gradient`.
        network_type: See :func:`setup_network`.
        device: The device.
        clear_memory: Whether garbage is collected after each pair, and unused GPU memory freed.

    Returns:
        ``timing_trials`` (seconds, (inputs, outputs, trials)), their ``timing_trials_mean`` and
        ``timing_trials_std`` over the trials, and the arguments ``in_feature_range``, ``out_feature_range``,
        ``nex`` and ``num_trials``.

    Examples:
        >>> import torch
        >>> timing_test(torch.tensor([1, 4]), torch.tensor([1, 2, 3]), num_trials=2)["timing_trials"].shape
        torch.Size([2, 3, 2])
    """
    timed = timing_test_cpu if torch.device(device).type == "cpu" else timing_test_gpu
    rows = []
    for d in map(int, in_feature_range):
        row = []
        for m in map(int, out_feature_range):
            f = setup_network(d, m, width, depth, network_type, network_wrapper, device)
            row.append(timed(f, torch.randn(nex, d, device=device), num_trials, clear_memory))
        rows.append(torch.stack(row))
    trials = torch.stack(rows)
    return {
        "timing_trials": trials,
        "timing_trials_mean": trials.mean(-1),
        "timing_trials_std": trials.std(-1, correction=min(1, num_trials - 1)),
        "in_feature_range": in_feature_range,
        "out_feature_range": out_feature_range,
        "nex": nex,
        "num_trials": num_trials,
    }


def _timed(f: nn.Module, x: Tensor, num_trials: int, clear_memory: bool, wait: Callable[[], None]) -> Tensor:
    """Return the seconds of each trial; the first run is not counted."""
    seconds = []
    for _ in range(num_trials + 1):
        wait()
        start = time.perf_counter()
        f(x, do_gradient=True, do_Hessian=True)
        wait()
        seconds.append(time.perf_counter() - start)
    if clear_memory:
        gc.collect()
        torch.cuda.empty_cache()
    return torch.tensor(seconds[1:])


def _chosen(what: str, name: str, table: Mapping[str, _Choice]) -> _Choice:
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
