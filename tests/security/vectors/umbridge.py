"""UM-Bridge 1.0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.security.vectors.vector import ABSENT, NO_BODIES, NO_OBJECTS, Vector, as_json, shown

#: What each operation takes, and good values.
POINT: dict[str, Any] = {"name": "peaks", "config": {}, "input": [[0, 0]]}
OPERATIONS: dict[str, dict[str, Any]] = {
    "/ModelInfo": {"name": "peaks"},
    "/InputSizes": {"name": "peaks", "config": {}},
    "/OutputSizes": {"name": "peaks", "config": {}},
    "/Evaluate": POINT,
    "/Gradient": POINT | {"outWrt": 0, "inWrt": 0, "sens": [1]},
    "/ApplyJacobian": POINT | {"outWrt": 0, "inWrt": 0, "vec": [1, 0]},
    "/ApplyHessian": POINT | {"outWrt": 0, "inWrt1": 0, "inWrt2": 0, "sens": [1], "vec": [1, 0]},
}
_NAN, _INFINITY = float("nan"), float("inf")
_VECTORS = [ABSENT, None, True, "x", {}, [], [1, 2, 3], [[1, 2]], ["1"], [_NAN, 0], [_INFINITY], [None], [True], [[]]]
_INDICES = [ABSENT, None, True, False, 1, -1, 0.5, "0", [0], {}]
OPERANDS: dict[str, list[Any]] = {
    "name": [ABSENT, None, 1, True, [], {}, ["peaks"]],
    "config": [1, "x", [], True, {"a": 1}, {"version": True}, {"version": 1.5}, {"version": []}, {"version": {}}],
    "input": [
        ABSENT, None, 1, True, "x", {}, [], [[0, 0], [0, 0]], [[0]], [[0, 0, 0]], [0, 0], [["0", 0]], [[None, 0]],
        [[True, 0]], [[_NAN, 0]], [[0, -_INFINITY]], [[[0, 0]]], [[]], [{}],
    ],
    "outWrt": _INDICES, "inWrt": _INDICES, "inWrt1": _INDICES, "inWrt2": _INDICES, "sens": _VECTORS, "vec": _VECTORS,
}  # fmt: skip


def every() -> Iterator[Vector]:
    """Yield all vectors."""
    for path, good in OPERATIONS.items():
        yield Vector("good", path, as_json(good), 200)
        for about in good:
            for value in OPERANDS[about]:
                yield Vector(f"{about} {shown(value)}", path, as_json(good | {about: value}), 400, about)
        for text in NO_OBJECTS:
            yield Vector(f"{text} for an object", path, text.encode(), 400)
        for kind in ("empty", "UTF-16", "bad UTF-8", "deep lists", "pickle", "two documents"):
            yield Vector(kind, path, NO_BODIES[kind], 400)
        yield Vector("unknown model", path, as_json(good | {"name": "none"}), 400)
        yield Vector("unknown version", path, as_json(good | {"config": {"version": 9}}), 400)
