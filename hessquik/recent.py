"""Values that are expensive to make and were used last, kept up to a bound on their memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Recent"]

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The values that were used last, by key; threads may share it.

    Args:
        most_bytes: Bytes of the values that are kept.

    Examples:
        >>> squares = Recent(most_bytes=100)
        >>> squares.get(12, lambda: 144, size_bytes=60), squares.get(12, lambda: 0, size_bytes=60)
        (144, 144)
        >>> squares.get(13, lambda: 169, size_bytes=60), squares.get(12, lambda: 0, size_bytes=60)
        (169, 0)
    """

    def __init__(self, most_bytes: int) -> None:
        """Start without values."""
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value], size_bytes: int) -> Value:
        """Return a value that is kept, or else make it and drop those that were not used for longest.

        A value that is too large to be kept drops no others.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = make()  # without the lock: another thread may make it too
        with self._lock:
            if key not in self._kept and size_bytes <= self._most_bytes:
                self._kept[key] = value, size_bytes
                self._bytes += size_bytes
            while self._bytes > self._most_bytes:
                _, (_, dropped_bytes) = self._kept.popitem(last=False)
                self._bytes -= dropped_bytes
        return value
