"""Splitting of batches over the service's limits, by points and by directions, and joining of the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

from hessquik_client.messages import HEADER_BYTES, Answer, Array, Facts, Question
from hessquik_client.quantities import DIRECTIONAL

__all__ = ["Part", "Result", "cut"]

#: Bytes of points and answers in one part: several workers share a batch, and a lost part costs little.
PART_BYTES = 8 << 20


class Part(NamedTuple):
    """A part of a call.

    Attributes:
        question: The arguments of the part.
        rows: Slice of its points in the whole call.
        directions: Slice of its directions in the whole call.
    """

    question: Question
    rows: slice
    directions: slice


def cut(question: Question, facts: Facts) -> list[Part]:
    """Split a call into parts of nearly equal size that fit the service's limits and :data:`PART_BYTES`.

    A part has as many directions as fit with one point, then as many points as fit with these directions. Quantities
    without directions are requested only with the first directions. A part of one point and one direction can still
    exceed a limit; the service then refuses it.

    Examples:
        >>> facts = Facts("1", 3, 1, "float64", rows=65536, directions=1024, body_bytes=1 << 24, reply_bytes=1 << 28)
        >>> question = Question(np.zeros((66, 3)), ("hvp",), directions=np.zeros((3000, 3)))
        >>> [(part.question.rows, part.question.k) for part in cut(question, facts)]
        [(33, 1000), (33, 1000), (33, 1000), (33, 1000), (33, 1000), (33, 1000)]
    """

    def body(n: int, k: int) -> int:
        return _body_bytes(question, n, k)

    def reply(n: int, k: int) -> int:
        return HEADER_BYTES + n * question.floats(facts.m or 1, k) * np.dtype(question.dtype or facts.dtype).itemsize

    def moved(n: int, k: int) -> int:
        return body(n, k) + reply(n, k)

    k = min(
        question.k,
        facts.directions,
        facts.rows,
        _largest(facts.body_bytes, lambda k: body(1, k)),
        _largest(facts.reply_bytes, lambda k: reply(1, k)),
        _largest(PART_BYTES + moved(1, 0), lambda k: moved(1, k)),
    )
    n = min(
        question.rows,
        facts.rows // max(1, k),
        _largest(facts.body_bytes, lambda n: body(n, k)),
        _largest(facts.reply_bytes, lambda n: reply(n, k)),
        _largest(PART_BYTES + moved(0, k), lambda n: moved(n, k)),
    )
    places = product(_evenly(question.k, k), _evenly(question.rows, n))
    return [Part(_slice(question, rows, directions), rows, directions) for directions, rows in places]


class Result:
    """The arrays of a whole call, which the answers of its parts are written to.

    Args:
        question: The arguments of the whole call.
        facts: The model's sizes and dtype.
    """

    def __init__(self, question: Question, facts: Facts) -> None:
        """Allocate the arrays; the system provides their pages when they are written."""
        dtype = question.dtype or facts.dtype
        self.arrays: dict[str, Array] = {
            name: np.empty(question.shape(name, facts.m or 1), dtype) for name in question.quantities
        }

    def put(self, part: Part, answer: Answer) -> None:
        """Write the answer of a part to its slice."""
        for name, array in answer.arrays.items():
            place = (part.rows, part.directions) if name in DIRECTIONAL else part.rows
            self.arrays[name][place] = array


def _body_bytes(question: Question, n: int, k: int) -> int:
    """Return the bytes of a request for n points with k directions each."""
    d, weights, directions = question.inputs.shape[-1], question.weights, question.directions
    total: int = HEADER_BYTES + n * d * question.inputs.itemsize
    if weights is not None:
        total += (n if weights.ndim == 2 else 1) * weights.shape[-1] * weights.itemsize
    if directions is not None:
        total += (n if directions.ndim == 3 else 1) * k * d * directions.itemsize
    return total


def _largest(most_bytes: int, size: Callable[[int], int]) -> int:
    """Return the largest count whose size, which is affine, is within a limit."""
    return (most_bytes - size(0)) // max(1, size(1) - size(0))


def _evenly(count: int, most: int) -> list[slice]:
    """Return slices of nearly equal length, at most ``most``, that cover ``count``; one empty slice if it is 0.

    Examples:
        >>> _evenly(7, 3)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """
    parts = max(1, -(-count // max(1, most)))
    return [slice(start, stop) for start, stop in pairwise(count * part // parts for part in range(parts + 1))]


def _slice(question: Question, rows: slice, along: slice) -> Question:
    """Return the arguments for some points and some directions."""
    weights, directions, quantities = question.weights, question.directions, question.quantities
    if weights is not None and weights.ndim == 2:
        weights = weights[rows]
    if directions is not None:
        directions = directions[rows, along] if directions.ndim == 3 else directions[along]
    if along.start:
        quantities = tuple(name for name in quantities if name in DIRECTIONAL)
    return replace(
        question, inputs=question.inputs[rows], quantities=quantities, weights=weights, directions=directions
    )
