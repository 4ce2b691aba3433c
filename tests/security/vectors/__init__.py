"""Requests with exactly one thing wrong, by table: what is wrong × where × in which dialect, and what to answer."""

from tests.security.vectors import binary, inference, native, umbridge
from tests.security.vectors.vector import Vector

__all__ = ["VECTORS", "Vector"]

VECTORS = [vector for part in (native, binary, umbridge, inference) for vector in part.every()]
