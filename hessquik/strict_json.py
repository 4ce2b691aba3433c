"""JSON that any program reads alike: finite numbers within 64 bits, Unicode text, unique keys, bounded nesting."""

from __future__ import annotations

import json
import math
from typing import Any

from hessquik.errors import FormatError

__all__ = ["check", "parse", "plain", "shown"]

#: Levels of lists and objects inside one another.
MAX_DEPTH = 32
#: Characters of a value that a message shows.
MAX_SHOWN = 60


def parse(what: str, text: str | bytes) -> Any:
    """Read strict JSON.

    Args:
        what: Name of the text, for the message.
        text: The JSON.

    Raises:
        FormatError: it is not.

    Examples:
        >>> parse("bounds", "[0, 1.5]")
        [0, 1.5]
        >>> parse("bounds", "[0, 1e999]")
        Traceback (most recent call last):
        hessquik.errors.FormatError: bounds[1] must be a finite number, got Infinity
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("duplicate keys")
        return found

    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError:
        raise FormatError(f"{what} must be nested at most {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise FormatError(f"{what} must be strict JSON ({error!s:.120})") from None
    check(value, what)
    return value


def check(value: Any, what: str) -> None:
    """Refuse a Python value that strict JSON cannot hold.

    Raises:
        FormatError: some part of it is not finite, not within 64 bits, not Unicode, of another type or too deep.

    Examples:
        >>> check({"loss": [0.5, float("nan")]}, "training")
        Traceback (most recent call last):
        hessquik.errors.FormatError: training.loss[1] must be a finite number, got NaN
    """
    waiting = [(value, what, 0)]
    while waiting:
        part, place, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise FormatError(f"{what} must be nested at most {MAX_DEPTH} deep")
        match part:
            case None | bool():
                pass
            case str():
                _check_text(part, place)
            case int():
                if not -(1 << 63) <= part < 1 << 64:
                    raise FormatError(f"{place} must be between -2^63 and 2^64, got {shown(part)}")
            case float():
                if not math.isfinite(part):
                    raise FormatError(f"{place} must be a finite number, got {shown(part)}")
            case list():
                waiting += [(child, f"{place}[{i}]", depth + 1) for i, child in enumerate(part)]
            case dict():
                for key, child in part.items():
                    if not isinstance(key, str):
                        raise FormatError(f"{place} must have keys that are strings, got {shown(key)}")
                    _check_text(key, f"a key of {place}")
                    waiting.append((child, f"{place}.{key[:MAX_SHOWN]}", depth + 1))
            case _:
                raise FormatError(f"{place} must be a JSON value, got an object of type {type(part).__name__}")


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{place} must be Unicode text, got a lone surrogate") from None


def plain(value: Any) -> Any:
    """Return a value with tuples, arrays and their scalars, of NumPy or torch, as lists and numbers.

    Examples:
        >>> import numpy as np
        >>> plain({"lower": np.zeros(2), "error": np.float32(0.5), "names": ("x", "y")})
        {'lower': [0.0, 0.0], 'error': 0.5, 'names': ['x', 'y']}
    """
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


def shown(value: Any) -> str:
    """Return a value as JSON for a message, cut after :data:`MAX_SHOWN` characters.

    Examples:
        >>> shown(None), shown([1, "a"]), shown(10**400)[-1]
        ('null', '[1, "a"]', '…')
    """
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
