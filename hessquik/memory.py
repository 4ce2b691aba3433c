"""Memory for large results, in huge pages where the system has them.

A fresh array is given to the process page by page as it is written, and with pages of 4 KiB that takes longer than
computing what goes in.
"""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

__all__ = ["empty"]

#: Arrays from this size on get huge pages, which are 2 MiB on most machines.
LARGE_BYTES = 4 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An array like that of ``torch.empty``; its memory goes back to the system with it.

    Example:
        >>> empty((1024, 1024, 2), torch.float32, torch.device("cpu")).shape
        torch.Size([1024, 1024, 2])
    """
    size = prod(shape) * dtype.itemsize
    if size < LARGE_BYTES or device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
