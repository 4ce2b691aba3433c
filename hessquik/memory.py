"""Memory for large arrays, in huge pages where the system has them.

The system allocates the memory of a new array page by page when it is first written; with pages of 4 KiB these faults
take longer than computing the array, and reading weights from many small pages causes TLB misses. The memory of
results is reused after they are freed, since the system also zeroes huge pages before it provides them.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

__all__ = ["Arena", "empty"]

#: Arrays from this size on get huge pages, which are 2 MiB on most machines.
LARGE_BYTES = 4 << 20
#: Arrays below this size are not worth a place in an arena.
SMALL_BYTES = 64 << 10
HUGE_PAGE_BYTES = 2 << 20
#: Bytes of released results that are kept in all; a program with room for more may set more.
CACHE_BYTES = 48 << 20

_cache: list[mmap.mmap] = []
#: Memory may come free at any moment, also in the middle of what the lock guards.
_lock = threading.RLock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an array like ``torch.empty``; its memory is reused for later arrays or returned to the system.

    Examples:
        >>> empty((1024, 1024, 2), torch.float32, torch.device("cpu")).shape
        torch.Size([1024, 1024, 2])
    """
    size = prod(shape) * dtype.itemsize
    if size < LARGE_BYTES or device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _acquire(size)
    # The tensor holds this view of the memory and nothing else does, so its end is that of the last use.
    view = (ctypes.c_char * size).from_buffer(memory)
    weakref.finalize(view, _release, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype).view(shape)


class Arena:
    """An allocator of large arrays in huge pages, which are freed together.

    Examples:
        >>> arena = Arena()
        >>> arena.empty((256, 256), torch.float32).shape
        torch.Size([256, 256])
    """

    def __init__(self) -> None:
        """Start without memory."""
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an array like ``torch.empty``; a large one is placed in memory after the previous one."""
        size = -(-prod(shape) * dtype.itemsize // 64) * 64
        if size < SMALL_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        if size > len(self._free):
            self._free = torch.frombuffer(_pages(size), dtype=torch.uint8)
        taken, self._free = self._free[:size], self._free[size:]
        return taken.view(dtype)[: prod(shape)].view(shape)


def _acquire(size: int) -> mmap.mmap:
    """Return reusable memory of about this size, or else new memory after freeing unused memory."""
    with _lock:
        for i, memory in enumerate(_cache):
            if size <= len(memory) <= size + size // 8:
                return _cache.pop(i)
        _cache.clear()
    return _pages(size)


def _release(memory: mmap.mmap) -> None:
    """Keep free memory for reuse, up to a limit."""
    with _lock:
        if len(memory) + sum(map(len, _cache)) <= CACHE_BYTES:
            _cache.append(memory)


def _pages(size: int) -> mmap.mmap:
    """Return new memory in whole huge pages."""
    size = -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
