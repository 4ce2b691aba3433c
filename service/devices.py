"""Devices of this machine, found without loading torch into the front end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hessquik_client.errors import StartUpError

__all__ = ["resolve_devices"]

#: Time to count the GPUs.
COUNT_S = 120
_COUNT = "import torch; print(torch.cuda.device_count())"


def resolve_devices(device: str, workers: int, count_gpus: int | None = None) -> list[str]:
    """Return the device of each worker; ``auto`` means all GPUs, or the CPU if there is none.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or a list such as ``cuda:0,cuda:1``.
        workers: Workers per device.
        count_gpus: Number of GPUs; determined if needed and not given.

    Raises:
        StartUpError: the machine does not have a device that is named.

    Examples:
        >>> resolve_devices("cpu", 2)
        ['cpu', 'cpu']
        >>> resolve_devices("cuda:1", 1, count_gpus=2)
        ['cuda:1']
    """
    names = [name.strip() for name in device.split(",")]
    if not all(re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name) for name in names) or (
        len(names) > 1 and {"auto", "cuda"} & set(names)
    ):
        raise StartUpError(f"expected auto, cpu, cuda, or a list such as cuda:0,cuda:1 as the device, got {device!r}")
    if names == ["cpu"]:
        return ["cpu"] * workers
    gpus = _count_gpus() if count_gpus is None else count_gpus
    if names == ["auto"]:
        names = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    elif names == ["cuda"]:
        names = [f"cuda:{index}" for index in range(gpus)]
        if not names:
            raise StartUpError("expected a CUDA device, found none")
    for name in names:
        if name.startswith("cuda") and int(name.partition(":")[2]) >= gpus:
            raise StartUpError(f"expected the device {name}, found {gpus} CUDA devices")
    return [name for name in names for _ in range(workers)]


def _count_gpus() -> int:
    """Return the number of GPUs that torch finds, in a separate process; 0 without a driver.

    Raises:
        StartUpError: the driver hangs.
    """
    if not Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidiactl").exists():
        return 0
    try:
        command = [sys.executable, "-P", "-c", _COUNT]  # not a torch.py of the current folder
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COUNT_S)
    except subprocess.TimeoutExpired:
        raise StartUpError(f"expected a driver that names its CUDA devices within {COUNT_S} s") from None
    return int(answer.stdout) if answer.returncode == 0 and answer.stdout.strip().isdigit() else 0
