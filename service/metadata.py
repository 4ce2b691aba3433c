"""Changes of a model file's metadata by ``KEY=VALUE`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["changed"]

#: The keys of a file's metadata, with the type of the entries of a list; ``None`` for keys that are not lists.
_ENTRIES: dict[str, type | None] = {
    "description": None,
    "input_names": str,
    "output_names": str,
    "lower_bounds": float,
    "upper_bounds": float,
    "training": None,
}


def changed(metadata: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return metadata with some entries set, or removed where the value is empty.

    A list is written as entries separated by commas, or as JSON; ``training.KEY`` sets a member of ``training``.

    Args:
        metadata: The metadata, as in :class:`hessquik.storage.SavedNetwork`.
        settings: Changes of the form ``KEY=VALUE``.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type.

    Examples:
        >>> changed({"description": "old"}, ["description=", "input_names=x,y", "training.value_relative_error=1e-3"])
        {'input_names': ['x', 'y'], 'training': {'value_relative_error': 0.001}}
    """
    result = dict(metadata)
    for setting in settings:
        key, equals, text = setting.partition("=")
        name, _, member = key.partition(".")
        if not equals or name not in _ENTRIES or (bool(member) and name != "training"):
            raise ValueError(f"--set: expected KEY=VALUE with a KEY out of {', '.join(_ENTRIES)}, got {setting!r}")
        if member:
            result["training"] = (
                {**result.get("training", {}), member: _json(key, text)}
                if text
                else {one: value for one, value in result.get("training", {}).items() if one != member}
            )
        elif not text:
            result.pop(name, None)
        else:
            result[name] = _value(name, text)
    return result


def _value(name: str, text: str) -> Any:
    """Parse the value of an entry."""
    kind = _ENTRIES[name]
    if name == "description":
        return text
    if kind is None or text.startswith("["):
        return _json(name, text)
    try:
        return [kind(entry.strip()) for entry in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: expected numbers separated by commas, got {text!r}") from None


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{name}: expected JSON, got {text!r}") from None
